"""Lots at which every party draws each of its records equally often."""

from __future__ import annotations

import pytest

from coterie.config import FederationConfig
from coterie.dp.accounting.accountant import noise_multiplier
from coterie.dp.accounting.budget import Budget
from coterie.errors import ConfigError
from coterie.training.planning.equal_rates import equal_rates
from helpers.private_settings import private_settings

UNITS = {"alder": 1600, "birch": 800, "cedar": 1200}


def settings(**changes: object) -> FederationConfig:
    return private_settings(privacy__lot_size=180, train__rounds=10, **changes)


def test_lots_of_the_same_sum_give_every_record_the_same_chance_and_need_less_noise() -> None:
    found = equal_rates(settings(), UNITS)
    assert {lot.party: lot.lot_size for lot in found.lots} == {"alder": 240, "birch": 120, "cedar": 180}
    assert {lot.rate for lot in found.lots} == {0.15}
    needed = noise_multiplier(Budget(8.0, 1e-3), 0.15, 10)
    assert needed <= found.noise_multiplier < needed + 1e-4
    now = noise_multiplier(Budget(8.0, 1e-3), 180 / 800, 10)  # of birch, which has least
    assert found.noise_now == pytest.approx(now, abs=1e-4)
    assert all(7.9 < lot.epsilon <= 8.0 for lot in found.lots)


def test_the_proposal_can_be_written_down_and_is_then_what_holds() -> None:
    lots = {lot.party: lot.lot_size for lot in equal_rates(settings(), UNITS).lots}
    agreed = private_settings(privacy__lot_size=None, lot_sizes=lots, train__rounds=10)
    assert [agreed.lot_of(party) for party in ("alder", "birch", "cedar")] == [240, 120, 180]
    assert agreed.largest_lot == 240
    again = equal_rates(agreed, UNITS)
    assert again.noise_now == again.noise_multiplier


@pytest.mark.parametrize(
    ("units", "named"),
    [
        ({"alder": 1600, "birch": 800}, "see cedar"),
        ({**UNITS, "dogwood": 5}, "see dogwood"),
        ({**UNITS, "alder": 0}, "from 1"),
    ],
)
def test_every_party_is_named_once(units: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        equal_rates(settings(), units)
    assert caught.value.code == "plan-records"


def test_without_a_budget_there_are_no_lots_to_propose() -> None:
    with pytest.raises(ConfigError) as caught:
        equal_rates(private_settings(privacy="none"), UNITS)
    assert caught.value.code == "plan-records-none"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"privacy": "none", "lot_sizes": dict.fromkeys(UNITS, 5)}, "without one, `train.batch_size`"),
        ({"privacy__lot_size": 5, "lot_sizes": dict.fromkeys(UNITS, 5)}, "the same thing twice"),
        ({"privacy__lot_size": None, "lot_sizes": {"alder": 5, "birch": 5}}, "differs from `parties` in cedar"),
        ({"privacy__lot_size": None, "lot_sizes": {**UNITS, "elm": 5}}, "differs from `parties` in elm"),
    ],
)
def test_lots_by_party_that_do_not_fit_are_refused(changes: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        private_settings(**changes)
