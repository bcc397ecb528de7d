"""Terms and models whose rows and gradients are of any size, and what must hold of one record's clipped sum.

The reference is plain autograd in float64, and sums written out in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.dp.clipping import Flat
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.scaling import UNSEEN
from coterie.dp.per_sample.stacked_terms import Segments, StackedOuter
from coterie.dp.per_sample.terms import Term
from helpers.engine_reference import gradients, norms, only, size


def assert_bounded(term: Term, exact_B: Tensor, clip: float = 1.0, rel: float = 1e-3) -> None:
    """Norms are right, and no record's sum exceeds ``clip`` after clipping, or is less by more than ``rel``.

    Args:
        term: of which both are asked.
        exact_B: [B, *shape] float64.
        clip: threshold.
        rel: what slack may take from a contribution.
    """
    exact = exact_B.flatten(1).norm(dim=1)
    for precise in (False, True):
        found = term.sq_norms(precise)
        assert bool((exact.square() <= (found.value + found.slack + UNSEEN) * (1 + 1e-5)).all())
    assert torch.allclose(found.value.sqrt(), exact, rtol=1e-4, atol=2.0**-30)
    factors = (clip / (found.upper + UNSEEN).sqrt()).clamp_max(1.0)
    for record in range(len(exact)):
        keep = torch.arange(len(exact)) == record
        out = torch.zeros(exact_B.shape[1:])
        term.masked(keep).add_sum(out, torch.where(keep, factors, 0.0))
        contribution, wanted = float(out.double().norm()), min(clip, float(exact[record]))
        assert contribution <= clip * (1 + 1e-5)
        assert contribution == pytest.approx(wanted, rel=rel, abs=1e-8)


def sized(generator: torch.Generator, rows: int, width: int, exponents: list[int]) -> Tensor:
    """Normal rows times powers of two."""
    exponent_R = torch.tensor([exponents[i % len(exponents)] for i in range(rows)], dtype=torch.float64)
    return (torch.randn(rows, width, generator=generator).double() * 2.0 ** exponent_R[:, None]).float()


def stacked_outer(
    x: Tensor, g: Tensor, expert_N: Tensor, records: int, transposed: bool, gathered: bool
) -> tuple[StackedOuter, Tensor]:
    """A term of three experts' weights, and [B, experts, O, I] float64 what it stands for.

    Args:
        x: [N, I] rows, those of a record together.
        g: [N, O] their gradients.
        expert_N: of each row.
        records: B.
        transposed: weights lie as [I, O].
        gathered: rows are given in their own order, and the order of experts beside them.
    """
    tokens = len(x) // records
    order = torch.sort(expert_N, stable=True).indices
    segments = Segments(order // tokens, torch.bincount(expert_N, minlength=3).cumsum(0), records)
    chosen = F.one_hot(expert_N, 3).double().view(records, tokens, 3)
    x_BTI, g_BTO = (rows.double().view(records, tokens, -1) for rows in (x, g))
    exact = torch.einsum("bte,bto,bti->beoi", chosen, g_BTO, x_BTI)
    exact = exact.mT if transposed else exact
    if gathered:
        return StackedOuter(x, g[order], segments, exact.shape[1:], transposed, order), exact
    return StackedOuter(x[order], g[order], segments, exact.shape[1:], transposed), exact


# Models whose rows and gradients are chosen in the batch: the gradient at the weight is ``c`` times ``x``.


class Linear(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return (F.linear(x, self.weight) * c).flatten(1).sum(1)


class Stacked(Linear):
    """The same weight as a stack of one, and of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(2, 16, 16))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        both = torch.stack([x, x.flip(1)], 1)
        return (torch.matmul(both, self.stack) * c.unsqueeze(1)).flatten(1).sum(1) + super().forward(x, c)


class Doubled(Linear):
    """Through an expression."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return (F.linear(x, 2.0 * self.weight) * c).flatten(1).sum(1)


class Twice(Linear):
    """Used as itself and transposed, and in a slice."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) + (x @ self.weight * c).flatten(1).sum(1) + (x * self.weight[0] * c).sum((1, 2))


class Biased(Linear):
    """Entries, biases, a norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.scale = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return (F.linear(x, self.weight, self.bias) * c).flatten(1).sum(1) + (x * self.scale * c).flatten(1).sum(1)


class Convolved(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(16, 16, 3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out = F.conv1d(x.mT, self.kernel, padding=1).mT
        return (out * c).flatten(1).sum(1) + super().forward(x, c)


class Tied(nn.Module):
    """A table that looks up and projects; ``x`` only says the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 16))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        ids = (x.abs().argmax(-1) + torch.arange(x.shape[1])) % 24
        return (F.linear(x, self.weight)[..., :16] * c + F.embedding(ids, self.weight) * c.flip(1)).flatten(1).sum(1)


SIZES = [
    (5e17, 2.4e-23),
    (2.0**-76, 2.0**58),
    (2.0**-100, 2.0**90),
    (1e30, 1e-38),
    (1e12, 1e22),
    (1e-30, 1e-8),
    (3e-39, 1e35),
]


def of_sizes(tokens: int, large: float, small: float, mixed: bool) -> dict[str, Tensor]:
    """Rows of one size and gradients of the other; ``mixed``: every other row the other way round."""
    generator = torch.Generator().manual_seed(tokens)
    x, c = (torch.randn(2, tokens, 16, generator=generator).double() for _ in range(2))
    turn = (torch.arange(tokens) % 2 == 1).view(1, -1, 1) & mixed
    return {
        "x": (x * torch.where(turn, small, large)).float(),
        "c": (c * torch.where(turn, large, small)).float(),
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"], batch["c"])  # type: ignore[no-any-return]


def assert_clipped(
    model: nn.Module, batch: dict[str, Tensor], loss: Callable[..., Tensor], method: Any, rel: float = 1e-3
) -> None:
    """One record at a time and all together, contributions and norms are those of float64."""
    exact_model = copy.deepcopy(model).double()
    exact = norms(
        gradients(exact_model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}, loss)
    )
    engine = Engine(model, loss, Flat(1.0), method=method)
    together = engine.accumulate(batch)
    engine.take()
    for record in range(len(exact)):
        figures = engine.accumulate(only(batch, record))
        contribution, wanted = size(engine.take()), min(1.0, float(exact[record]))
        assert contribution <= 1 + engine.eta
        assert bool(figures.masked[0]) == bool(exact[record] > 2.0**126)  # two rows that are large meet
        if figures.masked[0]:
            assert contribution == 0.0
            continue
        assert contribution == pytest.approx(wanted, rel=rel, abs=1e-8)
        assert float(figures.norms[0]) == pytest.approx(float(exact[record]), rel=1e-4, abs=1e-8)
        assert float(together.norms[record]) == pytest.approx(float(exact[record]), rel=1e-4, abs=1e-8)
