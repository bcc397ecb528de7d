"""Every family by every method, experts over two ranks; tokens travel, or layers: `make ranks`."""

from __future__ import annotations

import pytest

from coterie.models.zoo.catalogue import causal_lm_types
from helpers import spread_tasks
from helpers.rank_processes import run_ranks, values

RANDOM_ROUTING = {"phimoe"}
"""Families that draw their routing in train mode, for each batch anew."""


@pytest.mark.ranks
@pytest.mark.parametrize("family", sorted(causal_lm_types()))
def test_norms_and_sums_are_those_of_one_process_for_every_family(family: str) -> None:
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
            assert found["norms"] <= max(1e-5, 2 * found["norms by batch"]), case
            assert found["sums"] <= max(1e-5, 2 * found["sums by batch"]), case
