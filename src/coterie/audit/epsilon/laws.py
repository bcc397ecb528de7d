"""The law of a run's noise, as its ledger entry names it, from public numbers alone.

Written down a second time on purpose: the engine's own standard deviation is what is under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coterie.audit.epsilon.rehearsal import Rehearsal
from coterie.audit.epsilon.subject import Claim
from coterie.dp.noise.joint_noise import LOAD, WITHIN

_GRID = 2.0**24
"""Steps of the public grid in one standard deviation."""


class NoiseLaw(Protocol):
    """How the noise of a run's rounds is distributed.

    Another law (noise shared between parties, noise that takes back part of earlier rounds' noise) is another class:
    all that checks and epsilons need of it is here.
    """

    @property
    def sentence(self) -> str:
        """What the law says, for people."""

    def residuals(self, noises: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What is independent standard Gaussian everywhere if the law holds, from the noise of rounds in a row."""

    def contribution(self, difference: Mapping[str, Tensor]) -> float:
        """How far one unit moved the sums, over C: at most 1 + slack."""

    @property
    def slack(self) -> float:
        """What rounding may add to a contribution, as a share of C; the noise covers it."""


@dataclass(frozen=True)
class Independent:
    """Fresh discrete Gaussian noise on a public grid for every value of every round.

    A step of the grid is 2^-24 of the standard deviation, far below what any number of values here resolves, so it is
    compared with the continuous Gaussian.

    Attributes:
        std: of a released tensor, by its name.
        sigma: noise multiplier of what the party itself adds in a round.
        slack: see `NoiseLaw`.
        shared: the noise that several parties' shares add up to, in words; empty where this party adds it whole.
    """

    std: Callable[[str], float]
    sigma: float
    slack: float
    shared: str = ""

    @property
    def sentence(self) -> str:
        own = f", this party's share of {self.shared}" if self.shared else ""
        return (
            f"independent Gaussian noise of {self.sigma:.4g} times what one record may add{own}, anew in every round"
        )

    def residuals(self, noises: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [{name: value / self.std(name) for name, value in noise.items()} for noise in noises]

    def contribution(self, difference: Mapping[str, Tensor]) -> float:
        squares = [
            float(value.double().square().sum()) / self.std(name) ** 2 for name, value in sorted(difference.items())
        ]
        return self.sigma * math.sqrt(math.fsum(squares)) * (1 + self.slack)


@dataclass(frozen=True)
class Banded:
    """Noise of which every round takes back part of earlier rounds' noise (BandMF, arXiv:2306.08153).

    What rounds are learnt from holds C^-1 Z: Z is fresh noise as in `Independent`, C the banded matrix of the
    coefficients. C times the noise of rounds in a row, from the first on, has to be independent again.

    Attributes:
        fresh: the law of Z, whose standard deviations pay for rounding in every row of a column.
        coefficients: the diagonals of C, from the main one down.
    """

    fresh: Independent
    coefficients: tuple[float, ...]

    @property
    def sentence(self) -> str:
        return (
            f"Gaussian noise of {self.fresh.sigma:.4g} times what one record may add, of which each round takes back "
            f"part of up to {len(self.coefficients) - 1} rounds before it"
        )

    @property
    def slack(self) -> float:
        return self.fresh.slack

    def residuals(self, noises: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        mixed: list[dict[str, Tensor]] = []
        for row in range(len(noises)):
            past = [noises[row - back] for back in range(min(row + 1, len(self.coefficients)))]
            weighed = list(zip(self.coefficients, past, strict=False))
            mixed.append(
                {name: torch.stack([c * noise[name].double() for c, noise in weighed]).sum(0) for name in noises[row]}
            )
        return self.fresh.residuals(mixed)

    def contribution(self, difference: Mapping[str, Tensor]) -> float:
        column = math.sqrt(math.fsum(each**2 for each in self.coefficients))
        return column * self.fresh.contribution(difference)


def law_of(claim: Claim, rehearsal: Rehearsal) -> NoiseLaw:
    """The law that a claim names; of noise in bands by what the ledger says of them."""
    if claim.mechanism.bands == 1:
        return independent(claim, rehearsal)
    return Banded(independent(claim, rehearsal), claim.bands)


def independent(claim: Claim, rehearsal: Rehearsal) -> Independent:
    """Fresh noise of a claim: sum over released parts of (bound / standard deviation)^2 is 1 / sigma^2.

    Args:
        claim: its sigma and C.
        rehearsal: says what is released and how many values.
    """
    engine, plan = rehearsal.engine, rehearsal.opened.plan
    sigma, values = claim.own_noise, {n: math.prod(shape) for n, shape in engine.shapes.items()}
    slack = engine.eta if claim.eta is None else claim.eta
    bands = claim.mechanism.bands
    on_grid = plan.isolation == "exact" and bands == 1
    shares = {LOAD: plan.balance.load_share**2 if rehearsal.balance_bound else 0.0}
    shares[WITHIN] = plan.adaptive_share**2 if plan.adaptive_quantile is not None else 0.0
    rest = 1 - sum(shares.values())

    def std(bound: float, share: float, count: int) -> float:
        multiplier = sigma / math.sqrt(share)
        rounding = 0.0 if on_grid else multiplier * math.sqrt(count * bands) * (1 + 2**-10) / _GRID
        return multiplier * bound / (1 - rounding)

    found: dict[str, float] = {}
    if shares[LOAD]:
        found[LOAD] = std(rehearsal.balance_bound * (1 + 1e-6), shares[LOAD], rehearsal.balance_values)
    if shares[WITHIN]:
        found[WITHIN] = std(0.5 * math.sqrt(len(engine.groups)), shares[WITHIN], len(engine.groups))
        bound = claim.clip_norm / math.sqrt(len(engine.groups)) * (1 + slack)
        for group in engine.groups:
            inside = [name for name in values if engine.group_of(name) == group]
            each = std(bound, rest / len(engine.groups), sum(values[name] for name in inside))
            found |= dict.fromkeys(inside, each)
    else:
        found |= dict.fromkeys(values, std(claim.clip_norm * (1 + slack), rest, sum(values.values())))
    whole = claim.mechanism.noise_multiplier
    return Independent(found.__getitem__, sigma, slack, f"{whole:.4g}" if sigma < whole else "")
