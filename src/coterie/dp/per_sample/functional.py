"""Per-sample norms and clipped sums of any model, in one call."""

from __future__ import annotations

from torch import Tensor, nn

from coterie.dp.clipping import Flat
from coterie.dp.losses import Batch, LossFunction
from coterie.dp.per_sample.engine import Engine
from coterie.dp.refusals import check_model


def per_sample_norms(model: nn.Module, batch: Batch, loss_fn: LossFunction | None = None) -> Tensor:
    """The gradient norm of each record, over all trainable parameters together.

    Args:
        model: any model; parameters that require a gradient count. It is left as it was.
        batch: as a Hugging Face collator makes it, tensors [B, ...].
        loss_fn: ``loss_fn(model, batch) -> [B]``; default: mean next-token cross-entropy of each record.

    Returns:
        [B] float32, in units of the loss gradient.

    Raises:
        NoRuleError: a trainable parameter is used in a way that cannot be split by record, or a few made-up
            records disagree with batches of one.

    Guarantee: entry b is the norm that record b has in a batch of its own (relative error at most 1e-5 in float32).
    Cost: three tiny probe passes in each mode and a comparison of four records, then one forward and one backward.
    Keep an `Engine` to pay for the probes once.
    """
    return Engine(model, loss_fn).norms(batch).float()


def clipped_sum(
    model: nn.Module, batch: Batch, clip_norm: float, loss_fn: LossFunction | None = None
) -> dict[str, Tensor]:
    """``sum_b min(1, C / ||g_b||) g_b`` over the records of a batch. It has no noise: it is not private.

    Args:
        model: see `per_sample_norms`.
        batch: see `per_sample_norms`.
        clip_norm: C > 0.
        loss_fn: see `per_sample_norms`.

    Returns:
        Parameter name to float32 tensor, zero for parameters without a gradient.

    Raises:
        PrivacyError: C is not positive, or the loss is not one number per record.
        NoRuleError: see `per_sample_norms`; the model mixes records by construction (batch normalisation, expert
            capacity over the batch, experts that choose tokens).

    Compared here with batches of one: four made-up records in eval mode, padded and labelled in part if the batch is.
    Not checked, as `make_private` does: other lengths, train mode. The guarantee is for models and losses that keep
    records apart.

    Guarantee: adding or removing one record moves the sum by at most ``C * (1 + Engine.eta)`` in the L2 norm; a
        record whose gradient is not finite contributes zero.
    """
    check_model(model)
    engine = Engine(model, loss_fn, Flat(clip_norm), method="book_keeping")
    engine.accumulate(batch)
    return engine.take()
