"""A party of several ranks in a federation: the federation is what it would be with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.cli import ranks as ranks_command
from coterie.cli.ranks import start_party_if_asked
from coterie.config import FederationConfig, PartyConfig, dump_yaml
from coterie.errors import CoterieError
from coterie.training.party.process import check_on_cpu
from helpers import party_tasks
from helpers.comparing import relative
from helpers.rank_processes import run_ranks, values

LORA = {"rank": 2, "alpha": 4.0, "modules": ["q_proj"]}
STAGES = [
    (0, "lot 1|0", "before"),
    (1, "lot 3|0", "done"),
    (1, "spool 3|0", "done"),
    (0, "spool 3|0", "told"),
    (0, "count 3|0", "told"),
    (1, "count 4|0", "told"),
]
"""Who is killed, at which step, and when. After `count` sums are on disk and counted, and nothing has left."""
SHORT = {"train__rounds": 2}
KINDS = [
    ("fast", SHORT),
    ("private", {**SHORT, "trunk": "private"}),
    ("plain", SHORT),
    ("plain", {**SHORT, "lora": LORA}),
    ("balanced", SHORT),
    ("masked", SHORT),
]


def party(folder: Path, exchange: str = "experts", **changes: Any) -> PartyConfig:
    """A party.yaml beside the federation.yaml that it names."""
    federation = {
        "name": "grove", "model": {"family": "olmoe"}, "exchange": exchange, "privacy": "none",
        "train": {"rounds": 2},
        "parties": {"alder": {"endpoint": "127.0.0.1:7000"}, "birch": {"endpoint": "127.0.0.1:7001"}},
        "coordinator": {"endpoint": "127.0.0.1:7002"},
    }  # fmt: skip
    dump_yaml(folder / "federation.yaml", FederationConfig.model_validate(federation))
    return PartyConfig.model_validate(
        {
            "party": "alder",
            "federation": folder / "federation.yaml",
            "kit": "kit",
            "trunk": "trunk",
            "shard": "shard",
            "run_dir": "run",
            "data": {"train": ["notes.jsonl"]},
            "device": "cpu",
            **changes,
        }
    )


def refused(config: PartyConfig) -> str:
    with pytest.raises(CoterieError) as caught:
        start_party_if_asked(config, ["up"])
    assert str(caught.value).count("\n") <= 5
    return caught.value.code


def test_what_a_party_of_several_ranks_cannot_do_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_command, "_run", lambda count, arguments: pytest.fail("ranks were started"))
    assert refused(party(tmp_path, "tokens", devices=2)) == "config-devices"
    monkeypatch.setattr(ranks_command, "_cores", lambda: 2)
    assert refused(party(tmp_path, devices=3)) == "ranks-cores"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for devices in (1, 2):
        assert refused(party(tmp_path, devices=devices)) == "ranks-missing"


def test_several_ranks_of_a_party_are_refused_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_on_cpu(party(tmp_path, devices=1, device="auto"))
    check_on_cpu(party(tmp_path, devices=2))
    with pytest.raises(CoterieError, match="CPUs only") as caught:
        check_on_cpu(party(tmp_path, devices=2, device="auto"))
    assert caught.value.code == "ranks-device"


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of what any party stores, over its size."""
    return max(
        relative(torch.tensor(found["stored"][name][key]), torch.tensor(value))
        for name, stored in expected["stored"].items()
        for key, value in stored.items()
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A private federation whose parties are one process each."""
    return values(run_ranks(1, party_tasks.federation, tmp_path_factory.mktemp("alone"), "private", SHORT))[0]


@pytest.mark.slow
def test_a_party_of_two_ranks_gives_the_federation_that_one_rank_gives(alone: Any, tmp_path: Path) -> None:
    found = values(run_ranks(2, party_tasks.federation, tmp_path, "private", SHORT))
    assert found[0]["trunk"] == found[1]["trunk"]
    assert worst(found[0], alone) <= 1e-6
    assert found[0]["privacy"] == alone["privacy"]
    assert found[0]["counted"] == alone["counted"] == [(1, 0), (2, 0)]


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_so_it_does_whatever_the_parties_agreed_on(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    one, two = (
        values(run_ranks(world, party_tasks.federation, tmp_path / str(world), kind, changes)) for world in (1, 2)
    )
    assert two[0]["trunk"] == two[1]["trunk"]
    assert worst(two[0], one[0]) <= 1e-6
    assert two[0]["privacy"] == one[0]["privacy"]
    assert two[0]["counted"] == one[0]["counted"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["noise at every rank", "missing exchange"])
def test_planted_faults_are_seen(fault: str, alone: Any, tmp_path: Path) -> None:
    found = values(run_ranks(2, party_tasks.faulty, tmp_path, "private", SHORT, fault))
    assert worst(found[0], alone) > 1e-3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A longer one where one party has two ranks."""
    return values(run_ranks(2, party_tasks.federation, tmp_path_factory.mktemp("whole"), "private", {}))[0]


@pytest.mark.ranks
@pytest.mark.parametrize(("rank", "step", "when"), STAGES)
def test_invariant_8_a_party_whose_rank_was_killed_goes_on_and_the_federation_ends_as_if_nothing_had_been(
    rank: int, step: str, when: str, tmp_path: Path, whole: Any
) -> None:
    ended = run_ranks(2, party_tasks.deadly, tmp_path, "private", {}, rank, step, when, patience_s=10.0)
    assert ended[rank].exit == -9
    assert ended[1 - rank].error is not None
    assert ended[1 - rank].error.startswith("ranks-")
    again = values(run_ranks(2, party_tasks.federation, tmp_path, "private", {}, attempt=1))
    assert again[0]["counted"] == whole["counted"] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert again[0]["trunk"] == again[1]["trunk"] == whole["trunk"]
    assert again[0]["stored"] == whole["stored"]
