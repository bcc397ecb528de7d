"""Ranks that die, freeze, fail or differ: said by name within seconds, and never more left than the ledger says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from helpers import rank_tasks
from helpers.rank_processes import run_ranks, values

STAGES = [(0, "lot 1|0", "before"), (1, "spool 3|0", "done"), (0, "count 3|0", "done"), (1, "count 3|0", "told")]
MORE_STAGES = [(1, "lot 2|0", "done"), (1, "noise 3|0", "done"), (0, "spool 3|0", "told"), (0, "count 4|0", "told")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run of two ranks comes to."""
    return values(run_ranks(2, rank_tasks.resumable, tmp_path_factory.mktemp("whole")))[0]


@pytest.mark.parametrize(
    ("rank", "step", "when"), [*STAGES, *(pytest.param(*stage, marks=pytest.mark.slow) for stage in MORE_STAGES)]
)
def test_invariant_8_a_rank_killed_at_any_stage_leaves_a_run_that_goes_on_as_if_nothing_had_been(
    rank: int, step: str, when: str, tmp_path: Path, uninterrupted: Any
) -> None:
    ended = run_ranks(2, rank_tasks.deadly, tmp_path, rank, step, when, patience_s=5.0)
    assert ended[rank].exit == -9
    assert ended[1 - rank].error is not None
    assert ended[1 - rank].error.startswith("ranks-")
    again = values(run_ranks(2, rank_tasks.resumable, tmp_path, attempt=1))
    assert again[0]["counted"] == uninterrupted["counted"] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert again[0]["weights"] == again[1]["weights"] == uninterrupted["weights"]


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks_replays_what_was_released(world: int, tmp_path: Path, uninterrupted: Any) -> None:
    run_ranks(2, rank_tasks.deadly, tmp_path, 0, "count 3|0", "done", patience_s=5.0)
    for own in values(run_ranks(world, rank_tasks.resumable, tmp_path, attempt=1)):
        assert own["weights"] == pytest.approx(uninterrupted["weights"], rel=1e-4)
        assert own["counted"] in (None, uninterrupted["counted"])


def test_a_part_that_is_gone_or_changed_burns_its_round_which_stays_counted(tmp_path: Path) -> None:
    run_ranks(2, rank_tasks.deadly, tmp_path, 0, "count 3|0", "done", patience_s=5.0)
    (part,) = tmp_path.glob("ledger/*/spool/*/rank-1/release-00000003-0.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    own, other = values(run_ranks(2, rank_tasks.resumable, tmp_path, attempt=1))
    assert own["weights"] == other["weights"]
    assert own["counted"] == [(1, 0), (2, 0), (3, 0), (3, 1)]  # four in all: the last round is not paid for


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ({"clip_norm": 0.6}, "clip_norm"),
        ({"seed": 8}, "the plan"),
        ({"tensor_cores": True}, "the setting tensor_cores"),
        ({"order": range(23)}, "the dataset"),
        ({"order": [*range(1, 24), 0]}, "the records"),
    ],
)
def test_ranks_that_differ_are_refused_by_name(what: dict[str, Any], name: str, tmp_path: Path) -> None:
    for each in run_ranks(2, rank_tasks.differing, tmp_path, what):
        assert each.error is not None
        assert each.error.startswith(f"ranks-differ: the ranks differ in {name}: rank 0 has")
    assert not (tmp_path / "ledger").exists()


def test_a_rank_that_raises_lets_all_raise_and_nothing_is_counted(tmp_path: Path) -> None:
    first, second = run_ranks(2, rank_tasks.failing, tmp_path)
    assert first.error is not None
    assert second.error is not None
    assert first.error.startswith("ranks-failed: rank 1 ended: OSError: the disk of rank 1")
    assert "the disk of rank 1" in second.error


def test_ranks_at_different_steps_are_refused_instead_of_waiting() -> None:
    for each in run_ranks(2, rank_tasks.out_of_step):
        assert each.error is not None
        assert each.error.startswith("ranks-out-of-step")


def test_ranks_do_not_step_each_its_own_and_then_all_everything(tmp_path: Path) -> None:
    for each in run_ranks(2, rank_tasks.in_turns, tmp_path):
        assert each.error is not None
        assert each.error.startswith("dp-step-ranks")


def test_a_frozen_rank_is_named_within_seconds() -> None:
    began = time.monotonic()
    first, _ = run_ranks(2, rank_tasks.stopped, patience_s=3.0, kill_s=0.0)
    assert first.error is not None
    assert first.error.startswith("ranks-silent: rank 1 has been silent")
    assert time.monotonic() - began < 60


def test_a_session_that_is_not_told_of_its_ranks_is_refused(tmp_path: Path) -> None:
    for each in run_ranks(2, rank_tasks.without_ranks, tmp_path):
        assert each.error is not None
        assert each.error.startswith("ranks-missing")


def test_a_rank_hears_while_it_computes_that_another_has_given_up() -> None:
    first, second = run_ranks(2, rank_tasks.given_up)
    assert first.error is not None
    assert second.error is not None
    assert "given up" in first.error
    assert second.error.startswith("ranks-failed: rank 0 ended: OSError: given up")


def test_who_waits_for_somebody_else_is_waited_for_as_long_as_it_lives() -> None:
    assert values(run_ranks(2, rank_tasks.late, True)) == ["a word", "a word"]
    ended = run_ranks(2, rank_tasks.late, False)
    assert ended[1].error is not None
    assert ended[1].error.startswith("ranks-late")
