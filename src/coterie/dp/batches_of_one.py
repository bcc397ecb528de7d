"""The engine against batches of one, by plain autograd, on a few synthetic records: once for every look of a batch.

Shape letters: B records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from coterie.dp.losses import IGNORED, Batch, checked
from coterie.dp.made_up import ONE_LABEL, PLAIN, FromExample, Made
from coterie.dp.probe import probe_sizes, synthetic_batch
from coterie.errors import NoRuleError

if TYPE_CHECKING:
    from coterie.dp.engine import Engine

_LENGTHS = (3, 2, 4, 1)
"""Of the records, in quarters, where there is padding: in no order that a model may sort them by."""

_SLIGHT = 1e-3
"""Share of a record's whole gradient below which a parameter's error does not count."""


class Look(NamedTuple):
    """What a batch shows besides keys, shapes and types.

    Attributes:
        padded: its attention mask leaves tokens out.
        unlabelled: some of its labels do not count.
    """

    padded: bool
    unlabelled: bool

    @classmethod
    def of(cls, batch: Batch) -> Look:
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        return cls(
            isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask == 0).any()),
            isinstance(labels, Tensor) and labels.ndim == 2 and bool((labels == IGNORED).any()),
        )


def compare_once(engine: Engine, like: Batch, look: Look, lowered: bool) -> None:
    """Norms and sums of every parameter against one record at a time, dropout off.

    Args:
        engine: its model is left as it was.
        like: only keys, shapes and types are used.
        look: of that batch; the synthetic records are padded and labelled in part as it is.
        lowered: the model computes in lower precision than its parameters are stored in.

    Raises:
        NoRuleError: they differ; the message names the parameter.
    """
    batch = _records(engine, like, look)
    count = len(_LENGTHS)
    with _evaluating(engine.model), torch.random.fork_rng(devices=[]):
        losses, alone = zip(*(_alone(engine, _only(batch, record)) for record in range(count)), strict=True)
        with torch.no_grad():
            beside = checked(engine.loss_fn(engine.model, batch), count).double().cpu()
        squares, names = engine.norms_by_parameter(batch)
        sums = engine.summed(batch)
    whole = torch.stack([torch.stack([_square(g) for g in one.values()]).sum() for one in alone]).sqrt()
    if not bool(torch.isfinite(whole).all()):
        return  # made-up records say nothing about this model; such records of the data contribute zero
    lost = torch.cat(losses)
    allowed = _allowed(engine, lowered)
    if bool(((beside - lost).abs() > 0.1 * allowed * lost.abs().clamp_min(1e-3)).any()):
        raise NoRuleError(
            f"A record's loss changes with the records beside it: {beside.tolist()} against {lost.tolist()} alone.",
            code="dp-batch-coupled",
            why="the gradient of one record then depends on others, and clipping per record bounds nothing",
            fix="leave out the balance (auxiliary) loss over the batch and divide by nothing that the batch decides",
        )
    for name, squares_B in zip(names, squares, strict=True):
        ours, right = squares_B.sqrt(), torch.stack([_square(one[name]) for one in alone]).sqrt()
        room = allowed * torch.maximum(right, _SLIGHT * whole)
        if not bool(((ours - right).abs() <= room).all()):
            numbers = f"{ours.tolist()} against {right.tolist()}"
            raise _disagreement(f"The per-sample norms of `{name}` disagree with batches of one: {numbers}.")
        both = sum(one[name] for one in alone)
        added = sums[name].double().cpu() if name in sums else torch.zeros_like(both)
        if not float(_square(added - both).sqrt()) <= float(room.sum()):
            raise _disagreement(f"The summed gradient of `{name}` disagrees with that of batches of one.")


def _records(engine: Engine, like: Batch, look: Look) -> Batch:
    """The synthetic records, with what is left out of them at the ends where the batch has it."""
    tokens = probe_sizes(engine.model)[0][1]
    seed = len(engine.shapes)
    lengths = [max(tokens * quarters // 4, 1) if look.padded else tokens for quarters in _LENGTHS]
    kinds = [ONE_LABEL if look.unlabelled and row == 1 else PLAIN for row in range(len(lengths))]
    made = [Made(length, seed + row, kind) for row, (length, kind) in enumerate(zip(lengths, kinds, strict=True))]
    if any(look):
        batch = FromExample(engine.model, like).batch(made)
        if batch is not None:
            return batch
    return synthetic_batch(engine.model, like, len(lengths), tokens, seed)


def _disagreement(what: str) -> NoRuleError:
    return NoRuleError(
        what,
        code="dp-self-check",
        where="a comparison with a few synthetic records, before the first batch",
        why="its gradient is not split by record as the engine assumes, so clipping would not bound it",
        fix="freeze that parameter, or report the model: this is a use that no rule describes",
    )


def _allowed(engine: Engine, lowered: bool) -> float:
    """Largest relative error that is rounding."""
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in engine.parameters.values())
    return 1e-3 if exact and not lowered and torch.get_float32_matmul_precision() == "highest" else 0.1


def _square(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum()


def _only(batch: Mapping[str, Any], record: int) -> dict[str, Any]:
    return {
        name: value[record : record + 1] if isinstance(value, Tensor) and value.ndim else value
        for name, value in batch.items()
    }


def _alone(engine: Engine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [1] and gradients of a batch of one, float64, zero where there is none."""
    loss = checked(engine.loss_fn(engine.model, batch), 1)
    found = torch.autograd.grad(loss.sum(), list(engine.parameters.values()), allow_unused=True)
    return loss.detach().double().cpu(), {
        name: torch.zeros(parameter.shape, dtype=torch.float64)
        if gradient is None
        else gradient.to_dense().double().cpu()
        for (name, parameter), gradient in zip(engine.parameters.items(), found, strict=True)
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before
