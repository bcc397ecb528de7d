"""Experts spread over ranks: what every rank does is, put together, what one process does with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.dp.per_sample.gram import TRUSTED
from helpers import spread_tasks
from helpers.comparing import relative
from helpers.rank_processes import run_ranks, values

TWO: dict[str, dict[str, Any]] = {
    "flat": {},
    "ghost, checkpointing": {"family": "gpt_oss", "method": "ghost", "checkpointing": True},
    "adapters, checkpointing": {"lora": True, "checkpointing": True},
    "adapters of a router, too": {"lora": "router"},
    "adapters of a router, layers gathered": {"lora": "router", "gathered": True, "method": "ghost"},
    "all records at one rank": {"records_of": [list(range(10)), []], "clipping": "per_layer"},
    "rows with a large common part": {"common": True},
    "a record whose loss is no number": {"broken": 4},
    "a rank that would keep its captures, and one that cannot": {"method": "auto", "short_of_memory": 1},
}
FOUR: dict[str, dict[str, Any]] = {
    "ghost, by layer": {"method": "ghost", "clipping": "per_layer"},
    "by group": {"family": "deepseek_v3", "clipping": "per_group"},
    "adapters": {"lora": True, "method": "ghost"},
    "two groups": {"over": 2},
    "two groups, adapters, a group without records": {
        "over": 2, "lora": True, "method": "ghost", "clipping": "per_layer",
        "records_of": [[], [], list(range(7)), [7, 8, 9]],
    },
}  # fmt: skip
FAULTS: dict[str, dict[str, Any]] = {
    "clipped rank by rank": {},
    "exchange over half of the ranks": {},
    "exchange over the wrong group": {"over": 2},
    "dropped tail": {},
    "lost router gradient": {},
    "lost adapters": {"lora": True},
    "records of one rank taken for another's": {},
}


@pytest.fixture(scope="module")
def compared() -> dict[str, list[dict[str, float]]]:
    """What each rank found, by case."""
    found: dict[str, list[dict[str, float]]] = {}
    faults = [{"fault": fault, **options} for fault, options in FAULTS.items()]
    for world, cases, more in ((2, TWO, faults[:0]), (4, FOUR, faults)):
        by_rank = values(run_ranks(world, spread_tasks.norms_and_sums, [*cases.values(), *more]))
        names = [*cases, *(case["fault"] for case in more)]
        found |= {name: [own[place] for own in by_rank] for place, name in enumerate(names)}
    return found


@pytest.mark.parametrize("case", [*TWO, *FOUR])
def test_norms_and_sums_are_those_of_one_process(case: str, compared: dict[str, list[dict[str, float]]]) -> None:
    for found in compared[case]:
        assert found["norms"] <= 1e-5
        assert found["sums"] <= 1e-5


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_planted_faults(fault: str, compared: dict[str, list[dict[str, float]]]) -> None:
    assert not all(max(found.values()) <= 1e-5 for found in compared[fault])


def test_invariant_2_what_all_ranks_add_for_a_record_is_bounded_together_not_rank_by_rank() -> None:
    cases = [
        {}, {"method": "ghost", "common": True}, {"clipping": "per_layer"}, {"fault": "clipped rank by rank"}
    ]  # fmt: skip
    *right, wrong = values(run_ranks(4, spread_tasks.joint_norms, cases))[0]
    for eta, *norms in right:
        assert max(norms) <= 1.0 + eta
        assert min(norms) >= 0.99  # they were clipped
    assert max(wrong[1:]) > 1.2


def test_invariant_2_ranks_that_take_norms_again_end_with_a_whole_that_is_trusted() -> None:
    """Even where one's first value was too large, or each has just what one process would have left alone."""
    cases = [((1.0, 1e-3, 50.0, 100.0), (1.0, 1e-6)), ((0.9, 0.89e-4, 0.1, 0.49e-4), (0.9, 0.1))]
    first, second = values(run_ranks(2, spread_tasks.taken_again, cases))
    assert first == second
    assert max(first) <= TRUSTED


def test_ranks_agree_on_lot_batch_and_method_before_they_compute() -> None:
    one, other = values(run_ranks(2, spread_tasks.disagreeing))
    assert one[0] == other[0]
    assert (
        one[0]
        == "ranks-differ: the ranks differ in the method: rank 0 has ghost, rank 1 book_keeping. batch 1 of 3|0"
    )
    assert one[1].startswith("ranks-out-of-step: rank 1 is at `batch 1 of 4|0`, rank 0 at `batch 1 of 3|0`.")
    assert other[1].startswith("ranks-out-of-step: rank 0 is at `batch 1 of 3|0`, rank 1 at `batch 1 of 4|0`.")


def test_a_record_whose_whole_gradient_is_at_another_rank_is_clipped_by_it() -> None:
    for joint, found, expected in values(run_ranks(2, spread_tasks.only_remote)):
        assert 0.99 <= joint <= 1.0 + 1e-3
        assert found in (0.0, pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize(("family", "world"), [("olmoe", 2), ("gpt_oss", 4)])
def test_plain_gradients_outputs_and_generated_tokens_are_those_of_one_process(family: str, world: int) -> None:
    for found in values(run_ranks(world, spread_tasks.outputs_and_gradients, family)):
        assert found["gradients"] <= 1e-5
        assert found["logits"] <= 1e-5
        assert found["same tokens"]


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {}),
        (4, {"lora": True, "method": "ghost", "clipping": "per_layer", "adaptive_quantile": 0.5}),
        (4, {"over": 2}),
    ],
)
def test_weights_after_rounds_are_those_of_one_process(world: int, options: dict[str, Any], tmp_path: Path) -> None:
    (alone,) = values(run_ranks(1, spread_tasks.train, tmp_path / "alone", {**options, "spread": False}))
    ranks = values(run_ranks(world, spread_tasks.train, tmp_path / "ranks", options))
    for own in ranks:
        assert own["weights"] == ranks[0]["weights"]
        assert own["held"] < alone["held"]
        for expected, found in zip(alone["weights"], own["weights"], strict=True):
            assert relative(torch.tensor(found), torch.tensor(expected)) <= 1e-6
        for (size, loss, clipped, masked), found in zip(alone["figures"], own["figures"], strict=True):
            assert (found[0], found[3]) == (size, masked)
            assert found[1:3] == pytest.approx((loss, clipped), rel=1e-6, nan_ok=True)
    assert ranks[0]["counted"] == alone["counted"] == 3


@pytest.mark.parametrize("lora", [False, True])
def test_seeded_noise_is_the_same_bits_for_any_number_of_ranks(lora: bool, tmp_path: Path) -> None:
    options = {"lora": lora}
    (alone,) = values(run_ranks(1, spread_tasks.noise_alone, tmp_path / "1", {**options, "spread": False}))
    found = [
        own
        for world, over in ((1, 1), (2, 2), (4, 4), (4, 2))
        for own in values(
            run_ranks(world, spread_tasks.noise_alone, tmp_path / f"{world}s{over}", {**options, "over": over})
        )
    ]
    assert len(found) == 11
    assert all(own == alone for own in found)
    assert len({*alone}) > 800
