"""Runs with experts over ranks of which one is killed: at every told step of a round, and in every collective."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import struck_ranks
from helpers.comparing import relative
from helpers.rank_processes import run_ranks, values
from helpers.struck_ranks import COLLECTIVES, Point

STEPS = [
    "published 2", "round 2", "before round 2", "spooled 2|0", "lot 2|0", "batch 1 of 2|0", "batch 2 of 2|0",
    "noise 2|0", "spool 2|0", "count 2|0", "step 2", "parts after round 2", "saving", "saved after round 2",
]  # fmt: skip
"""Of the second round, and of the checkpoint after it."""
ROWS = 3
"""Which exchange of a batch has hidden states: ranks say how many rows come, and whose they are, before it."""
MADE = {
    0: ("round 2", "lot 2|0", "noise 2|0", "count 2|0", "step 2", "saving"),
    1: ("lot 2|0", "noise 2|0", "spool 2|0", "step 2", "parts after round 2"),
}
"""Steps to which a rank brings something that it has made."""
POINTS = [
    point
    for rank in (0, 1)
    for point in (
        *(Point(rank, step, "told") for step in STEPS),
        *(Point(rank, step, "done") for step in MADE[rank]),
        *(Point(rank, name, "before", ROWS if name == "exchange" else 1) for name in COLLECTIVES),
        *(Point(rank, name, "told") for name in ("add_up", "hand_out")),
    )
]
ALWAYS = Point(0, "exchange", "before", ROWS)
"""Tried in `make test`, too: an ended connection is seen at once. `test_spread_runs` tries some told steps there."""
ROUNDS = [(1, 0), (2, 0), (3, 0)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run of two ranks comes to, and where its steps are noted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, values(run_ranks(2, struck_ranks.run, folder))[0]["weights"]


def assert_goes_on(folder: Path, worlds: tuple[int, ...], expected: list[float]) -> None:
    """It comes to the same with any number of ranks; each round is counted once."""
    for world in worlds:
        again = shutil.copytree(folder, folder.with_name(f"{folder.name} {world}"))
        for own in values(run_ranks(world, struck_ranks.run, again, attempt=1)):
            assert relative(torch.tensor(own["weights"]), torch.tensor(expected)) <= 1e-6
        assert struck_ranks.releases_on_disk(again) == ROUNDS
        struck_ranks.assert_all_counted(again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [pytest.param(each, marks=[] if each == ALWAYS else pytest.mark.ranks) for each in POINTS], ids=str
)
def test_invariant_8_a_rank_killed_at_any_step_leaves_a_run_that_goes_on_with_as_many_ranks_or_others(
    point: Point, tmp_path: Path, whole: tuple[Path, list[float]]
) -> None:
    folder = tmp_path / "killed"
    ended = run_ranks(2, struck_ranks.run, folder, point, patience_s=5.0)
    assert ended[point.rank].exit == -signal.SIGKILL
    error = ended[1 - point.rank].error
    assert error is not None
    assert error.startswith("ranks-")
    struck_ranks.assert_all_counted(folder)
    assert_goes_on(folder, (2, 3 if point.rank else 1), whole[1])


@pytest.mark.ranks
def test_every_step_of_a_round_is_one_at_which_ranks_are_killed(whole: tuple[Path, list[float]]) -> None:
    for rank in (0, 1):
        noted = (whole[0] / f"steps-{rank}").read_text("utf-8").splitlines()
        first, last = noted.index("saved after round 1"), noted.index("saved after round 2")
        assert list(dict.fromkeys(noted[first + 1 : last + 1])) == STEPS
