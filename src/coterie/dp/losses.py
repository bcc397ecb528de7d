"""Per-sample losses. A loss is [B]: it never averages over the batch, and never over the batch's tokens.

Shape letters: B records, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.dp.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TARGETS, accepts, base_of, head_of
from coterie.errors import PrivacyError

Batch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Batch], Tensor]

IGNORED = -100


def batch_size(batch: Batch) -> int:
    """B, from the tensors' common first dimension.

    Raises:
        PrivacyError: no tensor in the batch, or tensors that disagree.
    """
    sizes = {name: value.shape[0] for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "no tensor"
        raise PrivacyError(
            f"The batch does not say how many records it has: {found}.",
            code="dp-batch",
            why="clipping per record needs every tensor to have the records in its first dimension",
            fix="make the collator return tensors [records, ...] of one first dimension",
        )
    return next(iter(sizes.values()))


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Each record's own loss, [B] float32: what the model's own loss is on a batch of that record alone.

    The head decides (`heads.head_of`), by the model's class. Causal LM: mean next-token cross-entropy over the
    record's labels that are not -100 and follow a token that is not masked (0 if it has none). Encoder-decoder,
    masked LM and token classification: the same without the shift. Classification: what ``config.problem_type`` says,
    or as transformers infers it. Question answering: mean of the two ends' cross-entropies over tokens that are not
    masked. Multiple choice and next sentence: cross-entropy. Auxiliary (balance) losses over the batch are left out.

    Raises:
        PrivacyError: a head whose loss is not one of these, or labels that do not fit it.
    """
    head = head_of(model)
    targets = {name: batch.get(name) for name in head.targets}
    missing = [name for name, value in targets.items() if not isinstance(value, Tensor)]
    if missing:
        raise PrivacyError(
            f"The batch has no `{missing[0]}`.",
            code="dp-batch",
            why="the default loss compares the model's output with them",
            fix=f"let the collator add {', '.join(head.targets)} (`labels` for most heads), or pass a "
            "loss_fn(model, batch) that returns one loss per record",
        )
    inputs = {name: value for name, value in batch.items() if name not in TARGETS}
    if head.kind == "span":
        return _span_loss(outputs_of(model, inputs), batch)
    labels = targets["labels"]
    assert isinstance(labels, Tensor)
    if head.kind == "decoder" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _decoder_inputs(model, labels)
    logits: Tensor = outputs_of(model, inputs).logits
    if head.kind == "classes" or (head.kind == "next" and head.by_shape and logits.ndim == 2):
        return classification_loss(logits, labels, problem_type(model, logits, labels))
    if head.kind == "choice":
        return classification_loss(logits, labels, SINGLE_LABEL)
    if labels.ndim != 2 or logits.ndim != 3:
        raise _misfit(labels, logits, "one label for each token [B, T]")
    if head.kind != "next":
        return token_loss(logits, labels)
    return token_loss(logits[:, :-1], next_tokens(labels, inputs.get("attention_mask")))


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """What a model makes of inputs, without a cache of keys and values."""
    if getattr(getattr(model, "config", None), "use_cache", False) and accepts(model, "use_cache"):
        inputs = {**inputs, "use_cache": False}
    return model(**inputs)


