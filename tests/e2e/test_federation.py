"""Real processes, real mutual TLS on loopback: a federation that is killed, comes back, is stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coterie.checkpoints import CheckpointStore
from coterie.config import FederationConfig, ModelSpec, PartyConfig, load_yaml
from coterie.models.zoo.build import build_model
from coterie.training.party.in_process import run_in_process
from coterie.training.party.process import prepare_party
from helpers.comparing import relative
from helpers.federation_processes import PARTIES, make_folder, run_here
from helpers.forked import ForkedProcesses


@pytest.mark.slow
def test_killed_stopped_and_resumed_federation_ends_as_an_uninterrupted_one(
    processes: ForkedProcesses, tmp_path: Path
):
    folder = processes.folder
    make_folder(folder)
    processes.coordinate()
    for name in PARTIES:
        processes.up(name)

    processes.until(lambda status: status["committed"] >= 3)
    processes.signal(signal.SIGKILL, "cedar")
    processes.running.pop("cedar").wait()
    processes.until(lambda status: status["missing"] == ["cedar"])
    processes.up("cedar")
    before = processes.status()["committed"]
    processes.until(lambda status: status["committed"] > before)

    processes.signal(signal.SIGINT)  # as Ctrl-C in the terminal that they all share
    codes = processes.wait()
    assert set(codes.values()) == {5}, {name: processes.log(name) for name in codes}
    stopped = processes.status()
    assert stopped["ending"] == "stopped"
    assert stopped["checkpoint"] == stopped["committed"] < 24
    assert "go on with: coterie resume" in processes.log("alder")

    processes.running.clear()
    processes.coordinate()
    for name in PARTIES:
        processes.start(name, "resume", f"{name}/run", "--json", f"{name}.json")
    processes.until(lambda status: status["committed"] > stopped["committed"] and status["phase"] == "compute")
    processes.signal(signal.SIGKILL, "coordinator")
    processes.running.pop("coordinator").wait()
    processes.coordinate()
    codes = processes.wait()
    assert set(codes.values()) == {0}, {name: processes.log(name) for name in codes}
    assert processes.status()["ending"] == "finished"
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in PARTIES}
    assert all(result["finished"] and result["rounds"] == 24 and result["loss"] > 0 for result in results.values())

    # The same federation in one process, from the same files.
    config = load_yaml(folder / "federation.yaml", FederationConfig)
    parts = []
    for name in PARTIES:
        party = load_yaml(folder / name / "party.yaml", PartyConfig)
        parts.append(prepare_party(party.model_copy(update={"run_dir": tmp_path / "twin" / name}), config))
    run_in_process(config, parts, tmp_path / "twin" / "coordinator")
    for name in PARTIES:
        pair = []
        for run in (folder / name / "run", tmp_path / "twin" / name):
            marker = json.loads((run / "run.json").read_text())
            store = CheckpointStore(run / "private" / "checkpoints", f"{marker['run']}/{name}")
            pair.append((store, store.get(24)))
        for stem in ("trunk", "experts"):
            found, expected = (checkpoint.load(stem) for _, checkpoint in pair)
            assert found.keys() == expected.keys()
            for key, value in found.items():
                assert relative(value.float(), expected[key].float()) < 1e-5, (name, key)
        assert not [path for path in (folder / name).rglob("*experts-*") if name not in path.name]

    # What was trained can be joined: alder's trunk with everybody's experts.
    newest = "run/private/checkpoints/round-00000024"
    shards = [
        option for name in PARTIES for option in ("--shard", str(folder / name / newest / "experts.safetensors"))
    ]
    trunk = str(folder / "alder" / newest / "trunk.safetensors")
    run_here("export", str(folder / "split"), "--trunk", trunk, *shards, "--out", str(tmp_path / "joined"))
    joined = build_model(ModelSpec(path=tmp_path / "joined"))
    with torch.inference_mode():
        assert joined(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()

    processes.start("status", "status", str(folder / "alder" / "party.yaml"), "--json", "status.json")
    assert processes.running["status"].wait(60) == 0
    shown = processes.log("status")
    assert "grove, party alder: not running" in shown
    assert "24 of 24 (finished)" in shown
    assert "loss" not in shown + (folder / "status.json").read_text()


def memory_holds(pid: int, wanted: dict[str, bytes]) -> set[str]:
    """Which byte strings are somewhere in the memory of a running process: written pages, and files of tensors."""
    found: set[str] = set()
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            area, permissions, *rest = line.split(maxsplit=5)
            path = rest[-1].strip() if len(rest) == 4 else ""
            if "r" not in permissions or path in ("[vvar]", "[vsyscall]"):
                continue
            if "w" not in permissions and not path.endswith(".safetensors"):
                continue
            start, end = (int(edge, 16) for edge in area.split("-"))
            for first, last in resident(pid, start, end):
                try:
                    memory.seek(first)
                    content = memory.read(last - first)
                except OSError:  # gone meanwhile
                    continue
                found |= {name for name, value in wanted.items() if name not in found and value in content}
    return found


def resident(pid: int, start: int, end: int) -> list[tuple[int, int]]:
    """The stretches of an address range that have pages, in memory or swapped out."""
    page = os.sysconf("SC_PAGE_SIZE")
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(start // page * 8)
        entries = torch.frombuffer(bytearray(pagemap.read((end - start) // page * 8)), dtype=torch.int64)
    there = (entries < 0) | ((entries >> 62) & 1 == 1)  # bit 63: present, bit 62: swapped out
    edges = torch.diff(there.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().squeeze(1).tolist()
    return [(start + a * page, start + b * page) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.slow
def test_no_process_ever_has_another_partys_expert_in_its_memory(processes: ForkedProcesses):
    """Reads the memory of the running parties. Their own experts are the positive control."""
    folder = processes.folder
    # Steps too small to change a float32, so that what to look for is known.
    make_folder(
        folder,
        optim={"lr": 1e-30, "schedule": "constant"},
        train={"rounds": 100000, "batch_size": 4, "micro_batch": 2, "eval_every": 2, "checkpoint_every": 2},
    )
    rows = {
        name: {
            key: value[0].float().numpy().tobytes()
            for key, value in load_file(folder / "split" / f"experts-{name}.safetensors").items()
            if key.endswith("down_proj")
        }
        for name in PARTIES
    }
    everybody = {key: row for each in rows.values() for key, row in each.items()}
    assert len(everybody) == 2 * 8
    processes.coordinate()
    for name in PARTIES:
        processes.up(name)
    processes.until(lambda status: status["committed"] >= 5)  # with evaluations and checkpoints behind it
    for name in PARTIES:
        found = memory_holds(processes.running[name].pid, everybody)
        assert found == set(rows[name]), name
