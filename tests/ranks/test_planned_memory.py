"""What `coterie plan` says that a rank holds is what ranks hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coterie.training.planning.rank_memory import held_of
from helpers import party_sums, spread_tasks
from helpers.rank_processes import run_ranks, values


@pytest.mark.parametrize(
    ("world", "options"), [(1, {"spread": False}), (2, {"spread": False}), (2, {}), (4, {"over": 2})]
)
def test_the_plan_counts_what_the_rank_with_the_most_holds(
    world: int, options: dict[str, Any], tmp_path: Path
) -> None:
    found = values(run_ranks(world, spread_tasks.held_bytes, tmp_path, options))
    over = options.get("over", 1 if options else world)
    assert max(found) == held_of(spread_tasks.small(), 4).at_rank(world, over)
    if world > 1:
        assert max(found) < max(values(run_ranks(1, spread_tasks.held_bytes, tmp_path / "1", {"spread": False})))


@pytest.mark.ranks
def test_the_plan_counts_the_sums_of_the_rank_of_a_party_with_the_most(tmp_path: Path) -> None:
    """While a lot is computed, and what its owner keeps: whole layers at each rank, or rows of its own experts."""
    over = {"experts_over": 2}
    kinds = [("fast", {}), ("private", {}), ("fast", over), ("plain", over)]
    ranks = values(run_ranks(2, party_sums.summed, tmp_path, kinds))
    for (kind, _), *found in zip(kinds, *ranks, strict=True):
        computed, kept, *planned = map(max, *found)
        # Beside integers, one record's gradient in float32 is counted, too.
        assert [computed * 12 // 8 if kind == "private" else computed, kept] == planned
