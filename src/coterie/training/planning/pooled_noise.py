"""What pooled noise is worth, before anybody starts: how much each party adds, and what holds against how many."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from coterie.config import FederationConfig, PrivacyRules
from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.noise.pooled import PooledNoise

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


def noise_table(federation: FederationConfig) -> list[NoiseRow]:
    """A row for whole noise and for every t, for a party whose budget the agreed noise just keeps.

    How often a record is drawn is each party's own; the rate here is the largest that the agreed noise allows, so a
    party with a smaller one spends less in every column. Empty where no noise was agreed on, or others see a party's
    own.
    """
    rules, sigma = federation.privacy, federation.noise_multiplier
    if not isinstance(rules, PrivacyRules) or sigma is None or federation.trunk != "shared":
        return []
    parties, rounds = len(federation.parties), federation.train.rounds
    mechanism = Mechanism(sigma, _largest_rate(sigma, rules, rounds))

    def against(pooled: PooledNoise, others: int) -> float:
        unknown = replace(mechanism, noise_multiplier=sigma * pooled.unknown(others))
        return epsilon([(unknown, rounds)], rules.delta)

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
    return rows


def _largest_rate(sigma: float, rules: PrivacyRules, rounds: int) -> float:
    """The largest sampling rate at which so much noise keeps the budget; 1 where every round may use every record."""
    low, high = 0.0, 1.0
    if epsilon([(Mechanism(sigma, high), rounds)], rules.delta) <= rules.epsilon:
        return high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if epsilon([(Mechanism(sigma, middle), rounds)], rules.delta) <= rules.epsilon:
            low = middle
        else:
            high = middle
    return low or high
