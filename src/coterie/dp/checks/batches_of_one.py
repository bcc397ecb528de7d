"""An engine beside plain autograd, one record at a time: what both comparisons of made-up records are made of.

`compare_once` is the short one, before an engine's first batch; `coterie.dp.checks.comparison` is the thorough one,
before training.

Shape letters: B records, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from coterie.dp.checks.made_up import ONE_LABEL, PLAIN, FromExample, SyntheticRecord
from coterie.dp.losses import IGNORED, Batch, LossFunction, checked
from coterie.dp.per_sample.probe import probe_sizes, synthetic_batch
from coterie.errors import NoRuleError
from coterie.models.spread.spread import at_home

Gradient = dict[str, Tensor]

FLOOR = 1e-3
"""A parameter's norm below this part of the whole cannot move it, and keeps little precision of its own."""

_LENGTHS = (3, 2, 4, 1)
"""Of the records, in quarters, where there is padding: in no order that a model may sort them by."""


class Compared(Protocol):
    """What is compared of an engine."""

    model: nn.Module
    loss_fn: LossFunction
    parameters: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size]
    lent_shapes: dict[str, torch.Size]

    def norms_by_parameter(self, batch: Batch) -> tuple[Tensor, list[str]]: ...

    def summed(self, batch: Batch, factors_B: Tensor | None = None) -> Gradient: ...


class BatchesOfOne:
    """One engine and its model, a record at a time.

    Args:
        engine: with the model.
        allowed: largest relative error of a parameter's norm that counts as agreement.
        where: of refusals.
    """

    def __init__(self, engine: Compared, allowed: float, where: str) -> None:
        self.engine = engine
        self.allowed = allowed
        self._where = where

    def alone(self, one: Batch) -> tuple[float, Gradient]:
        """Loss and gradient of a batch of one by plain autograd; of lent weights by the engine."""
        if self.engine.lent_shapes:
            with torch.no_grad():
                loss = checked(self.engine.loss_fn(self.engine.model, one), 1)
            return float(loss), self.engine.summed(one)
        loss = checked(self.engine.loss_fn(self.engine.model, one), 1)
        return float(loss.detach()), self.autograd(loss.sum())

    def autograd(self, loss: Tensor) -> Gradient:
        """Gradients of the parameters that a loss depends on."""
        names = list(self.engine.parameters)
        gradients = torch.autograd.grad(loss, list(self.engine.parameters.values()), allow_unused=True)
        return {name: g.to_dense() for name, g in zip(names, gradients, strict=True) if g is not None}

    def same_loss(self, ours: float, theirs: float) -> bool:
        """Whether two losses of one record agree."""
        return abs(ours - theirs) <= 0.1 * self.allowed * max(abs(theirs), 1e-3)

    def near(self, ours: Gradient, theirs: Gradient) -> bool:
        """Whether two gradients of one record agree in every parameter."""
        whole = norm(theirs)
        return ours.keys() == theirs.keys() and all(
            square(ours[name].double() - g.double()) ** 0.5 <= self.allowed * max(square(g) ** 0.5, FLOOR * whole)
            for name, g in theirs.items()
        )

    def norm_errors(self, squares_PB: Tensor, reference_PB: Tensor) -> Tensor:
        """[P, B] relative errors of norms, from squared norms of the engine and of batches of one."""
        ours, theirs = squares_PB.sqrt(), reference_PB.sqrt()
        scale = torch.maximum(theirs, FLOOR * theirs.square().sum(0).sqrt()).clamp_min(
            torch.finfo(torch.float32).tiny
        )
        return ((ours - theirs).abs() / scale).nan_to_num(torch.inf)

    def wrong_norm(self, name: str, squares_B: Tensor, reference_B: Tensor) -> NoRuleError:
        """The refusal of a parameter whose norms disagree."""
        ours, theirs = squares_B.sqrt().tolist(), reference_B.sqrt().tolist()
        return self._disagreement(
            f"The per-sample norms of `{name}` disagree with batches of one: {ours} against {theirs}.",
            "its gradient is not split by record as the engine assumes, so clipping would not bound it",
        )

    def wrong_sum(self, sums: Mapping[str, Tensor], expected: Gradient) -> NoRuleError | None:
        """The refusal of a sum that is not that of the gradients of batches of one; None where all agree."""
        whole = norm(expected)
        for name in self.engine.shapes:
            pair = (sums.get(name), expected.get(name))
            ours, theirs = (torch.zeros(()) if x is None else x.detach().double().cpu() for x in pair)
            if not float((ours - theirs).norm()) <= self.allowed * max(float(theirs.norm()), FLOOR * whole):
                return self._disagreement(
                    f"The summed gradient of `{name}` disagrees with batches of one: "
                    f"norm {float(ours.norm()):.6g} against {float(theirs.norm()):.6g}.",
                    "what is added is not what was measured, so clipping would not bound it",
                )
        return None

    def coupled(
        self, what: str, beside: float | None = None, alone: float | None = None, otherwise: str = "alone"
    ) -> NoRuleError:
        """The refusal of a loss or gradient that follows the records beside it."""
        figures = "" if beside is None else f" ({beside:.6f} beside others, {alone:.6f} {otherwise})"
        return NoRuleError(
            f"A record's {what} changes with the records beside it{figures}.",
            code="dp-batch-coupled",
            where=self._where,
            why="the gradient of one record then depends on others, and clipping per record bounds nothing",
            fix="leave out what mixes the records of a batch: a balance (auxiliary) loss over it (coterie's "
            "`balance` settings offer private replacements), statistics of it, mixup, expert capacity over it, a "
            "division by something that the batch decides, such as its number of tokens",
        )

    def _disagreement(self, what: str, why: str) -> NoRuleError:
        return NoRuleError(
            what,
            code="dp-self-check",
            where=self._where,
            why=why,
            fix="freeze that parameter, or report the model: this is a use that no rule describes",
        )


