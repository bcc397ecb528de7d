"""Whole runs through a hub that works against them, and through one that goes away: real members, sites and tunnels.

The hub is not FLARE's, whose place it takes. A connection into which it put a false byte ends, as does one of which
it kept a piece back; members dial anew and try the round again. So what counts is how many messages pass between two
such faults: where the hub leaves no stretch alone that is as long as a try at a round, no try ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coterie.demonstration.processes import Processes
from coterie.federation.rounds.run_folder import read_status
from helpers.federation_processes import PARTIES, make_folder
from helpers.hostile_hub import FAULTS, Hub, Sites

pytestmark = pytest.mark.faults

ROUNDS, EVERY = 6, 150
ENDS_S = 600.0


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("processes")) as started:
        yield started


@pytest.fixture(scope="module")
def agreed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody listens at the endpoints that are agreed on: who dialled them would not arrive."""
    folder = tmp_path_factory.mktemp("agreed") / "grove"
    make_folder(
        folder,
        [f"127.0.0.1:{port}" for port in (1, 2, 3, 4)],
        exchange="experts",
        trunk="shared",
        privacy="none",
        train={"rounds": ROUNDS, "batch_size": 4, "micro_batch": 2, "eval_every": 0, "checkpoint_every": 1},
        deadline_s=20.0,
        round_deadline_s=600.0,
        join_deadline_s=60.0,
        max_attempts=20,
    )
    return folder


@pytest.fixture(scope="module")
def expected(
    agreed: Path, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """What parties end with where the hub is honest."""
    sites = Sites(agreed, tmp_path_factory.mktemp("honest") / "grove", Hub(), processes)
    try:
        sites.start()
        sites.ended(ENDS_S)
    finally:
        sites.close()
    return {name: written(sites.folder, name) for name in PARTIES}


def written(folder: Path, party: str) -> dict[str, torch.Tensor]:
    """Every tensor of every checkpoint that a party kept; each file can be read whole."""
    kept = folder / party / "run" / "private" / "checkpoints"
    found = {
        f"{path.relative_to(kept)}|{key}": value
        for path in sorted(kept.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }
    assert any(name.startswith(f"round-{ROUNDS:08d}") for name in found)
    return found


def assert_as_without_faults(folder: Path, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    for name in PARTIES:
        found, wanted = written(folder, name), expected[name]
        last = {key: value for key, value in wanted.items() if key.startswith(f"round-{ROUNDS:08d}")}
        assert len(last) > 20
        assert last.keys() <= found.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items() if key in found)


def test_a_run_through_a_hub_that_loses_repeats_delays_withholds_and_forges_ends_with_the_same_weights(
    agreed: Path, processes: Processes, expected: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    hub = Hub(EVERY)
    sites = Sites(agreed, tmp_path / "grove", hub, processes)
    try:
        sites.start()
        sites.ended(ENDS_S)
    finally:
        sites.close()
    assert all(hub.done[fault] for fault in FAULTS), hub.done
    assert_as_without_faults(sites.folder, expected)

    assert hub.forged
    assert hub.forged <= hub.ended, "a connection with a forged piece is never used again"
    told = "".join(sites.log_of(name).read_text() for name in (*PARTIES, "coordinator"))
    assert "connection-lost" in told
    assert "Traceback" not in told


def test_a_hub_that_is_stopped_and_started_again_holds_a_run_up_and_one_that_stays_away_ends_it_with_a_way_to_go_on(
    agreed: Path, processes: Processes, expected: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    hub = Hub()
    sites = Sites(agreed, tmp_path / "grove", hub, processes)

    def committed() -> int:
        try:
            return int(read_status(sites.folder / "coordinator")["committed"])
        except Exception:  # nothing was written yet
            return 0

    try:
        sites.start()
        sites.until(lambda: committed() >= 1, ENDS_S)
        hub.stop()
        before = committed()
        sites.until(lambda: "waiting for" in sites.log_of("coordinator").read_text()[-400:], ENDS_S)
        assert committed() <= before + 1
        hub.down = False
        sites.until(lambda: committed() >= before + 2, ENDS_S)

        hub.stop()
        codes = sites.codes(ENDS_S)
        assert codes["coordinator"] == 1, codes
        said = sites.log_of("coordinator").read_text()[-1500:]
        assert "Error" in said
        assert "start the coordinator and all parties again: they go on from the newest checkpoint" in said
        for name in PARTIES:
            assert codes[name] == 1
            assert "Traceback" not in sites.log_of(name).read_text()

        sites.close()
        hub.down = False
        sites.start()
        sites.ended(ENDS_S)
    finally:
        sites.close()
    assert_as_without_faults(sites.folder, expected)
