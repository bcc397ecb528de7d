"""Lots at which every party draws each of its records equally often."""

from __future__ import annotations

import pytest

from coterie.config import FederationConfig
from coterie.dp.accounting.accountant import epsilon, noise_multiplier
from coterie.dp.accounting.budget import Budget
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.plan import PrivacyPlan
from coterie.errors import ConfigError
from coterie.training.planning.equal_rates import equal_rates
from helpers.private_settings import private_settings

UNITS = {"alder": 1600, "birch": 800, "cedar": 1200}


def settings(**changes: object) -> FederationConfig:
    return private_settings(**{"privacy__lot_size": 180, "train__rounds": 10, **changes})


def test_lots_of_the_same_sum_give_every_record_the_same_chance_and_need_less_noise() -> None:
    found = equal_rates(settings(), UNITS)
    assert {lot.party: lot.lot_size for lot in found.lots} == {"alder": 240, "birch": 120, "cedar": 180}
    assert {lot.rate for lot in found.lots} == {0.15}
    needed = noise_multiplier(Budget(8.0, 1e-3), 0.15, 10)
    assert needed <= found.noise_multiplier < needed + 1e-4
    now = noise_multiplier(Budget(8.0, 1e-3), 180 / 800, 10)  # of birch, which has least
    assert found.noise_now == pytest.approx(now, abs=1e-4)
    assert all(7.9 < lot.epsilon <= 8.0 for lot in found.lots)


@pytest.mark.parametrize("bands", [4, 8])
def test_in_bands_the_noise_is_what_a_partys_own_plan_needs(bands: int) -> None:
    """Turns of blocks at the blocks' rate, as each party calibrates for itself."""
    agreed = settings(privacy__noise_bands=bands, privacy__lot_size=20, optim={"kind": "sgd", "lr": 0.1})
    found = equal_rates(agreed, UNITS)
    lot = found.lots[0]
    own = PrivacyPlan(Budget(8.0, 1e-3), 10, lot.lot_size, bands=NoiseBands.of(bands, 10))
    mechanism = own.mechanism(own.lots(lot.units))
    assert mechanism.noise_multiplier <= found.noise_multiplier < mechanism.noise_multiplier + 1e-3
    assert lot.rate == bands * lot.lot_size / lot.units
    assert lot.epsilon == pytest.approx(epsilon([(mechanism, 10)], 1e-3), rel=1e-3)


@pytest.mark.parametrize(("birch", "bands"), [(150, 1), (500, 4)])
def test_a_party_with_fewer_records_than_its_lot_needs_is_proposed_one_that_fits(birch: int, bands: int) -> None:
    units = {**UNITS, "birch": birch}
    agreed = settings(privacy__noise_bands=bands, optim={"kind": "sgd", "lr": 0.1})
    found = equal_rates(agreed, units)
    assert found.noise_now is None
    assert all(lot.rate <= 1 for lot in found.lots)
    assert sum(lot.lot_size for lot in found.lots) == pytest.approx(3 * 180, abs=2)


def test_rounding_makes_no_lot_larger_than_a_block() -> None:
    agreed = settings(privacy__noise_bands=4, privacy__lot_size=2, optim={"kind": "sgd", "lr": 0.1})
    found = equal_rates(agreed, {"alder": 7, "birch": 7, "cedar": 10})  # at 1/4: lots of 1.75, 1.75 and 2.5
    assert [lot.lot_size for lot in found.lots] == [1, 1, 2]


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
