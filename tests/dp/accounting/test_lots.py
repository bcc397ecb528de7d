"""Lots are Poisson samples of units, drawn in secret."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from coterie.dp.accounting.lots import Lot, LotPlan, Units, draw_lot
from coterie.dp.noise.randomness import SeededRandom, SystemRandom
from coterie.errors import BudgetError, DataError, PrivacyError

SOURCE = SeededRandom(7)


def test_every_record_joins_with_the_planned_probability_and_sizes_are_binomial() -> None:
    plan, units = LotPlan.of(200, 30), Units.of_records(200)
    lots = [draw_lot(r, plan, units, SOURCE) for r in range(3000)]
    joined = np.bincount(np.concatenate([lot.records for lot in lots]), minlength=200)
    assert stats.chisquare(joined).pvalue > 1e-4
    assert stats.binomtest(int(joined.sum()), 200 * 3000, plan.rate).pvalue > 1e-4
    sizes = np.array([len(lot) for lot in lots])
    assert sizes.var() == pytest.approx(200 * plan.rate * (1 - plan.rate), rel=0.15)
    together = np.array([(0 in lot.records) and (1 in lot.records) for lot in lots])
    assert stats.binomtest(int(together.sum()), 3000, plan.rate**2).pvalue > 1e-4


def test_empty_lots_happen_and_are_lots() -> None:
    plan, units = LotPlan.of(50, 1), Units.of_records(50)
    lots = [draw_lot(r, plan, units, SOURCE) for r in range(300)]
    empty = sum(len(lot) == 0 for lot in lots)
    assert stats.binomtest(empty, 300, (1 - 1 / 50) ** 50).pvalue > 1e-4
    assert next(lot for lot in lots if not len(lot)).num_units == 0


def test_rate_one_takes_everything() -> None:
    assert draw_lot(1, LotPlan.of(9, 9), Units.of_records(9), SystemRandom()).records.tolist() == list(range(9))


def test_truncated_lots_never_exceed_the_limit_and_cut_evenly() -> None:
    plan, units = LotPlan.of(100, 40, "truncated_poisson", 42), Units.of_records(100)
    lots = [draw_lot(r, plan, units, SOURCE) for r in range(2000)]
    assert max(len(lot) for lot in lots) == 42
    assert stats.chisquare(np.bincount(np.concatenate([lot.records for lot in lots]), minlength=100)).pvalue > 1e-4
    assert LotPlan.of(67349, 1024, "truncated_poisson").max_lot == 1216


def test_invariant_7_lots_of_a_private_run_differ_each_time_and_seeded_ones_repeat() -> None:
    plan, units = LotPlan.of(400, 200), Units.of_records(400)
    assert (
        draw_lot(1, plan, units, SystemRandom()).records.tolist()
        != draw_lot(1, plan, units, SystemRandom()).records.tolist()
    )
    assert draw_lot(1, plan, units, SOURCE).records.tolist() == draw_lot(1, plan, units, SOURCE).records.tolist()
    assert draw_lot(1, plan, units, SOURCE).records.tolist() != draw_lot(2, plan, units, SOURCE).records.tolist()


def test_users_are_drawn_whole_and_their_records_capped_and_adjacent() -> None:
    users = ["ann"] * 2 + ["bob"] * 9 + ["cy"] + ["ann"] * 2 + ["dee"] * 3
    units = Units.of_users(users, cap=4)
    plan = LotPlan.of(units.count, 2)
    assert (units.count, plan.rate) == (4, 0.5)
    seen: dict[str, int] = {}
    bobs: set[int] = set()
    for r in range(400):
        lot = draw_lot(r, plan, units, SOURCE)
        assert (np.diff(lot.units) >= 0).all()
        for unit in range(lot.num_units):
            own = lot.records[lot.units == unit]
            names = {users[i] for i in own}
            assert len(names) == 1
            name = names.pop()
            assert len(set(own.tolist())) == len(own) == min(4, users.count(name))
            seen[name] = seen.get(name, 0) + 1
            bobs |= set(own.tolist()) if name == "bob" else set()
    assert all(stats.binomtest(count, 400, 0.5).pvalue > 1e-4 for count in seen.values())
    assert len(bobs) == 9


def test_physical_batches_cover_the_lot_and_survive_storage() -> None:
    lot = draw_lot(3, LotPlan.of(100, 40), Units.of_records(100), SOURCE)
    again = Lot.from_json(lot.to_json())
    batches = list(again.physical_batches(7))
    assert all(len(records) <= 7 for records, _ in batches)
    assert np.concatenate([records for records, _ in batches]).tolist() == lot.records.tolist()
    assert np.concatenate([units for _, units in batches]).tolist() == list(range(len(lot)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((10, 11), "a lot of 11 is larger than the data \\(10\\)"),
        ((10, 0), "`lot_size` is 0"),
        ((10, 5, "truncated_poisson", 4), "the largest lot \\(4\\) is below the expected one"),
        ((10, 5, "poisson", 7), "was set for plain Poisson"),
    ],
)
def test_impossible_lots_are_refused_in_one_sentence(arguments: tuple, sentence: str) -> None:
    with pytest.raises(BudgetError, match=sentence):
        LotPlan.of(*arguments)


def test_bad_units_are_refused_in_one_sentence() -> None:
    with pytest.raises(DataError, match="the dataset has no records"):
        Units.of_records(0)
    with pytest.raises(DataError, match="record 1 names no user"):
        Units.of_users(["a", None], 3)
    with pytest.raises(BudgetError, match="`records_per_user` is 0"):
        Units.of_users(["a"], 0)
    with pytest.raises(PrivacyError, match="the plan counts 5 units, the data has 6"):
        draw_lot(1, LotPlan.of(5, 2), Units.of_records(6), SOURCE)


def test_rate_is_never_rounded_up() -> None:
    plan = LotPlan.of(3, 1)
    assert math.floor(plan.rate * 2**64) <= plan.rate * 2**64
