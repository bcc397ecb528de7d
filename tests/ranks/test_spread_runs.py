"""Runs whose experts are spread over ranks: broken records, noise, kills, checkpoints, ranks out of step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.dp.noise.discrete_gaussian import calibrate
from helpers import spread_tasks
from helpers.comparing import relative
from helpers.rank_processes import run_ranks, values
from helpers.rank_tasks import PRODUCT_SLAB, SLAB


def test_ranks_without_records_empty_lots_and_broken_records(tmp_path: Path) -> None:
    options = {"lot_size": 1, "rounds": 5, "broken": 14}
    (alone,) = values(run_ranks(1, spread_tasks.train, tmp_path / "alone", {**options, "spread": False}))
    assert min(figures[0] for figures in alone["figures"]) == 0
    assert sum(figures[3] for figures in alone["figures"]) > 0
    for own in values(run_ranks(3, spread_tasks.train, tmp_path / "ranks", options)):
        assert relative(torch.tensor(own["weights"][-1]), torch.tensor(alone["weights"][-1])) <= 1e-6
        assert [f[::3] for f in own["figures"]] == [f[::3] for f in alone["figures"]]


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"fault": "noise at every rank"}),
        (4, {"fault": "a replica's sums twice", "over": 2}),
        (4, {"fault": "the lot once for each group", "over": 2}),
    ],
    ids=lambda value: value["fault"] if isinstance(value, dict) else None,
)
def test_faults_of_ownership_are_seen_by_that_comparison(world: int, options: dict[str, Any], tmp_path: Path) -> None:
    """After several rounds: Adam's first step is little more than the signs of what it is given."""
    (alone,) = values(run_ranks(1, spread_tasks.train, tmp_path / "alone", {"spread": False}))
    for own in values(run_ranks(world, spread_tasks.train, tmp_path / "ranks", options)):
        assert relative(torch.tensor(own["weights"][-1]), torch.tensor(alone["weights"][-1])) > 1e-6


def test_secret_noise_has_the_deviation_of_one_process_and_every_value_has_its_own(tmp_path: Path) -> None:
    ranks = values(run_ranks(2, spread_tasks.noise_alone, tmp_path, {"seed": None}))
    assert ranks[0] == ranks[1]
    noise = torch.tensor(ranks[0], dtype=torch.float64)
    sigma, sensitivity = values(run_ranks(1, spread_tasks.noise_needed, tmp_path / "alone"))[0]
    expected = calibrate(sigma, sensitivity, len(noise)) / spread_tasks.LOT
    assert float(noise.std()) == pytest.approx(expected, rel=0.05)
    assert len(torch.unique(noise)) > 0.95 * len(noise)


@pytest.mark.parametrize(
    ("step", "worlds", "slab", "frozen_trunk"),
    [
        ("count 2|0", (1, 2, 4), SLAB, False),
        pytest.param("count 2|0", (2,), PRODUCT_SLAB, False, marks=pytest.mark.ranks),
        pytest.param("count 2|0", (2,), PRODUCT_SLAB, True, marks=pytest.mark.ranks),
        pytest.param("spool 2|0", (2,), PRODUCT_SLAB, False, marks=pytest.mark.ranks),
    ],
)
def test_invariant_8_a_run_goes_on_with_any_number_of_ranks_after_one_was_killed(
    step: str, worlds: tuple[int, ...], slab: int, frozen_trunk: bool, tmp_path: Path
) -> None:
    (whole,) = values(run_ranks(1, spread_tasks.resumable, tmp_path / "whole", True, slab, frozen_trunk))
    for world in worlds:
        folder = tmp_path / str(world)
        ended = run_ranks(2, spread_tasks.deadly, folder, step, slab, frozen_trunk, patience_s=5.0)
        assert ended[1].exit == -9
        again = run_ranks(world, spread_tasks.resumable, folder, True, slab, frozen_trunk, attempt=1)
        for own in values(again):
            assert relative(torch.tensor(own["weights"]), torch.tensor(whole["weights"])) <= 1e-6
            assert own["counted"] in (None, whole["counted"])


def test_invariant_8_a_run_of_two_groups_goes_on_in_any_shape(tmp_path: Path) -> None:
    (whole,) = values(run_ranks(1, spread_tasks.resumable, tmp_path / "whole"))
    ended = run_ranks(4, spread_tasks.deadly, tmp_path / "killed", "count 2|0", SLAB, False, 2, patience_s=5.0)
    assert ended[3].exit == -9
    for world, spread, over in ((4, True, 2), (3, True, 3), (2, False, None)):
        folder = shutil.copytree(tmp_path / "killed", tmp_path / f"{world} {over}")
        for own in values(run_ranks(world, spread_tasks.resumable, folder, spread, SLAB, False, over, attempt=1)):
            assert relative(torch.tensor(own["weights"]), torch.tensor(whole["weights"])) <= 1e-6
            assert own["counted"] in (None, whole["counted"])


def test_a_checkpoint_of_several_ranks_is_read_by_one_with_the_whole_model(tmp_path: Path) -> None:
    (whole,) = values(run_ranks(1, spread_tasks.resumable, tmp_path / "whole", False))
    run_ranks(2, spread_tasks.deadly, tmp_path / "ranks", "count 3|0", patience_s=5.0)
    (own,) = values(run_ranks(1, spread_tasks.resumable, tmp_path / "ranks", False, attempt=1))
    assert relative(torch.tensor(own["weights"]), torch.tensor(whole["weights"])) <= 1e-6


def test_a_rank_that_fails_in_the_middle_of_a_batch_lets_all_raise_the_same(tmp_path: Path) -> None:
    for each in run_ranks(2, spread_tasks.failing, tmp_path):
        assert each.error is not None
        assert "the memory of rank 1" in each.error


def test_no_batch_follows_one_that_a_rank_left_half_done(tmp_path: Path) -> None:
    """Its rows could be taken for those of the next one, whatever a script makes of the error."""
    for each in run_ranks(2, spread_tasks.failing, tmp_path, False, True):
        assert each.error is not None
        assert "left a batch by an error while ranks exchanged" in each.error


def test_a_rank_that_runs_the_model_less_often_is_named_instead_of_waited_for() -> None:
    first, second = run_ranks(2, spread_tasks.uneven, patience_s=2.0)
    assert first.error is not None
    assert second.error is not None
    assert first.error.startswith("ranks-out-of-step: rank 1 has gone on, and rank 0 waits for it")