class RecordsAlone:
    """Gradients of several records alone: the norms that are right, and a sum in which each has its own factor."""

    def __init__(self, names: Sequence[str], records: int) -> None:
        self.factors = [0.5**column for column in range(records)]
        self.squares_PB = torch.zeros(len(names), records, dtype=torch.float64)
        self.total: Gradient = {}
        self._names = names

    def add(self, column: int, gradient: Gradient) -> None:
        """Take one record's gradient, which is emptied on the way."""
        for place, name in enumerate(self._names):
            if name in gradient:
                g = gradient.pop(name).detach()
                self.squares_PB[place, column] = square(g)
                scaled = g.to(torch.promote_types(g.dtype, torch.float32)) * self.factors[column]
                self.total[name] = self.total[name].add_(scaled) if name in self.total else scaled


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


def compare_once(engine: Compared, like: Batch, look: Look, lowered: bool) -> None:
    """Norms and sums of every parameter against one record at a time, on a few made-up records, dropout off.

    Args:
        engine: its model is left as it was.
        like: only keys, shapes and types are used.
        look: of that batch; the synthetic records are padded and labelled in part as it is.
        lowered: the model computes in lower precision than its parameters are stored in.

    Raises:
        NoRuleError: they differ; the message names the parameter.
    """
    batch, count = _records(engine, like, look), len(_LENGTHS)
    where = "a comparison with a few synthetic records, before the first batch"
    check = BatchesOfOne(engine, allowed(engine, lowered), where)
    with in_mode(engine.model, training=False), torch.random.fork_rng(devices=[]), at_home(engine.model):
        singles = [check.alone(only(batch, record)) for record in range(count)]
        with torch.no_grad():
            beside = checked(engine.loss_fn(engine.model, batch), count).double().tolist()
        squares_PB, names = engine.norms_by_parameter(batch)
        alone = RecordsAlone(names, count)
        sums = engine.summed(batch, torch.tensor(alone.factors))
    for record, (_, gradient) in enumerate(singles):
        alone.add(record, gradient)
    if not bool(torch.isfinite(alone.squares_PB).all()):
        return  # made-up records say nothing about this model; such records of the data contribute zero
    for ours, (theirs, _) in zip(beside, singles, strict=True):
        if not check.same_loss(ours, theirs):
            raise check.coupled("loss", ours, theirs)
    errors_PB = check.norm_errors(squares_PB, alone.squares_PB)
    worst = int(errors_PB.amax(1).argmax())
    if float(errors_PB[worst].max()) > check.allowed:
        raise check.wrong_norm(names[worst], squares_PB[worst], alone.squares_PB[worst])
    wrong = check.wrong_sum(sums, alone.total)
    if wrong is not None:
        raise wrong


def _records(engine: Compared, like: Batch, look: Look) -> Batch:
    """The synthetic records, with what is left out of them at the ends where the batch has it."""
    tokens = probe_sizes(engine.model)[0][1]
    seed = len(engine.shapes)
    lengths = [max(tokens * quarters // 4, 1) if look.padded else tokens for quarters in _LENGTHS]
    kinds = [ONE_LABEL if look.unlabelled and row == 1 else PLAIN for row in range(len(lengths))]
    records = [
        SyntheticRecord(length, seed + row, kind)
        for row, (length, kind) in enumerate(zip(lengths, kinds, strict=True))
    ]
    if any(look):
        batch = FromExample(engine.model, like).batch(records)
        if batch is not None:
            return batch
    return synthetic_batch(engine.model, like, len(lengths), tokens, seed)


def square(g: Tensor) -> float:
    """The squared norm, in float64."""
    return float(g.double().square().sum())


def norm(gradient: Gradient) -> float:
    """The norm of a whole gradient."""
    return float(sum(square(g) for g in gradient.values()) ** 0.5)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in train mode, as a private round runs it, or in eval mode; then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


def coarsest(model: nn.Module) -> torch.dtype:
    """The number format that rounds most of what the model computes, frozen weights' too: adapters in float32 on
    weights in half precision are no more exact than those weights."""
    found = (p.dtype for p in model.parameters() if p.is_floating_point())
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of a parameter's norm that counts as agreement."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1


def allowed(engine: Compared, lowered: bool) -> float:
    """Largest relative error that is rounding; ``lowered`` as for `compare_once`."""
    full = not lowered and torch.get_float32_matmul_precision() == "highest"
    return tolerance(coarsest(engine.model) if full else torch.bfloat16)


def only(batch: Mapping[str, Any], record: int) -> dict[str, Any]:
    """One record of a batch."""
    return {
        name: value[record : record + 1] if isinstance(value, Tensor) and value.ndim else value
        for name, value in batch.items()
    }
