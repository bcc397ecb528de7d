"""A party whose experts are over its ranks, in a federation: the federation is what it would be with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from coterie.config import FederationConfig, PartyConfig
from coterie.config.federation import check_devices
from coterie.dp.noise.joint_noise import LOAD, WITHIN
from coterie.errors import CoterieError
from helpers import party_tasks
from helpers.comparing import relative
from helpers.federation_commands import folder as folder
from helpers.federation_commands import made as made
from helpers.federation_commands import with_a_budget
from helpers.rank_processes import run_ranks, values

OVER = {"train__rounds": 2, "experts_over": 2}
LORA = {"rank": 2, "alpha": 4.0, "modules": ["q_proj"]}
KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("fast", OVER, 4),
    ("fast", {**OVER, "trunk": "private"}, 2),
    ("fast", {**OVER, "lora": LORA}, 4),
    ("fast", {**OVER, "privacy__clipping": "per_layer", "experts_over": 3}, 3),
    ("fast", {**OVER, "push_after_s": 0.2, "privacy__sampler": "truncated_poisson", "privacy__max_lot": 8}, 2),
    ("fast", {**OVER, "model__gradient_checkpointing": True}, 2),
    ("fast", {**OVER, "own": {"adaptive_quantile": 0.5}}, 2),
    ("masked", OVER, 2),
    ("masked", {**OVER, "lora": LORA}, 2),
    ("masked", {**OVER, "noise": "shared", "colluding": 1}, 2),
    ("balanced", OVER, 4),
    ("plain", OVER, 4),
    ("plain", {**OVER, "experts_over": 3}, 3),
    ("plain", {**OVER, "lora": LORA}, 2),
    ("plain", {**OVER, "aggregation": "masked"}, 2),
]
"""What the parties agreed on, and how many ranks one of them has."""
FAULTS = {
    "clipped rank by rank": 2,
    "dropped tail": 2,
    "lost router gradient": 2,
    "records of one rank taken for another's": 2,
    "a replica's sums twice": 4,
}
STAGES = [
    (0, "lot 1|0", "before"),
    (1, "the next batch", "told"),
    (0, "batch 1 of 3|0", "told"),
    (1, "lot 3|0", "done"),
    (1, "spool 3|0", "done"),
    (0, "count 3|0", "told"),
    (1, "count 4|0", "told"),
    (1, "who has which sums", "told"),
]
"""Who is killed, at which step, and when."""
LONG = {"experts_over": 2}


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of what any party stores, over its size; of second moments, which are squares, their
    roots are compared."""
    return max(
        relative(*(torch.tensor(each).sqrt() if "_sq" in key else torch.tensor(each) for each in pair))
        for name, stored in expected["stored"].items()
        for key, value in stored.items()
        for pair in [(found["stored"][name][key], value)]
    )


