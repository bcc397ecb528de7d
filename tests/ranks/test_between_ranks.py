"""What ranks compute together is held to what each computes alone, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import spread_tasks
from helpers.rank_processes import run_ranks, values

SOUND: list[dict[str, Any]] = [
    {"over": 4, "family": "small"},
    {"over": 2, "lora": True, "method": "ghost", "clipping": "per_layer"},
    {"over": 2, "family": "gpt_oss", "checkpointing": True},
    {"over": 2, "family": "uneven"},
    {"over": 2, "gathered": True, "lora": True, "method": "ghost"},
    {"spread": False, "family": "small"},
    {"spread": False, "family": "small", "scale": 1e-12},
    {"spread": False, "family": "small", "draws_without_numbers": 2},
]
BROKEN: list[dict[str, Any]] = [
    {"fault": "clipped rank by rank", "over": 4},
    {"fault": "exchange over the wrong group", "over": 2},
    {"fault": "a replica's sums twice", "over": 2},
    {"fault": "records of one rank taken for another's", "over": 2},
    {"fault": "lost router gradient", "over": 4},
    {"fault": "dropped tail", "over": 4},
    {"fault": "sums averaged", "spread": False},
    {"fault": "bfloat16 reduction", "spread": False},
    {"fault": "bfloat16 reduction", "over": 4},
    {"fault": "another layer", "gathered": True, "family": "olmoe"},
    {"fault": "the tail of a layer", "gathered": True, "over": 2},
    {"fault": "sums that stay at home", "gathered": True, "over": 2},
    {"fault": "sums averaged", "spread": False, "draws_without_numbers": 1},
    {"fault": "", "spread": False, "draws_without_numbers": 5},
]


@pytest.fixture(scope="module")
def found() -> list[str]:
    """The code of each case, the same at all ranks."""
    by_rank = values(
        run_ranks(4, spread_tasks.compared_with_alone, [*SOUND, *({"family": "small"} | b for b in BROKEN)])
    )
    assert all(own == by_rank[0] for own in by_rank)
    return list(by_rank[0])


@pytest.mark.parametrize("case", range(len(SOUND)))
def test_ranks_that_compute_together_what_each_does_alone_go_on(case: int, found: list[str]) -> None:
    assert found[case] == ""


@pytest.mark.parametrize("case", range(len(BROKEN)), ids=[str(broken) for broken in BROKEN])
def test_a_broken_exchange_is_refused(case: int, found: list[str]) -> None:
    assert found[len(SOUND) + case] == "ranks-computed"


def test_it_is_refused_before_the_ledger_knows_a_run(tmp_path: Path) -> None:
    for each in run_ranks(2, spread_tasks.refused, tmp_path, "clipped rank by rank"):
        assert each.error is not None
        assert each.error.startswith(
            "ranks-computed: what the ranks compute together is not what each computes alone"
        )
    assert not (tmp_path / "ledger").exists()
