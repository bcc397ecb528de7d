"""A party whose budget ends before the others', under masks with shared noise: they go on with larger shares."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from record import RECORD

from coterie.dp.accounting.ledger import existing_ledger
from helpers.federation_processes import PARTIES, make_folder
from helpers.forked import ForkedProcesses

PART = "Processes"
ROUNDS = 8
RULES = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0, "lot_size": 4}


def releases(folder: Path, name: str) -> list[dict[str, Any]]:
    """Of one party's ledger."""
    (path,) = (folder / name / "ledger").glob("*/ledger.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry["data"] for entry in entries if entry["kind"] == "release"]


def burn_all_but_one(folder: Path, name: str) -> None:
    """Count draws that were lost, as a party does whose disk fails, until its budget has one left."""
    (path,) = (folder / name / "ledger").glob("*/ledger.jsonl")
    ledger, counted = existing_ledger(path.parent), releases(folder, name)
    newest = counted[-1]
    for extra in range(ROUNDS - 1 - len(counted)):
        ledger.record_release(
            newest["run"], newest["round"], newest["draw"] + 1 + extra, f"{extra:064x}", newest["pins"]
        )


@pytest.mark.faults
def test_where_one_party_s_budget_is_spent_the_others_go_on_with_the_shares_of_fewer(processes: ForkedProcesses):
    """Every round's shares were decided before its lot: each entry in a ledger says whose noise lay in the sum."""
    folder = processes.folder
    make_folder(
        folder, exchange="experts", privacy=RULES, aggregation="masked", trunk="shared", noise="shared", colluding=1,
        noise_multiplier=4.0, deadline_s=60.0,
        train={"rounds": ROUNDS, "batch_size": 4, "micro_batch": 2, "eval_every": 0, "checkpoint_every": 2},
    )  # fmt: skip
    processes.coordinate()
    for name in PARTIES:
        processes.up(name)
    processes.until(lambda status: status["committed"] >= 2)
    processes.signal(signal.SIGINT)  # as Ctrl-C in the terminal that they all share
    assert set(processes.wait().values()) == {5}
    before = int(processes.status()["committed"])
    assert before < ROUNDS - 2
    burn_all_but_one(folder, "cedar")
    processes.running.clear()
    processes.coordinate()
    for name in PARTIES:
        processes.start(name, "resume", f"{name}/run", "--json", f"{name}.json")
    assert set(processes.wait().values()) == {0}, {name: processes.log(name) for name in PARTIES}
    alone = {"parties": 2, "colluding": 1}
    fewer = ROUNDS - before - 1
    for name in PARTIES:
        result, counted = json.loads((folder / f"{name}.json").read_text()), releases(folder, name)
        assert result["finished"]
        assert result["rounds"] == len(counted) == ROUNDS
        stops = name == "cedar"
        laws = [entry.get("pooled") for entry in counted]
        assert laws == [None] * (ROUNDS if stops else before + 1) + [alone] * (0 if stops else fewer)
        assert result["privacy"]["contributing"] is not stops
        assert result["privacy"]["epsilon"] <= RULES["epsilon"]
        said = f"of 3 contributed 2 in {fewer} rounds, as the others' budgets were spent"
        assert (said in " ".join(processes.log(name).split())) is not stops
    assert "Traceback" not in "".join(processes.log(name) for name in (*PARTIES, "coordinator"))
    RECORD.tried(PART, "a party's budget spent (masked push)", "the others go on with the shares of fewer")