def assert_one_federation(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """The same weights everywhere, the same promise; every value lies once but what each rank needs the release of,
    and each rank has its share."""
    assert worst(found[0], alone) <= 1e-6
    assert all(each["trunks"] == found[0]["trunks"] != [] for each in found)
    assert found[0]["privacy"] == alone["privacy"]
    assert found[0]["counted"] == alone["counted"]
    for own in zip(*[each["own"] for each in found], strict=True):
        names = [name for each in own for name in each if not {LOAD, WITHIN} & set(name.split())]
        assert sorted(names) == sorted(set(names))
        sizes = [sum(each.values()) for each in own]
        assert max(sizes) <= 1.3 * sum(sizes) / len(sizes)


RULES = {"epsilon": 8.0, "lot_size": 4, "isolation": "fast"}


@pytest.mark.parametrize(
    ("changes", "own", "code"),
    [
        ({"exchange": "tokens"}, {}, "config-devices"),
        ({"privacy": {**RULES, "isolation": "exact"}}, {}, "dp-spread-exact"),
        ({"privacy": {"epsilon": 8.0}}, {}, "dp-spread-exact"),
        ({"privacy": {**RULES, "noise_bands": 2}, "optim": {"kind": "sgd"}}, {}, "dp-spread-bands"),
        ({"privacy": {**RULES, "unit": "user"}}, {"privacy": {"user_column": "who"}}, "dp-spread-users"),
    ],
)
def test_what_cannot_be_is_refused_where_the_settings_are_read(
    changes: dict[str, Any], own: dict[str, Any], code: str
) -> None:
    with pytest.raises(CoterieError) as caught:
        check_devices(party(**own), shared(**changes))
    assert caught.value.code == code
    assert str(caught.value).count("\n") <= 5
    check_devices(party(**own, experts_over=1), shared(**changes))


@pytest.mark.parametrize("changes", [{}, {"privacy": RULES}])
def test_what_can_be_is_not(changes: dict[str, Any]) -> None:
    check_devices(party(), shared(**changes))


def test_groups_are_whole_and_layers_need_no_setting() -> None:
    assert party(devices=4).ranks == 4
    assert party().ranks == 2
    with pytest.raises(ValidationError, match="`experts_over` is 2 and `devices` 3"):
        party(devices=3)
    with pytest.raises(ValidationError, match="`devices: N` shares out the records"):
        party(layers_over=2)


def shared(**changes: Any) -> FederationConfig:
    return FederationConfig.model_validate({
        "name": "grove", "model": {"family": "olmoe"}, "exchange": "experts", "privacy": "none",
        "train": {"rounds": 2},
        "parties": {"alder": {"endpoint": "127.0.0.1:7000"}, "birch": {"endpoint": "127.0.0.1:7001"}},
        "coordinator": {"endpoint": "127.0.0.1:7002"}, **changes,
    })  # fmt: skip


def party(**changes: Any) -> PartyConfig:
    files = dict.fromkeys(("federation", "kit", "trunk", "shard", "run_dir"), "x")
    return PartyConfig.model_validate(
        {"party": "alder", "data": {"train": ["notes.jsonl"]}, "experts_over": 2, **files} | changes
    )


@pytest.mark.slow
def test_a_party_whose_experts_are_over_its_ranks_is_checked_as_it_is_from_its_files_on(folder: Path) -> None:
    """Every rank compares its own experts with batches of one; then all push what one process pushes."""
    with_a_budget(folder, experts_over=2, device="cpu")
    gateway, helper = values(run_ranks(2, party_tasks.checked, folder))
    assert gateway[0] == helper[0] == 1
    assert gateway[1] <= 1e-6


@pytest.mark.slow
def test_what_a_party_with_experts_over_two_ranks_pushes_is_what_one_process_pushes(tmp_path: Path) -> None:
    """With the same noise, without any, and of adapters."""
    kinds: list[tuple[str, dict[str, Any]]] = [("fast", {}), ("plain", {}), ("plain", {"lora": LORA})]
    gateway, _ = values(run_ranks(2, party_tasks.one_round, tmp_path, kinds))
    assert len(gateway) == len(kinds)
    assert gateway[0] <= 1e-6
    assert max(gateway) <= 1e-5


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "changes", "ranks"), KINDS)
def test_a_party_with_experts_over_ranks_gives_the_federation_that_one_process_gives(
    kind: str, changes: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    one, several = (
        values(run_ranks(world, party_tasks.federation, tmp_path / str(world), kind, changes)) for world in (1, ranks)
    )
    assert_one_federation(several, one[0])


@pytest.mark.ranks
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen_before_anything_is_spent(fault: str, tmp_path: Path) -> None:
    for each in run_ranks(
        FAULTS[fault], party_tasks.wrongly_exchanged, tmp_path, "fast", OVER, fault, patience_s=10.0
    ):
        assert each.error is not None
        assert each.error.startswith("ranks-computed")
    assert party_tasks.counted(tmp_path) == []


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "ranks"), [("fast", 2), ("fast", 4), ("plain", 2), ("plain", 4)])
def test_an_attempt_that_is_given_up_in_the_middle_of_a_lot_is_followed_by_another(
    kind: str, ranks: int, tmp_path: Path
) -> None:
    alone, several = (
        values(run_ranks(world, party_tasks.interrupted, tmp_path / str(world), kind, OVER)) for world in (1, ranks)
    )
    assert [each["interrupted"] for each in several] == [1, *[0] * (ranks - 1)]
    assert worst(several[0], alone[0]) <= 1e-6
    assert several[0]["counted"] == alone[0]["counted"]


