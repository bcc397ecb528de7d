"""Real processes, real mutual TLS on loopback: a federation that is killed, comes back, is stopped and resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coterie.cli.app import main
from coterie.config import FederationConfig, ModelSpec, PartyConfig, load_yaml
from coterie.federation.provision import free_endpoints
from coterie.federation.run_folder import read_status
from coterie.models.build import build_model
from coterie.training.checkpoint import CheckpointStore
from coterie.training.in_process import run_in_process
from coterie.training.party import prepare_party
from federation_tools import relative

PARTIES = ("alder", "birch", "cedar")
WORDS = ("forest", "tree", "root", "leaf", "wind", "rain", "stone", "river", "moss", "fern", "cloud", "sun", "path")
MODEL = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def run_here(*arguments: str) -> None:
    """A command in this process: importing torch once is enough."""
    code: object = 0
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code
    assert not code, arguments


def make_folder(folder: Path, **settings: object) -> None:
    """Everything a federation needs; each party has its own folder with its own files and nothing else."""
    endpoints = free_endpoints(4)
    draw = random.Random(0)

    def words(count: int, start: int = 0) -> str:
        return " ".join(draw.choices(WORDS[start : start + 7], k=count))

    folder.mkdir()
    (folder / "public.txt").write_text("\n".join(words(40) for _ in range(20)))
    federation = {
        "name": "grove",
        "model": {"family": "olmoe", "config": MODEL},
        "parties": {name: {"endpoint": endpoint} for name, endpoint in zip(PARTIES, endpoints, strict=False)},
        "coordinator": {"endpoint": endpoints[3]},
        "exchange": "tokens",
        "optim": {"lr": 3e-3, "schedule": "constant"},
        "train": {"rounds": 24, "batch_size": 4, "micro_batch": 2, "eval_every": 0, "checkpoint_every": 2},
        "deadline_s": 10.0,
        "join_deadline_s": 120.0,
        **settings,
    }
    (folder / "federation.yaml").write_text(yaml.safe_dump(federation, sort_keys=False))
    run_here("provision", str(folder / "federation.yaml"), "--out", str(folder / "kits"))
    run_here("split", "--federation", str(folder / "federation.yaml"), "--out", str(folder / "split"))
    for index, name in enumerate(PARTIES):
        own = folder / name
        own.mkdir()
        for part, count in (("train", 40), ("test", 5)):
            rows = [json.dumps({"text": words(20, 3 * index)}) for _ in range(count)]
            (own / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
        shutil.copy(folder / "split" / "trunk.safetensors", own)
        shutil.copy(folder / "split" / f"experts-{name}.safetensors", own)
        shutil.copytree(folder / "kits" / name, own / "kit")
        tokenizer = {"train": {"files": ["../public.txt"], "vocab_size": 280}}
        party = {
            "party": name,
            "federation": "../federation.yaml",
            "kit": "kit",
            "data": {"train": "train.jsonl", "test": "test.jsonl", "sequence_length": 24, "tokenizer": tokenizer},
            "trunk": "trunk.safetensors",
            "shard": f"experts-{name}.safetensors",
            "run_dir": "run",
        }
        (own / "party.yaml").write_text(yaml.safe_dump(party, sort_keys=False))


class Processes:
    """Commands as child processes, each with a log; none outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "coterie.cli.app", *arguments]
            self.running[name] = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def coordinate(self) -> None:
        self.start("coordinator", "coordinator", "federation.yaml")

    def up(self, name: str) -> None:
        self.start(name, "up", f"{name}/party.yaml", "--json", f"{name}.json")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def status(self) -> dict:
        try:
            return read_status(self.folder / "runs" / "coordinator")
        except Exception:
            return {"committed": 0, "missing": []}

    def until(self, holds: Callable[[dict], bool], timeout_s: float = 180.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds(self.status()):
            ended = {name: process.poll() for name, process in self.running.items()}
            logs = "\n".join(f"--- {name}\n{self.log(name)}" for name in self.running)
            assert time.monotonic() < deadline, f"waited in vain: {self.status()} {ended}\n{logs}"
            assert all(code in (None, -9) for code in ended.values()), f"ended early: {ended}\n{logs}"
            time.sleep(0.02)

    def signal(self, number: int, *names: str) -> None:
        for name in names or tuple(self.running):
            self.running[name].send_signal(number)

    def wait(self, timeout_s: float = 180.0) -> dict[str, int]:
        return {name: process.wait(timeout_s) for name, process in self.running.items()}

    def end(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path / "grove")
    yield made
    made.end()


@pytest.mark.slow
def test_killed_stopped_and_resumed_federation_ends_as_an_uninterrupted_one(processes: Processes, tmp_path: Path):
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
    assert set(codes.values()) == {0}, {name: processes.log(name) for name in codes}
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
            store = CheckpointStore(run / "checkpoints", f"{marker['run']}/{name}")
            pair.append((store, store.get(24)))
        for stem in ("trunk", "experts"):
            found, expected = (store.load(checkpoint, stem) for store, checkpoint in pair)
            assert found.keys() == expected.keys()
            for key, value in found.items():
                assert relative(value.float(), expected[key].float()) < 1e-5, (name, key)
        assert not [path for path in (folder / name).rglob("*experts-*") if name not in path.name]

    # What was trained can be joined: alder's trunk with everybody's experts.
    newest = "run/checkpoints/round-00000024"
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
def test_no_process_ever_has_another_partys_expert_in_its_memory(processes: Processes):
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
