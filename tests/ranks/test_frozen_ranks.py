"""Ranks that freeze while others wait for their tensors: named by all, and nothing has left that is not counted."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from coterie.training.experts.gateway import HELD
from helpers import party_tasks, struck_ranks
from helpers.rank_processes import Ended, run_ranks
from helpers.struck_ranks import Point

ROWS = 3
"""Which exchange of a batch has hidden states: ranks say how many rows come, and whose they are, before it."""
LONG_S = 300.0
"""More than any of these runs takes on a busy machine; nobody waits for a frozen rank for hours."""
SHORT = {"train__rounds": 2}
SPREAD = {**SHORT, "experts_over": 2}
IN_A_SESSION = [
    Point(rank, name, "before", nth) for rank in (0, 1) for name, nth in (("exchange", ROWS), ("add_up", 1))
]
ALWAYS = IN_A_SESSION[2]
"""Tried in `make test`, too."""
IN_A_PARTY: list[tuple[str, dict[str, Any], Point, str, int]] = [
    ("fast", SPREAD, Point(1, "exchange", "before", ROWS), "round 2", 1),
    ("private", SHORT, Point(1, "add_up", "before"), "round 2", 1),
    ("private", SHORT, Point(0, "add_up", "before"), "round 2", 1),
    ("private", SHORT, Point(1, "exchange", "before"), "count 2|0", 2),
]
"""What the parties agreed on; when; since which step; releases that are counted then. The last one is a push."""


def assert_named_by_all(ended: list[Ended], frozen: int) -> None:
    for rank, each in enumerate(ended):
        if rank != frozen:
            assert each.error is not None
            assert each.error.startswith(f"ranks-silent: rank {frozen} has been silent"), each.error


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [pytest.param(each, marks=[] if each == ALWAYS else pytest.mark.ranks) for each in IN_A_SESSION], ids=str
)
def test_a_rank_that_freezes_in_a_round_is_named_by_all_that_wait_for_its_tensors(
    point: Point, tmp_path: Path
) -> None:
    ended = run_ranks(
        3, struck_ranks.run, tmp_path / "run", point, signal.SIGSTOP, patience_s=4.0, kill_s=LONG_S, frozen=point.rank
    )
    assert_named_by_all(ended, point.rank)
    struck_ranks.assert_all_counted(tmp_path / "run")


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "changes", "point", "since", "counted"), IN_A_PARTY, ids=str)
def test_a_rank_of_a_party_that_freezes_in_a_round_is_named_and_what_was_pushed_is_counted(
    kind: str, changes: dict[str, Any], point: Point, since: str, counted: int, tmp_path: Path
) -> None:
    ended = run_ranks(
        2, party_tasks.frozen, tmp_path, kind, changes, point, since, patience_s=5.0, kill_s=LONG_S, frozen=point.rank
    )
    assert_named_by_all(ended, point.rank)
    pushes = (tmp_path / "steps-0").read_text("utf-8").splitlines().count(HELD)
    assert pushes <= counted == len(party_tasks.counted(tmp_path))
