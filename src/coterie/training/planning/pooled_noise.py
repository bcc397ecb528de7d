"""What pooled noise is worth, before anybody starts: how much each party adds, and what holds against how many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from coterie.config import FederationConfig, PrivacyRules
from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.noise.pooled import PooledNoise
from coterie.training.planning.equal_rates import lot_plan

_STEPS = 10
"""Halvings of the sampling rate's interval: the rate comes out to a thousandth."""


@dataclass(frozen=True)
class NoiseRow:
    """One choice of how the parties add noise.

    Attributes:
        colluding: t; None for whole noise, where the promise holds against all others together.
        factor: noise in the sum of all parties, over that of one party's text alone under the same promise.
        epsilon: against any t of the others.
        epsilon_one: against one other party alone.
        epsilon_all: against all others together; None where it is without bound.
    """

    colluding: int | None
    factor: float
    epsilon: float
    epsilon_one: float
    epsilon_all: float | None


@dataclass(frozen=True)
class NoiseTable:
    """What the agreed noise is worth.

    Attributes:
        rows: one for whole noise and one for every t; empty where nothing can be said.
        remarks: what the figures are for, or why there are none, a sentence each.
    """

    rows: tuple[NoiseRow, ...] = ()
    remarks: tuple[str, ...] = ()


def noise_table(federation: FederationConfig, units: Mapping[str, int] | None = None) -> NoiseTable:
    """A row for whole noise and for every t, for a party whose budget the agreed noise just keeps.

    How often a record is drawn is each party's own; the rate here is the largest that the agreed noise allows, so a
    party with a smaller one spends less in every column. Truncated lots cost as much more as a party has few records,
    so these have to be known; the figures are then the largest of all parties'. Empty where no noise was agreed on,
    or others see a party's own.

    Args:
        federation: its settings.
        units: N of every party, records or users; empty: nobody said.
    """
    rules, sigma = federation.privacy, federation.noise_multiplier
    if not isinstance(rules, PrivacyRules) or sigma is None or federation.trunk != "shared":
        return NoiseTable()
    if rules.sampler != "poisson":
        if not units:
            return NoiseTable(remarks=(
                "what the noise holds against depends on every party's number of records, as lots are truncated: say "
                "it with --records",
            ))  # fmt: skip
        if any(federation.lot_of(party) > count for party, count in units.items()):
            return NoiseTable(remarks=("the lots of now do not fit: a party has too few records",))
        lots = [lot_plan(rules, count, federation.lot_of(party)) for party, count in units.items()]
        said = "epsilon: the largest of the parties', with their lots of now"
        return NoiseTable(_rows(federation, rules, [plan.mechanism(sigma) for plan in lots]), (said,))
    rate = _largest_rate(sigma, rules, federation.train.rounds)
    if rate is None:
        return NoiseTable(remarks=(
            f"noise_multiplier {sigma:g} keeps epsilon {rules.epsilon:g} in {federation.train.rounds} rounds for no "
            "lot of a thousandth of the records or more: `coterie up` will refuse it and name one that does",
        ))  # fmt: skip
    said = "epsilon: for the largest lot that the noise allows"
    if rate == 1:
        said = "epsilon: for lots of all records; so much noise is more than any lot needs"
    return NoiseTable(_rows(federation, rules, [Mechanism(sigma, rate)]), (said,))


def _rows(federation: FederationConfig, rules: PrivacyRules, lots: Sequence[Mechanism]) -> tuple[NoiseRow, ...]:
    parties, rounds = len(federation.parties), federation.train.rounds

    @cache
    def spent(unknown: float) -> float:
        left = {replace(own, noise_multiplier=own.noise_multiplier * unknown) for own in lots}
        return max(epsilon([(own, rounds)], rules.delta) for own in left)

    def against(pooled: PooledNoise, others: int) -> float:
        return spent(pooled.unknown(others))

    rows = []
    for colluding in (None, *range(1, parties)):
        pooled = PooledNoise(parties, colluding)
        worst = against(pooled, parties - 1)
        rows.append(
            NoiseRow(
                colluding,
                math.sqrt(parties) * pooled.share,
                against(pooled, parties - 1 if colluding is None else colluding),
                against(pooled, 1),
                worst if math.isfinite(worst) else None,
            )
        )
    return tuple(rows)


def _largest_rate(sigma: float, rules: PrivacyRules, rounds: int) -> float | None:
    """The largest sampling rate at which so much noise keeps the budget, to a thousandth; None where none does."""
    low, high = 0.0, 1.0
    if epsilon([(Mechanism(sigma, high), rounds)], rules.delta) <= rules.epsilon:
        return high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if epsilon([(Mechanism(sigma, middle), rounds)], rules.delta) <= rules.epsilon:
            low = middle
        else:
            high = middle
    return low or None