def _decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """The decoder sees the labels one place later: by the model's own rule, where it has one."""
    own = getattr(base_of(model), "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        made: Tensor = own(labels=labels)
        return made
    config: Any = base_of(model).config
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
    shifted = torch.cat([labels.new_full((labels.shape[0], 1), start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)


def _span_loss(outputs: Any, batch: Batch) -> Tensor:
    """[B]: half the sum of both ends' cross-entropies. A token that the mask leaves out is no answer."""
    mask = batch.get("attention_mask")
    ends = []
    for logits_BT, name in ((outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions")):
        positions_B = batch[name].view(-1)
        logits = logits_BT.float()
        if isinstance(mask, Tensor) and mask.shape == logits.shape:
            logits = logits.masked_fill(mask == 0, float("-inf"))
        ends.append(F.cross_entropy(logits, positions_B, reduction="none"))
    return (ends[0] + ends[1]) / 2


def check_own_loss(model: nn.Module, batch: Batch) -> None:
    """Compare `default_loss` with the model's own loss on a batch of one made-up record, in eval mode.

    Raises:
        PrivacyError: they differ, so the head has a loss of its own under a common name.
    """
    if head_of(model).by_shape:
        return
    config = getattr(base_of(model), "config", None)
    stated = getattr(config, "problem_type", None)
    more = {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ours = default_loss(model, batch)
            own = getattr(model(**batch, **more), "loss", None)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return  # the model's own loss takes other labels; `default_loss` has said what it needs
    finally:
        model.train(training)
        if config is not None:
            config.problem_type = stated  # transformers writes down what it inferred
    if not isinstance(own, Tensor) or own.numel() != 1 or not bool(torch.isfinite(own).all()):
        return
    close = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.05
    if not abs(float(ours) - float(own)) <= close * max(1.0, abs(float(own))):
        raise PrivacyError(
            f"The default loss is not what {type(base_of(model)).__name__} itself computes.",
            code="dp-loss-head",
            where="a made-up record, before training",
            why="the model would be trained towards something else than its head is for",
            fix="pass loss_fn(model, batch), which returns one loss per record",
        )


def next_tokens(labels_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """What each place but the last has to predict: [B, T-1], -100 where nothing counts.

    Args:
        labels_BT: of the same places as the model's input.
        mask_BT: 0 where the input is padding; of another shape it is not looked at.
    """
    following = labels_BT[:, 1:]
    if isinstance(mask_BT, Tensor) and mask_BT.shape == labels_BT.shape:
        # What follows padding on the left is predicted from padding, whose length the records beside it decide.
        following = following.masked_fill(mask_BT[:, :-1] == 0, IGNORED)
    return following


def summed_token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of each record over its labels that are not -100, and their number. [B] float32, int64."""
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels_BT.shape).sum(1), (labels_BT != IGNORED).sum(1)


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of each record over its own labels that are not -100. [B] float32."""
    losses_B, counted_B = summed_token_losses(logits_BTV, labels_BT)
    return losses_B / counted_B.clamp_min(1)


def problem_type(model: nn.Module, logits_BC: Tensor, labels: Tensor) -> str:
    """What a classifier's loss is: ``config.problem_type``, or what transformers infers where it is absent."""
    stated = getattr(getattr(base_of(model), "config", None), "problem_type", None)
    if stated is not None:
        return str(stated)
    if logits_BC.shape[-1] == 1:
        return REGRESSION
    return MULTI_LABEL if labels.is_floating_point() and labels.ndim == 2 else SINGLE_LABEL


def classification_loss(logits_BC: Tensor, labels: Tensor, problem: str) -> Tensor:
    """[B]: cross-entropy of class numbers, or the record's mean binary cross-entropy or squared error over outputs.

    Args:
        logits_BC: [B, C].
        labels: class numbers [B] (or [B, 1]); targets [B, C], or [B] where C is 1.
        problem: a `problem_type`.

    Raises:
        PrivacyError: labels of another shape or kind.
    """
    logits_BC = logits_BC.float()
    if logits_BC.ndim != 2 or problem not in (REGRESSION, MULTI_LABEL, SINGLE_LABEL):
        raise _misfit(labels, logits_BC, f"one row of outputs a record and a known problem_type, not `{problem}`")
    if problem == SINGLE_LABEL:
        if labels.numel() != labels.shape[0] or labels.is_floating_point():
            raise _misfit(labels, logits_BC, "one class number (integer) a record [B]")
        return F.cross_entropy(logits_BC, labels.view(-1).long(), ignore_index=IGNORED, reduction="none")
    if labels.numel() != logits_BC.numel():
        raise _misfit(labels, logits_BC, "a target for each output [B, C]")
    targets_BC = labels.view(logits_BC.shape).float()
    if problem == REGRESSION:
        return (logits_BC - targets_BC).square().mean(1)
    return F.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none").mean(1)


def _misfit(labels: Tensor, logits: Tensor, wanted: str) -> PrivacyError:
    return PrivacyError(
        f"`labels` {list(labels.shape)} ({labels.dtype}) do not fit outputs {list(logits.shape)}: it takes {wanted}.",
        code="dp-labels",
        why="a loss against other labels than the model's own would train something else than asked for",
        fix="prepare labels as the model's documentation says, set config.problem_type for a classifier "
        "(regression, single_label_classification, multi_label_classification), or pass a loss_fn",
    )


def checked(losses: Any, records: int) -> Tensor:
    """The loss function's result, if it is one number per record.

    Raises:
        PrivacyError: it is one number for the batch, or has another shape.
    """
    if isinstance(losses, Tensor) and losses.shape == (records,):
        return losses
    shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    raise PrivacyError(
        f"The loss function returned {shape} for a batch of {records} records; it must return [{records}].",
        code="dp-loss-shape",
        why="a loss averaged over the batch cannot be split by record, so no record could be clipped",
        fix="return one loss per record: cross_entropy(..., reduction='none') summed per record; never pass "
        "`labels` to the Hugging Face model, whose loss is a mean over the batch",
    )
