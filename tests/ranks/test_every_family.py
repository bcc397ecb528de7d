"""Every family, experts over two ranks: by one method always, by every method in `make ranks`."""

from __future__ import annotations

import pytest

from coterie.models.zoo.catalogue import causal_lm_types
from helpers import spread_tasks
from helpers.rank_processes import run_ranks, values

RANDOM_ROUTING = {"phimoe"}
"""Families that draw their routing in train mode, for each batch anew."""
COMPARED_ELSEWHERE = {"olmoe", "gpt_oss", "deepseek_v3"}
"""Families that `test_spread` compares."""
FAMILIES = [family for family in sorted(causal_lm_types()) if family not in COMPARED_ELSEWHERE]


def off(found: dict[str, float]) -> bool:
    """Whether it is more than 1e-5, and more than twice what one process shows between two batchings."""
    return not all(found[what] <= max(1e-5, 2 * found.get(f"{what} by batch", 0.0)) for what in ("norms", "sums"))


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_norms_and_sums_are_those_of_one_process(half: int) -> None:
    """Few records, and each rank brings what one process finds of every other family: half a minute of one core."""
    families = FAMILIES[half::2]
    cases = [
        {
            "family": family,
            "records": 4,
            "reference_by": number % 2,
            "batchings": True,
            "train": family not in RANDOM_ROUTING,
        }
        for number, family in enumerate(families)
    ]
    by_rank = values(run_ranks(2, spread_tasks.norms_and_sums, cases, kill_s=600.0))
    assert all(len(own) == len(families) for own in by_rank)
    assert {family: found for own in by_rank for family, found in zip(families, own, strict=True) if off(found)} == {}


@pytest.mark.ranks
@pytest.mark.parametrize("family", sorted(causal_lm_types()))
def test_norms_and_sums_are_those_of_one_process_by_every_method(family: str) -> None:
    """Within 1e-5, or twice what one process shows between batches of 5 and of 2 or 1 where that is more."""
    cases = [
        {
            "family": family,
            "method": method,
            "clipping": clipping,
            "batchings": True,
            "train": family not in RANDOM_ROUTING,
            "gathered": gathered,
        }
        for gathered in (False, True)
        for method in ("book_keeping", "ghost")
        for clipping in ("flat", "per_layer")
    ]
    for own in values(run_ranks(2, spread_tasks.norms_and_sums, cases, kill_s=600.0)):
        for case, found in zip(cases, own, strict=True):
            assert not off(found), (case, found)
