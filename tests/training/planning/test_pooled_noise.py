"""The table of `coterie plan` for pooled noise."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from coterie.training.planning.pooled_noise import NoiseTable, noise_table
from helpers.private_settings import private_settings


def test_every_choice_of_t_keeps_the_budget_and_says_what_holds_against_more():
    rows = noise_table(private_settings(aggregation="masked", noise_multiplier=1.2, train__rounds=30)).rows
    assert [row.colluding for row in rows] == [None, 1, 2]
    whole, one, two = rows
    assert [row.factor for row in rows] == pytest.approx([math.sqrt(3), math.sqrt(3 / 2), math.sqrt(3)])
    for row in rows:
        assert 7.0 < row.epsilon <= 8.0  # the budget is 8
    assert whole.epsilon_all == whole.epsilon
    assert whole.epsilon_one < whole.epsilon  # what others do not know is the noise of two
    assert one.epsilon_one == one.epsilon
    assert one.epsilon_all is not None
    assert one.epsilon_all > 10.0
    assert (two.epsilon_all, two.epsilon_one) == pytest.approx((whole.epsilon_all, whole.epsilon_one))


@pytest.mark.parametrize("changes", [{}, {"trunk": "private", "aggregation": "masked", "noise_multiplier": 1.2}])
def test_where_others_see_a_partys_own_noise_there_is_no_table(changes: dict):
    assert noise_table(private_settings(**changes)) == NoiseTable()


TRUNCATED = {"sampler": "truncated_poisson", "max_lot": 105, "lot_size": 100, "delta": 1e-6, "epsilon": 8.0}


def test_truncated_lots_are_counted_as_they_are_drawn() -> None:
    """Against dp-accounting's own event, at a noise that keeps the budget for lots of 100 from 1,000 records."""
    agreed = private_settings(privacy=TRUNCATED, aggregation="masked", noise_multiplier=1.305, train__rounds=20)
    assert "--records" in noise_table(agreed).remarks[0]
    assert noise_table(agreed).rows == ()
    assert noise_table(agreed, {}) == noise_table(agreed)  # as the command passes it
    found = noise_table(agreed, {"alder": 1000, "birch": 4000, "cedar": 4000})

    def spent(sigma: float) -> float:
        event = dp_accounting.TruncatedSubsampledGaussianDpEvent(1000, 0.1, 105, sigma)
        relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        accountant = PLDAccountant(relation, 1e-4)
        return float(accountant.compose(event, 20).get_epsilon(1e-6))

    whole, one, _ = found.rows
    assert whole.epsilon == pytest.approx(spent(1.305), rel=0.01)
    assert whole.epsilon_one == pytest.approx(spent(1.305 * math.sqrt(2)), rel=0.01)
    assert one.epsilon_all == pytest.approx(spent(1.305 / math.sqrt(2)), rel=0.01)
    few = noise_table(agreed, {"alder": 99, "birch": 2000, "cedar": 4000})
    assert (few.rows, few.remarks) == ((), ("the lots of now do not fit: a party has too few records",))


def test_noise_that_is_too_little_or_too_much_for_any_lot_is_said() -> None:
    little = noise_table(private_settings(aggregation="masked", noise_multiplier=0.01))
    assert little.rows == ()
    assert "`coterie up` will refuse it" in little.remarks[0]
    much = noise_table(private_settings(aggregation="masked", noise_multiplier=1e3))
    assert "more than any lot needs" in much.remarks[0]
    assert much.rows
