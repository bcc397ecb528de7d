"""Per-sample losses. A loss is [B]: it never averages over the batch, and never over the batch's tokens.

Shape letters: B records, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    """Each record's own loss, [B] float32.

    Causal LM: mean next-token cross-entropy over the record's labels that are not -100 and follow a token that is not
    masked (0 if it has none).
    Encoder-decoder and masked LM: the same without the shift. Sequence classification: cross-entropy, or binary
    cross-entropy for labels of several classes, or squared error for one.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise PrivacyError(
            "The batch has no `labels`.",
            code="dp-batch",
            why="the default loss compares the model's output with them",
            fix="let the collator add labels, or pass a loss_fn(model, batch) that returns one loss per record",
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = _shifted_right(labels, config)
        return token_loss(_logits(model, inputs), labels)
    logits = _logits(model, inputs)
    if logits.ndim == 2:
        return classification_loss(logits, labels)
    if _is_masked_lm(model):
        return token_loss(logits, labels)
    mask, following = inputs.get("attention_mask"), labels[:, 1:]
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        # What follows padding on the left is predicted from padding, whose length the records beside it decide.
        following = following.masked_fill(mask[:, :-1] == 0, IGNORED)
    return token_loss(logits[:, :-1], following)


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    if getattr(getattr(model, "config", None), "use_cache", False):
        inputs = {**inputs, "use_cache": False}
    logits: Tensor = model(**inputs).logits
    return logits


def _shifted_right(labels: Tensor, config: Any) -> Tensor:
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.pad_token_id
    shifted = torch.cat([labels.new_full((labels.shape[0], 1), start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)


def _is_masked_lm(model: nn.Module) -> bool:
    base = getattr(model, "get_base_model", lambda: model)()
    return type(base).__name__.endswith("ForMaskedLM")


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of each record over its own labels that are not -100. [B] float32."""
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    counted = (labels_BT != IGNORED).sum(1).clamp_min(1)
    return losses.view(labels_BT.shape).sum(1) / counted


def classification_loss(logits_BC: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for class numbers [B], binary cross-entropy for [B, C], squared error for one output. [B]."""
    logits_BC = logits_BC.float()
    if logits_BC.shape[1] == 1:
        return (logits_BC.squeeze(1) - labels.view(-1).float()).square()
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits_BC, labels.float(), reduction="none").mean(1)
    return F.cross_entropy(logits_BC, labels, reduction="none")


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
