"""A private session over several ranks is the session of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.dp.noise.discrete_gaussian import calibrate
from helpers import rank_tasks
from helpers.comparing import relative
from helpers.rank_processes import run_ranks, values

FAMILIES = ["olmoe", "gpt_oss", "deepseek_v3", "qwen3_next"]


def trained(world: int, folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    return values(run_ranks(world, rank_tasks.train, folder, *arguments))


@pytest.mark.parametrize(
    ("family", "world", "clipping"), [*((family, 2, "flat") for family in FAMILIES), ("olmoe", 4, "per_layer")]
)
def test_norms_and_sums_are_those_of_one_process(family: str, world: int, clipping: str) -> None:
    for found in values(run_ranks(world, rank_tasks.norms_and_sums, family, clipping)):
        assert found["norms"] <= 1e-5
        assert found["sums"] <= 1e-5


@pytest.mark.parametrize("world", [2, 4])
def test_weights_after_rounds_are_those_of_one_process_and_the_same_bits_at_every_rank(
    world: int, tmp_path: Path
) -> None:
    (alone,) = trained(1, tmp_path / "alone")
    ranks = trained(world, tmp_path / "ranks")
    assert len(alone["weights"]) == 4
    for own in ranks:
        assert own["weights"] == ranks[0]["weights"]
        for expected, found in zip(alone["weights"], own["weights"], strict=True):
            assert relative(torch.tensor(found), torch.tensor(expected)) <= 1e-6
        for (size, loss, clipped, masked), found in zip(alone["figures"], own["figures"], strict=True):
            assert (found[0], found[3]) == (size, masked)
            assert found[1:3] == pytest.approx((loss, clipped), rel=1e-6)
    assert ranks[0]["counted"] == alone["counted"] == 4
    assert sum(own["kept"] for own in ranks) == alone["kept"]  # each parameter's moments at its owner alone
    assert max(own["kept"] for own in ranks) <= 0.55 * alone["kept"]


def test_seeded_noise_is_the_same_bits_for_any_number_of_ranks(tmp_path: Path) -> None:
    found = [
        own for world in (1, 2, 4) for own in values(run_ranks(world, rank_tasks.noise_alone, tmp_path / str(world)))
    ]
    assert len(found) == 7
    assert all(own == found[0] for own in found)
    assert len({*found[0]}) > 1000


@pytest.mark.parametrize("world", [2, 4])
def test_secret_noise_has_the_deviation_of_one_process_and_the_same_values_at_every_rank(
    world: int, tmp_path: Path
) -> None:
    ranks = values(run_ranks(world, rank_tasks.noise_alone, tmp_path, None))
    assert all(own == ranks[0] for own in ranks)
    noise = torch.tensor(ranks[0], dtype=torch.float64)
    sigma, sensitivity = values(run_ranks(1, rank_tasks.noise_needed, tmp_path / "alone"))[0]
    expected = calibrate(sigma, sensitivity, len(noise)) / rank_tasks.LOT
    assert float(noise.std()) == pytest.approx(expected, rel=0.08)  # 1,320 values: three deviations are 0.06
    for part in noise.chunk(4):  # whoever owned it
        assert float(part.std()) == pytest.approx(expected, rel=0.16)


@pytest.mark.parametrize("isolation", ["fast", "exact"])
def test_ranks_without_records_empty_lots_and_broken_records(isolation: str, tmp_path: Path) -> None:
    options = {"lot_size": 1, "rounds": 6, "isolation": isolation, "broken": 14}
    (alone,) = values(run_ranks(1, rank_tasks.train_with, tmp_path / "alone", options))
    ranks = values(run_ranks(3, rank_tasks.train_with, tmp_path / "ranks", options))
    sizes = [figures[0] for figures in alone["figures"]]
    assert 0 in sizes
    assert any(0 < size < 3 for size in sizes)
    assert sum(figures[3] for figures in alone["figures"]) > 0
    for own in ranks:
        assert own["weights"] == ranks[0]["weights"]
        assert relative(torch.tensor(own["weights"][-1]), torch.tensor(alone["weights"][-1])) <= 1e-6
        assert [f[::3] for f in own["figures"]] == [f[::3] for f in alone["figures"]]
    if isolation == "exact":
        assert ranks[0]["weights"] == alone["weights"]


@pytest.mark.parametrize(
    "options",
    [
        {"users": [f"u{i % 7}" for i in range(24)], "records_per_user": 2, "lot_size": 4},
        {"adaptive_quantile": 0.5, "clipping": "per_layer"},
        {"sampler": "truncated_poisson"},
    ],
    ids=["users", "adaptive", "truncated"],
)
def test_users_adaptive_norms_and_truncated_lots_are_those_of_one_process(
    options: dict[str, Any], tmp_path: Path
) -> None:
    (alone,) = values(run_ranks(1, rank_tasks.train_with, tmp_path / "alone", options))
    for own in values(run_ranks(2, rank_tasks.train_with, tmp_path / "ranks", options)):
        assert relative(torch.tensor(own["weights"][-1]), torch.tensor(alone["weights"][-1])) <= 1e-6


def test_a_result_that_is_still_being_synced_is_looked_for_once_that_is_done(tmp_path: Path) -> None:
    assert values(run_ranks(2, rank_tasks.looked_for_at_once, tmp_path)) == [[True, True]] * 2


@pytest.mark.parametrize("fault", sorted(rank_tasks.FAULTS))
def test_the_comparisons_see_planted_faults(fault: str, tmp_path: Path) -> None:
    (alone,) = values(run_ranks(1, rank_tasks.train_with, tmp_path / "alone", {}))
    for own in values(run_ranks(2, rank_tasks.train_with, tmp_path / "ranks", {"fault": fault})):
        found = relative(torch.tensor(own["weights"][-1]), torch.tensor(alone["weights"][-1]))
        assert not found <= 1e-6  # Adam's first step is little more than the signs of what it is given
