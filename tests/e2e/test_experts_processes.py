"""Real processes, real mutual TLS on loopback: the `experts` exchange, each party under a budget of its own."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from coterie.federation.rounds.run_folder import read_status
from helpers.federation_processes import PARTIES, make_folder
from helpers.forked import ForkedProcesses

ROUNDS = 4
RULES = {"epsilon": 6.0, "delta": 1e-3, "lot_size": 8}


def make_private(folder: Path, rounds: int = ROUNDS, **settings: object) -> None:
    """Each party keeps its own ledger beside its run folder, by a relative path; alder asks for more privacy."""
    train = {"rounds": rounds, "batch_size": 8, "micro_batch": 4, "eval_every": 0, "checkpoint_every": 2}
    make_folder(folder, exchange="experts", privacy=RULES, trunk="shared", train=train, **settings)
    for name in PARTIES:
        path = folder / name / "party.yaml"
        party = yaml.safe_load(path.read_text())
        party["data"]["packing"] = "records"
        party["privacy"] = {"ledger": "ledger", "physical_batch": 4, **({"epsilon": 3.0} if name == "alder" else {})}
        path.write_text(yaml.safe_dump(party))


def lose_cedar(processes: ForkedProcesses, *, checkpoint: int) -> None:
    """Start everybody, and kill cedar once a checkpoint of that round, or of a later one, is published."""
    processes.coordinate()
    for name in PARTIES:
        processes.up(name)
    processes.until(lambda status: (status.get("checkpoint") or 0) >= checkpoint)
    processes.signal(signal.SIGKILL, "cedar")
    processes.running.pop("cedar").wait()


def released(folder: Path, name: str) -> list[tuple[int, int]]:
    """(round, draw) of every release in a party's only ledger."""
    (ledger,) = (folder / name / "ledger").glob("*/ledger.jsonl")
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    return [(e["data"]["round"], e["data"]["draw"]) for e in entries if e["kind"] == "release"]


@pytest.mark.slow
def test_private_parties_finish_within_their_budgets_and_say_so(processes: ForkedProcesses):
    folder = processes.folder
    make_private(folder)
    lose_cedar(processes, checkpoint=1)
    processes.start("cedar", "resume", "cedar/run", "--json", "cedar.json")
    codes = processes.wait()
    assert set(codes.values()) == {0}, {name: processes.log(name) for name in codes}
    for name in PARTIES:
        result = json.loads((folder / f"{name}.json").read_text())
        privacy, log = result["privacy"], processes.log(name)
        assert result["finished"]
        assert "for one record when all rounds are done" in log
        assert result["rounds"] == ROUNDS
        budget = 3.0 if name == "alder" else RULES["epsilon"]
        assert 0 < privacy["epsilon"] <= budget
        assert privacy["delta"] == RULES["delta"]
        assert privacy["noise_multiplier"] > 0
        assert privacy["rounds"] == ROUNDS
        assert privacy["revealed_to"] == [other for other in PARTIES if other != name]
        assert f"{name}: budget: epsilon {budget:g} at delta 0.001 for {ROUNDS} rounds" in log
        others = ", ".join(privacy["revealed_to"])
        assert f"revealed: noised sums of clipped gradients of {ROUNDS} rounds (0 left) to {others}" in log
        assert "PRIVACY STATEMENT" in log
        assert "NOT PRIVATE" not in log
        assert f"budget epsilon {budget:g}" in log
        assert sorted(released(folder, name)) == [(round_no, 0) for round_no in range(1, ROUNDS + 1)]
        shown = read_status(folder / name / "run")
        assert shown["privacy"]["rounds"] == ROUNDS
        assert shown["privacy"]["revealed_to"] == privacy["revealed_to"]
        assert "loss" not in (folder / name / "run" / "status.json").read_text()
        assert not (folder / name / "run" / "ledger").exists(), "a ledger inside of a run folder can be lost with it"

    processes.start("status", "status", str(folder / "alder" / "party.yaml"))
    assert processes.running["status"].wait(60) == 0
    shown_to_people = processes.log("status")
    assert f"noised sums of clipped gradients of {ROUNDS} rounds (0 left) to birch, cedar: epsilon" in shown_to_people
    assert "loss" not in shown_to_people


@pytest.mark.slow
def test_a_host_with_an_older_checkpoint_takes_everybody_back_and_the_same_sums_are_sent_again(
    processes: ForkedProcesses,
):
    """Rounds 3 to 6 are in the owners' spools when cedar's disk goes back to round 2: nothing is paid twice, under
    masks either, which are new at every try."""
    folder, rounds = processes.folder, 8
    make_private(folder, rounds, aggregation="masked", noise_multiplier=2.5)
    lose_cedar(processes, checkpoint=6)
    spools = {name: spooled(folder, name) for name in PARTIES}
    held = sorted((folder / "cedar" / "run" / "private" / "checkpoints").iterdir())
    for path in held[1:]:
        shutil.rmtree(path)
    processes.start("cedar", "resume", "cedar/run", "--json", "cedar.json")
    codes = processes.wait()
    assert set(codes.values()) == {0}, {name: processes.log(name) for name in codes}
    for name in PARTIES:
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["finished"]
        assert result["rounds"] == result["privacy"]["rounds"] == rounds
        assert sorted(released(folder, name)) == [(round_no, 0) for round_no in range(1, rounds + 1)]
        now = spooled(folder, name)
        assert all(now[file] == spools[name][file] for file in now.keys() & spools[name].keys())
        assert "from round 2" in processes.log("coordinator")
        assert result["privacy"]["noise_multiplier"] == 2.5
        assert "holds the noise of 2 parties that it does not know" in processes.log(name)


def spooled(folder: Path, name: str) -> dict[str, bytes]:
    """The noised results that a party keeps on disk for sending them again."""
    return {path.name: path.read_bytes() for path in (folder / name / "ledger").rglob("release-*.safetensors")}


@pytest.mark.slow
def test_others_go_on_without_a_party_that_is_gone_for_good_and_count_what_they_release(processes: ForkedProcesses):
    """All agreed beforehand (`lost_party: continue`): its experts are masked, its share of the trunk stands still."""
    folder, rounds, left = processes.folder, 6, ("alder", "birch")
    make_private(folder, rounds, lost_party="continue")
    lose_cedar(processes, checkpoint=2)
    codes = processes.wait()
    assert set(codes.values()) == {0}, {name: processes.log(name) for name in codes}
    for name in left:
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["finished"]
        assert result["rounds"] == rounds
        counted = released(folder, name)
        assert result["privacy"]["rounds"] == len(counted) <= rounds, (
            "a round that was burned costs one of the plan's"
        )
        assert len(set(counted)) == len(counted)
        assert result["privacy"]["epsilon"] <= (3.0 if name == "alder" else RULES["epsilon"])
        assert read_status(folder / name / "run")["absent"] == ["cedar"]