@pytest.mark.ranks
def test_a_rank_that_fails_while_others_wait_for_its_rows_ends_all(tmp_path: Path) -> None:
    for each in run_ranks(2, party_tasks.losing_layers, tmp_path, "fast", OVER, patience_s=10.0):
        assert each.error is not None
        assert each.error.startswith("ranks-failed: rank 1 failed while other ranks waited for its rows")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.ranks)])
def test_what_a_rank_refuses_before_rows_cross_ends_all_with_its_words_code_and_fix(
    ranks: int, tmp_path: Path
) -> None:
    for each in run_ranks(ranks, party_tasks.refusing, tmp_path, 2, patience_s=10.0):
        assert each.error is not None
        assert each.error.startswith("dp-loss: the loss mixes records.\n")
        assert "use a loss of one record each" in each.error


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A longer one, never interrupted."""
    return values(run_ranks(2, party_tasks.federation, tmp_path_factory.mktemp("whole"), "fast", LONG))[0]


@pytest.mark.ranks
@pytest.mark.parametrize(("rank", "step", "when"), STAGES)
def test_invariant_8_a_party_whose_rank_was_killed_goes_on_and_the_federation_ends_as_if_nothing_had_been(
    rank: int, step: str, when: str, tmp_path: Path, whole: Any
) -> None:
    ended = run_ranks(2, party_tasks.deadly, tmp_path, "fast", LONG, rank, step, when, patience_s=10.0)
    assert ended[rank].exit == -9
    assert ended[1 - rank].error is not None
    assert ended[1 - rank].error.startswith("ranks-")
    again = values(run_ranks(2, party_tasks.federation, tmp_path, "fast", LONG, attempt=1))
    assert again[0]["counted"] == whole["counted"] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert again[0]["trunk"] == whole["trunk"]
    assert again[0]["trunks"] == again[1]["trunks"] != []
    assert again[0]["stored"] == whole["stored"]


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "over"), [(1, 1), (2, 1), (3, 3), (4, 2)])
def test_what_was_counted_is_pushed_byte_for_byte_by_ranks_in_any_shape(
    world: int, over: int, tmp_path: Path, whole: Any
) -> None:
    run_ranks(2, party_tasks.deadly, tmp_path, "fast", LONG, 1, "count 4|0", "told", patience_s=10.0)
    again = values(run_ranks(world, party_tasks.federation, tmp_path, "fast", {"experts_over": over}, attempt=1))
    assert again[0]["counted"] == whole["counted"]
    assert again[0]["stored"] == whole["stored"]


@pytest.mark.ranks
@pytest.mark.parametrize(("step", "world", "over"), [("lot 3|0", 1, 1), ("lot 3|0", 3, 3), ("count 2|0", 2, 2)])
def test_what_whole_layers_began_spread_experts_go_on_with_and_the_other_way_round(
    step: str, world: int, over: int, tmp_path: Path, whole: Any
) -> None:
    first = {"experts_over": 1 if over == 2 else 2}
    run_ranks(2, party_tasks.deadly, tmp_path, "fast", first, 1, step, "told", patience_s=10.0)
    again = values(run_ranks(world, party_tasks.federation, tmp_path, "fast", {"experts_over": over}, attempt=1))
    assert again[0]["counted"] == whole["counted"]
    assert worst(again[0], whole) <= 1e-6
