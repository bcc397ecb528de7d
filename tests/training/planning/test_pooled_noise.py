"""The table of `coterie plan` for pooled noise."""

from __future__ import annotations

import math

import pytest

from coterie.training.planning.pooled_noise import noise_table
from helpers.private_settings import private_settings


def test_every_choice_of_t_keeps_the_budget_and_says_what_holds_against_more():
    rows = noise_table(private_settings(aggregation="masked", noise_multiplier=1.2, train__rounds=30))
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
    assert noise_table(private_settings(**changes)) == []
