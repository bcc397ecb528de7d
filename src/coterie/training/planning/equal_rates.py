"""Lots at which every party draws each of its records equally often: one noise multiplier then fits all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from coterie.config import FederationConfig, PrivacyRules
from coterie.dp.accounting.accountant import epsilon, noise_multiplier
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
        noise_now: the largest that a party needs with the lots of federation.yaml.
    """

    lots: tuple[PartyLot, ...]
    noise_multiplier: float
    noise_now: float


def equal_rates(federation: FederationConfig, units: Mapping[str, int]) -> EqualRates:
    """Lots of the same expected sum as those of federation.yaml, at one rate.

    Args:
        federation: its budget, rounds and lots.
        units: N of every party: records, or users where these are the unit.

    Raises:
        ConfigError: no budget, or not every party's N (codes ``plan-records-none``, ``plan-records``).
        BudgetError: a lot is larger than its party's data; no noise reaches the budget.
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
    now = [_lot_plan(rules, count, federation.lot_of(party)) for party, count in units.items()]
    proposed = {
        party: _lot_plan(rules, count, max(1, min(count, round(rate * count)))) for party, count in units.items()
    }
    rounds, sigma = federation.train.rounds, _rounded_up(_needed(rules, federation.train.rounds, proposed.values()))
    lots = [
        PartyLot(party, plan.units, plan.lot_size, plan.rate, epsilon([(plan.mechanism(sigma), rounds)], rules.delta))
        for party, plan in proposed.items()
    ]
    return EqualRates(tuple(lots), sigma, _rounded_up(_needed(rules, rounds, now)))


def _lot_plan(rules: PrivacyRules, units: int, lot_size: int) -> LotPlan:
    return LotPlan.of(units, lot_size, rules.sampler, rules.max_lot)


def _needed(rules: PrivacyRules, rounds: int, plans: Iterable[LotPlan]) -> float:
    """The largest noise multiplier that one of these lots needs; without truncation, that of the largest rate."""
    budget = Budget(rules.epsilon, rules.delta)
    if rules.sampler == "poisson":
        plans = [max(plans, key=lambda plan: plan.rate)]
    least = [plan.mechanism(1.0) for plan in plans]
    return max(noise_multiplier(budget, m.sampling_rate, rounds, m.sampler, m.units, m.limit) for m in least)


def _rounded_up(sigma: float) -> float:
    return math.ceil(sigma * _STEPS) / _STEPS
