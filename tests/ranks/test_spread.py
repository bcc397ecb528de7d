"""Experts spread over ranks: norms, sums, plain gradients and outputs are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import spread_tasks
from helpers.comparing import relative
from helpers.rank_processes import run_ranks, values


@pytest.mark.parametrize(
    ("family", "world", "options"),
    [
        ("olmoe", 2, {}),
        ("olmoe", 4, {"clipping": "per_layer", "method": "ghost"}),
        ("olmoe", 2, {"lora": True, "checkpointing": True}),
        ("gpt_oss", 2, {"method": "ghost", "checkpointing": True}),
        ("deepseek_v3", 4, {"clipping": "per_group"}),
        ("olmoe", 2, {"records_of": [list(range(10)), []]}),
    ],
)
def test_norms_and_sums_are_those_of_one_process(family: str, world: int, options: dict[str, Any]) -> None:
    for found in values(run_ranks(world, spread_tasks.norms_and_sums, family, options)):
        assert found["norms"] <= 1e-5
        assert found["sums"] <= 1e-5


@pytest.mark.parametrize(("world", "options"), [(2, {}), (4, {"lora": True, "method": "ghost"})])
def test_weights_after_rounds_are_those_of_one_process(world: int, options: dict[str, Any], tmp_path: Path) -> None:
    (alone,) = values(run_ranks(1, spread_tasks.train, tmp_path / "alone", options | {"spread": False}))
    ranks = values(run_ranks(world, spread_tasks.train, tmp_path / "ranks", options))
    for own in ranks:
        assert own["weights"] == ranks[0]["weights"]
        assert own["held"] < alone["held"]
        for expected, found in zip(alone["weights"], own["weights"], strict=True):
            assert relative(torch.tensor(found), torch.tensor(expected)) <= 1e-6
        for (size, loss, clipped, masked), found in zip(alone["figures"], own["figures"], strict=True):
            assert (found[0], found[3]) == (size, masked)
            assert found[1:3] == pytest.approx((loss, clipped), rel=1e-6)
    assert ranks[0]["counted"] == alone["counted"] == 3


@pytest.mark.parametrize("lora", [False, True])
def test_seeded_noise_is_the_same_bits_for_any_number_of_ranks(lora: bool, tmp_path: Path) -> None:
    options = {"lora": lora}
    (alone,) = values(run_ranks(1, spread_tasks.noise_alone, tmp_path / "1", options | {"spread": False}))
    found = [
        own
        for world in (1, 2, 4)
        for own in values(run_ranks(world, spread_tasks.noise_alone, tmp_path / f"{world}s", options))
    ]
    assert len(found) == 7
    assert all(own == alone for own in found)
    assert len({*alone}) > 1000
