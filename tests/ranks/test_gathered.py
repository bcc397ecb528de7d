"""Whole layers gathered from ranks: what each computes for its own records is, added up, what one process does.

What takes long has the mark `ranks`: noise, owners, spool and checkpoints are those of experts over ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import spread_tasks
from helpers.comparing import relative
from helpers.rank_processes import run_ranks, values
from helpers.rank_tasks import SLAB

TWO: dict[str, dict[str, Any]] = {
    "flat": {},
    "ghost, checkpointing": {"family": "gpt_oss", "method": "ghost", "checkpointing": True},
    "adapters, checkpointing": {"lora": True, "checkpointing": True},
    "all records at one rank": {"records_of": [list(range(10)), []], "clipping": "per_layer"},
}
MORE: dict[str, dict[str, Any]] = {
    "a record whose loss is no number": {"broken": 4, "method": "ghost"},
    "a rank that would keep its captures, and one that cannot": {"method": "auto", "short_of_memory": 1},
}
FOUR: dict[str, dict[str, Any]] = {
    "by group": {"family": "deepseek_v3", "clipping": "per_group"},
    "two groups, adapters, a group without records": {
        "over": 2, "lora": True, "method": "ghost", "clipping": "per_layer",
        "records_of": [[], [], list(range(7)), [7, 8, 9]],
    },
}  # fmt: skip
FAULTS = ("another layer", "the tail of a layer", "sums that stay at home", "sums averaged")
GATHERED = {"gathered": True}


def compare(world: int, cases: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """What each rank found, by case."""
    by_rank = values(run_ranks(world, spread_tasks.norms_and_sums, [{**GATHERED, **case} for case in cases.values()]))
    return {name: [own[place] for own in by_rank] for place, name in enumerate(cases)}


@pytest.fixture(scope="module")
def compared() -> dict[str, list[dict[str, float]]]:
    return compare(2, TWO | {fault: {"fault": fault} for fault in FAULTS})


@pytest.mark.parametrize("case", TWO)
def test_norms_and_sums_are_those_of_one_process(case: str, compared: dict[str, list[dict[str, float]]]) -> None:
    for found in compared[case]:
        assert found["norms"] <= 1e-5
        assert found["sums"] <= 1e-5


@pytest.mark.ranks
def test_norms_and_sums_are_those_of_one_process_over_groups_and_with_other_methods() -> None:
    for name, by_rank in (compare(2, MORE) | compare(4, FOUR)).items():
        assert all(max(found.values()) <= 1e-5 for found in by_rank), name


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_planted_faults(fault: str, compared: dict[str, list[dict[str, float]]]) -> None:
    assert not all(max(found.values()) <= 1e-5 for found in compared[fault])


def test_invariant_2_what_goes_to_all_owners_for_a_record_is_bounded_together() -> None:
    cases = [GATHERED, {**GATHERED, "method": "ghost", "common": True}]
    for eta, *norms in values(run_ranks(2, spread_tasks.joint_norms, cases))[0]:
        assert 0.99 <= min(norms) <= max(norms) <= 1.0 + eta


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(2, {}, id="two ranks"),
        pytest.param(
            4,
            {"over": 2, "lora": True, "method": "ghost", "clipping": "per_layer", "adaptive_quantile": 0.5},
            id="two groups, adapters",
            marks=pytest.mark.ranks,
        ),
        pytest.param(
            3,
            {"lot_size": 1, "rounds": 5, "broken": 14},
            id="empty lots, ranks without records, a broken record",
            marks=pytest.mark.ranks,
        ),
    ],
)
def test_weights_after_rounds_are_those_of_one_process(world: int, options: dict[str, Any], tmp_path: Path) -> None:
    (alone,) = values(run_ranks(1, spread_tasks.train, tmp_path / "alone", {**options, "over": 1, "spread": False}))
    for own in values(run_ranks(world, spread_tasks.train, tmp_path / "ranks", {**GATHERED, **options})):
        for expected, found in zip(alone["weights"], own["weights"], strict=True):
            assert relative(torch.tensor(found), torch.tensor(expected)) <= 1e-6
        assert [figures[::3] for figures in own["figures"]] == [figures[::3] for figures in alone["figures"]]
        assert own["counted"] in (None, alone["counted"])


@pytest.mark.ranks
def test_weights_of_an_earlier_round_are_seen_by_that_comparison(tmp_path: Path) -> None:
    (alone,) = values(run_ranks(1, spread_tasks.train, tmp_path / "alone", {"spread": False}))
    options = {**GATHERED, "fault": "weights of an earlier round"}
    for own in values(run_ranks(2, spread_tasks.train, tmp_path / "ranks", options)):
        assert relative(torch.tensor(own["weights"][-1]), torch.tensor(alone["weights"][-1])) > 1e-6


@pytest.mark.ranks
def test_seeded_noise_is_the_same_bits_as_in_one_process(tmp_path: Path) -> None:
    (alone,) = values(run_ranks(1, spread_tasks.noise_alone, tmp_path / "1", {"spread": False}))
    for world, over in ((2, 2), (4, 2)):
        options = {**GATHERED, "over": over}
        for own in values(run_ranks(world, spread_tasks.noise_alone, tmp_path / f"{world}", options)):
            assert own == alone


@pytest.mark.ranks
def test_what_a_rank_has_of_experts_falls_as_ranks_come(tmp_path: Path) -> None:
    model = spread_tasks.small()
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    everything = sum(p.numel() for p in model.parameters())
    for world in (2, 3):
        ranks = values(run_ranks(world, spread_tasks.held, tmp_path / str(world), GATHERED))
        for own in ranks:
            assert own["weights"] == own["sums"] == everything - experts + experts // world
        assert sum(own["state"] for own in ranks) == 2 * everything


def test_a_rank_has_one_layer_whole_at_a_time() -> None:
    """With a second backward for the sums, also the sum of one of its matrices."""
    for most, layer, _ in values(run_ranks(2, spread_tasks.whole_at_once, {})):
        assert most == layer
    for most, layer, matrix in values(run_ranks(2, spread_tasks.whole_at_once, {"method": "ghost"})):
        assert layer < most <= layer + matrix


@pytest.mark.ranks
@pytest.mark.parametrize(("step", "world", "spread"), [("count 2|0", 4, True), ("batch 2 of 2|0", 2, False)])
def test_invariant_8_a_run_goes_on_with_any_number_of_ranks_after_one_was_killed(
    step: str, world: int, spread: bool, tmp_path: Path
) -> None:
    """In a release, and in the middle of a lot: with more ranks, and with whole models."""
    (whole,) = values(run_ranks(1, spread_tasks.resumable, tmp_path / "whole", False))
    folder, killed = tmp_path / "ranks", (SLAB, False, None, True)
    ended = run_ranks(2, spread_tasks.deadly, folder, step, *killed, patience_s=5.0)
    assert ended[1].exit == -9
    how = (spread, SLAB, False, None, spread)
    for own in values(run_ranks(world, spread_tasks.resumable, folder, *how, attempt=1)):
        assert relative(torch.tensor(own["weights"]), torch.tensor(whole["weights"])) <= 1e-6
        assert own["counted"] in (None, whole["counted"])


@pytest.mark.ranks
def test_a_rank_that_fails_while_another_waits_for_a_layer_lets_all_raise_the_same(tmp_path: Path) -> None:
    for each in run_ranks(2, spread_tasks.failing, tmp_path, True):
        assert each.error is not None
        assert "the memory of rank 1" in each.error


def test_ranks_that_gather_other_layers_are_refused() -> None:
    for each in run_ranks(2, spread_tasks.another_layer_than_the_others, patience_s=5.0):
        assert each.error is not None
        assert each.error.startswith("ranks-out-of-step: rank ")
