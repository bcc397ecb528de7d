"""Real processes, real mutual TLS on loopback: a party of two ranks, one of which is killed on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from helpers.federation_processes import PARTIES, make_folder
from helpers.forked import ForkedProcesses
from helpers.waiting import until

ROUNDS = 3
RULES = {"epsilon": 6.0, "delta": 1e-3, "lot_size": 8}


def make_private(folder: Path, **settings: object) -> None:
    """Every party has a budget; alder has two ranks."""
    train = {"rounds": ROUNDS, "batch_size": 8, "micro_batch": 4, "eval_every": 0, "checkpoint_every": 1}
    make_folder(folder, exchange="experts", privacy=RULES, trunk="shared", train=train, **settings)
    for name in PARTIES:
        path = folder / name / "party.yaml"
        party = yaml.safe_load(path.read_text())
        party["data"]["packing"] = "records"
        party["privacy"] = {"ledger": "ledger", "physical_batch": 4}
        if name == "alder":
            party |= {"devices": 2, "device": "cpu"}
        path.write_text(yaml.safe_dump(party))


def rank_of(parent: int, number: int) -> int | None:
    """The process that a command started as one of its ranks."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            started_by = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if started_by == parent and f"RANK={number}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except (OSError, ValueError):
            continue
    return None


def released(folder: Path, name: str) -> list[tuple[int, int]]:
    """(round, draw) of every release in a party's only ledger."""
    (ledger,) = (folder / name / "ledger").glob("*/ledger.jsonl")
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    return [(e["data"]["round"], e["data"]["draw"]) for e in entries if e["kind"] == "release"]


@pytest.mark.slow
def test_a_federation_goes_on_when_a_rank_of_a_party_was_killed_and_the_party_resumed(
    processes: ForkedProcesses,
) -> None:
    folder = processes.folder
    make_private(folder, deadline_s=60.0, join_deadline_s=600.0)
    processes.coordinate()
    for name in PARTIES:
        processes.up(name)
    processes.until(lambda status: (status.get("checkpoint") or 0) >= 1)
    rank = rank_of(processes.running["alder"].pid, 1)
    assert rank is not None
    os.kill(rank, signal.SIGKILL)
    party = processes.running.pop("alder")
    until(lambda: party.poll() is not None, 600.0)
    assert party.poll() != 0
    processes.start("alder", "resume", "alder/run", "--json", "alder.json")
    codes = processes.wait()
    assert set(codes.values()) == {0}, {name: processes.log(name) for name in codes}
    for name in PARTIES:
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["finished"]
        assert result["rounds"] == ROUNDS
        assert result["privacy"]["rounds"] == len(released(folder, name)) >= ROUNDS
    parts = sorted(path.name for path in (folder / "alder/ledger").glob("*/spool/*/*"))
    assert "rank-1" in parts
    assert processes.log("alder").count("PRIVACY STATEMENT") == 1
