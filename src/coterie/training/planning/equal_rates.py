"""Lots at which every party draws each of its records equally often: one noise multiplier then fits all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coterie.config import FederationConfig, PrivacyRules
from coterie.dp.accounting.accountant import epsilon, needed_noise
from coterie.dp.accounting.budget import Budget
from coterie.dp.accounting.lots import LotPlan
from coterie.errors import ConfigError

_STEPS = 10_000
"""In one of the proposed noise multiplier, which is rounded up."""


@dataclass(frozen=True)
class PartyLot:
    """One party's lot.

    Attributes:
        units: N, public.
        lot_size: expected units in a round.
        rate: q, the chance that a unit is in a round.
        epsilon: what it spends under the noise of the whole proposal.
    """

    party: str
    units: int
    lot_size: int
    rate: float
    epsilon: float


@dataclass(frozen=True)
class EqualRates:
    """Lots for all parties.

    Attributes:
        lots: as proposed.
        noise_multiplier: the largest that one of them needs.
        noise_now: the largest that a party needs with the lots of federation.yaml; None where a party has too few
            records for its lot.
    """

    lots: tuple[PartyLot, ...]
    noise_multiplier: float
    noise_now: float | None


def equal_rates(federation: FederationConfig, units: Mapping[str, int]) -> EqualRates:
    """Lots of the same expected sum as those of federation.yaml, at one rate.

    Args:
        federation: its budget, rounds and lots.
        units: N of every party: records, or users where these are the unit.

    Raises:
        ConfigError: no budget, or not every party's N (codes ``plan-records-none``, ``plan-records``).
        BudgetError: at one rate, too, lots are larger than the data; no noise reaches the budget.
    """
    rules = federation.privacy
    if not isinstance(rules, PrivacyRules):
        raise ConfigError(
            "numbers of records were given, and federation.yaml has no budget.",
            code="plan-records-none",
            why="lots and noise follow from a budget",
            fix="leave out --records, or give `privacy` an epsilon and a delta",
        )
    different = sorted(set(units) ^ set(federation.parties))
    if different or any(count < 1 for count in units.values()):
        raise ConfigError(
            "--records does not name every party once, with a number from 1"
            + (f": see {different[0]}." if different else "."),
            code="plan-records",
            why="one rate for all follows from how much text each of them has",
            fix="give --records NAME=NUMBER for " + ", ".join(federation.parties),
        )
    wanted = sum(federation.lot_of(party) for party in federation.parties)
    rate = wanted / sum(units.values())
    proposed = {party: lot_plan(rules, count, _nearest(rate, count, rules)) for party, count in units.items()}
    rounds, sigma = federation.train.rounds, _rounded_up(_needed(rules, federation.train.rounds, proposed.values()))
    lots = [
        PartyLot(party, plan.units, plan.lot_size, plan.rate, epsilon([(plan.mechanism(sigma), rounds)], rules.delta))
        for party, plan in proposed.items()
    ]
    return EqualRates(tuple(lots), sigma, _now(federation, rules, units))


def _nearest(rate: float, units: int, rules: PrivacyRules) -> int:
    """The lot of this rate; rounding makes none larger than a block."""
    most = units // rules.noise_bands if rate * rules.noise_bands <= 1 else units
    return max(1, min(most, round(rate * units)))


def _now(federation: FederationConfig, rules: PrivacyRules, units: Mapping[str, int]) -> float | None:
    """See `EqualRates.noise_now`; lots that do not fit are what the proposal mends."""
    if any(federation.lot_of(party) * rules.noise_bands > count for party, count in units.items()):
        return None
    plans = [lot_plan(rules, count, federation.lot_of(party)) for party, count in units.items()]
    return _rounded_up(_needed(rules, federation.train.rounds, plans))


def lot_plan(rules: PrivacyRules, units: int, lot_size: int) -> LotPlan:
    """How a party of so many units draws its lots."""
    return LotPlan.of(units, lot_size, rules.sampler, rules.max_lot, rules.noise_bands)


def _needed(rules: PrivacyRules, rounds: int, plans: Iterable[LotPlan]) -> float:
    """The largest noise multiplier that one of these lots needs; without truncation, that of the largest rate."""
    budget = Budget(rules.epsilon, rules.delta)
    if rules.sampler == "poisson":
        plans = [max(plans, key=lambda plan: plan.rate)]
    return max(needed_noise(budget, plan.mechanism(1.0), rounds) for plan in plans)


def _rounded_up(sigma: float) -> float:
    return math.ceil(sigma * _STEPS) / _STEPS
