"""What a model's head is trained towards: its class says it, as in transformers.

The losses are in `losses`; a head that is not in the table has no default loss and is refused by name.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

from torch import nn

from coterie.errors import PrivacyError

Kind = Literal["next", "tokens", "decoder", "classes", "choice", "span"]

REGRESSION, SINGLE_LABEL, MULTI_LABEL = "regression", "single_label_classification", "multi_label_classification"

TARGETS = ("labels", "start_positions", "end_positions")
"""Keys of a batch that are compared with outputs, never given to the model: its own loss is a mean over the batch."""

_NOT_SHIFTED = {
    "XLMWithLMHeadModel", "FlaubertWithLMHeadModel", "XLNetLMHeadModel", "BartForCausalLM", "MBartForCausalLM",
    "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM", "MarianForCausalLM",
    "MvpForCausalLM", "PegasusForCausalLM", "PLBartForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM",
}  # fmt: skip
"""Their own loss compares each output with the label at its own place: who prepares labels shifts them."""

_UNKNOWN = {"FSMTForConditionalGeneration", "CpmAntForCausalLM"}
"""Named like others, with a loss of their own."""

_SUFFIXES: tuple[tuple[str, Kind], ...] = (
    ("ForCausalLM", "next"),
    ("LMHeadModel", "next"),
    ("ModelWithLMHead", "next"),
    ("ForConditionalGeneration", "next"),
    ("EncoderDecoderModel", "decoder"),
    ("MarianMTModel", "decoder"),
    ("ForMaskedLM", "tokens"),
    ("ForTokenClassification", "tokens"),
    ("ForSequenceClassification", "classes"),
    ("ForImageClassification", "classes"),
    ("ForVideoClassification", "classes"),
    ("ForQuestionAnswering", "span"),
    ("ForQuestionAnsweringSimple", "span"),
    ("ForMultipleChoice", "choice"),
    ("ForNextSentencePrediction", "choice"),
)


class Head(NamedTuple):
    """A model's head.

    Attributes:
        kind: next (labels shifted by one), tokens (a label each, no shift), decoder (labels of an encoder-decoder),
            classes (by problem_type), choice (one of several), span (start and end of an answer).
        by_shape: the class says nothing, as it is not one of transformers': two-dimensional outputs are classes.
    """

    kind: Kind
    by_shape: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """Keys of the batch that the loss needs."""
        return TARGETS[1:] if self.kind == "span" else TARGETS[:1]


def head_of(model: nn.Module) -> Head:
    """The head of a model, or of what a peft model wraps.

    Raises:
        PrivacyError: a class of transformers with a head whose loss is not known for each record.
    """
    base = base_of(model)
    for cls in type(base).__mro__:
        kind = _kind(cls.__name__, base)
        if cls.__name__ in _UNKNOWN:
            break
        if kind is not None:
            return Head(kind)
    if getattr(base, "config", None) is None or not hasattr(base, "loss_function"):
        return Head("next", by_shape=True)
    raise PrivacyError(
        f"{type(base).__name__} has no default loss.",
        code="dp-loss-head",
        why="transformers computes this head's loss over the batch, and its loss for each record is not known here",
        fix="pass loss_fn(model, batch), which returns one loss per record, or use a model with a language, "
        "classification, question-answering or multiple-choice head",
    )


def num_classes(model: nn.Module, head: Head) -> int | None:
    """How many values an integer label may take; None where it counts something else or nothing says it."""
    base = base_of(model)
    config = getattr(base, "config", None)
    if head.kind == "classes" or (
        head.kind == "tokens" and any("TokenClass" in c.__name__ for c in type(base).__mro__)
    ):
        count = int(getattr(base, "num_labels", 0) or getattr(config, "num_labels", 0))
        return count if count > 1 and getattr(config, "problem_type", None) in (None, SINGLE_LABEL) else None
    if head.kind in ("span", "choice") or head.by_shape:
        return None
    getter = getattr(base, "get_output_embeddings", lambda: None)
    rows = getattr(getattr(getter(), "weight", None), "shape", (0,))[0]
    return int(rows) or None


def base_of(model: nn.Module) -> Any:
    """The model itself, without peft's wrapper."""
    return getattr(model, "get_base_model", lambda: model)()


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes an argument of this name."""
    parameters = inspect.signature(base_of(model).forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _kind(name: str, base: Any) -> Kind | None:
    if name in _NOT_SHIFTED:
        return "tokens"
    kind = next((kind for suffix, kind in _SUFFIXES if name.endswith(suffix)), None)
    if kind == "next" and getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return "decoder"
    return kind
