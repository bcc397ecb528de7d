"""Experts spread over ranks: what every rank does is, put together, what one process does with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.dp.noise.discrete_gaussian import calibrate
from helpers import spread_tasks
from helpers.comparing import relative
from helpers.rank_processes import run_ranks, values

TWO: dict[str, dict[str, Any]] = {
    "flat": {},
    "ghost, checkpointing": {"family": "gpt_oss", "method": "ghost", "checkpointing": True},
    "adapters, checkpointing": {"lora": True, "checkpointing": True},
    "all records at one rank": {"records_of": [list(range(10)), []], "clipping": "per_layer"},
    "rows with a large common part": {"common": True},
    "a record whose loss is no number": {"broken": 4},
    "a rank that would keep its captures, and one that cannot": {"method": ["book_keeping", "ghost"]},
}
FOUR: dict[str, dict[str, Any]] = {
    "ghost, by layer": {"method": "ghost", "clipping": "per_layer"},
    "by group": {"family": "deepseek_v3", "clipping": "per_group"},
    "adapters": {"lora": True, "method": "ghost"},
}
FAULTS: dict[str, dict[str, Any]] = {
    "clipped rank by rank": {},
    "exchange over half of the ranks": {},
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
        (3, {"lot_size": 1, "rounds": 5, "broken": 14}),
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
    assert ranks[0]["counted"] == alone["counted"] == len(alone["weights"])
    if "broken" in options:
        assert min(figures[0] for figures in alone["figures"]) == 0
        assert sum(figures[3] for figures in alone["figures"]) > 0


def test_noise_at_every_rank_is_seen_by_that_comparison(tmp_path: Path) -> None:
    (alone,) = values(run_ranks(1, spread_tasks.train, tmp_path / "alone", {"spread": False, "rounds": 1}))
    options = {"fault": "noise at every rank", "rounds": 1}
    for own in values(run_ranks(2, spread_tasks.train, tmp_path / "ranks", options)):
        assert relative(torch.tensor(own["weights"][0]), torch.tensor(alone["weights"][0])) > 1e-6


@pytest.mark.parametrize("lora", [False, True])
def test_seeded_noise_is_the_same_bits_for_any_number_of_ranks(lora: bool, tmp_path: Path) -> None:
    options = {"lora": lora}
    (alone,) = values(run_ranks(1, spread_tasks.noise_alone, tmp_path / "1", {**options, "spread": False}))
    found = [
        own
        for world in (1, 2, 4)
        for own in values(run_ranks(world, spread_tasks.noise_alone, tmp_path / f"{world}s", options))
    ]
    assert len(found) == 7
    assert all(own == alone for own in found)
    assert len({*alone}) > 800


def test_secret_noise_has_the_deviation_of_one_process_and_every_value_has_its_own(tmp_path: Path) -> None:
    ranks = values(run_ranks(2, spread_tasks.noise_alone, tmp_path, {"seed": None}))
    assert ranks[0] == ranks[1]
    noise = torch.tensor(ranks[0], dtype=torch.float64)
    sigma, sensitivity = values(run_ranks(1, spread_tasks.noise_needed, tmp_path / "alone"))[0]
    expected = calibrate(sigma, sensitivity, len(noise)) / spread_tasks.LOT
    assert float(noise.std()) == pytest.approx(expected, rel=0.05)
    assert len(torch.unique(noise)) > 0.95 * len(noise)


@pytest.mark.parametrize(("step", "worlds"), [("count 2|0", (1, 2, 4)), ("spool 2|0", (2,))])
def test_invariant_8_a_run_goes_on_with_any_number_of_ranks_after_one_was_killed(
    step: str, worlds: tuple[int, ...], tmp_path: Path
) -> None:
    (whole,) = values(run_ranks(1, spread_tasks.resumable, tmp_path / "whole"))
    for world in worlds:
        folder = tmp_path / str(world)
        ended = run_ranks(2, spread_tasks.deadly, folder, step, patience_s=5.0)
        assert ended[1].exit == -9
        for own in values(run_ranks(world, spread_tasks.resumable, folder, attempt=1)):
            assert relative(torch.tensor(own["weights"]), torch.tensor(whole["weights"])) <= 1e-6
            assert own["counted"] in (None, whole["counted"])


def test_a_checkpoint_of_several_ranks_is_read_by_one_with_the_whole_model(tmp_path: Path) -> None:
    (whole,) = values(run_ranks(1, spread_tasks.resumable, tmp_path / "whole", False))
    run_ranks(2, spread_tasks.deadly, tmp_path / "ranks", "count 3|0", patience_s=5.0)
    (own,) = values(run_ranks(1, spread_tasks.resumable, tmp_path / "ranks", False, attempt=1))
    assert relative(torch.tensor(own["weights"]), torch.tensor(whole["weights"])) <= 1e-6


def test_a_rank_that_fails_in_the_middle_of_a_batch_lets_all_raise_the_same(tmp_path: Path) -> None:
    for each in run_ranks(2, spread_tasks.failing, tmp_path):
        assert each.error is not None
        assert "the memory of rank 1" in each.error


def test_a_rank_that_runs_the_model_less_often_is_named_instead_of_waited_for() -> None:
    first, second = run_ranks(2, spread_tasks.uneven, patience_s=2.0)
    assert first.error is not None
    assert second.error is not None
    assert first.error.startswith("ranks-out-of-step: rank 1 has gone on, and rank 0 waits for it")
