"""A federation as its users run it: files in folders, commands as child processes, mutual TLS on loopback."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from coterie.cli.app import main
from coterie.federation.identity.provision import free_endpoints
from coterie.federation.rounds.run_folder import read_status

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


def make_folder(folder: Path, endpoints: list[str] | None = None, **settings: object) -> None:
    """Everything a federation needs; each party has its own folder with its own files and nothing else; with
    a budget its ledger, too.

    Args:
        folder: made here.
        endpoints: of the parties, then the coordinator; default: free ones on loopback.
        **settings: go into federation.yaml, over the defaults.
    """
    endpoints = endpoints or free_endpoints(4)
    draw = random.Random(0)

    def words(count: int, start: int = 0) -> str:
        return " ".join(draw.choices(WORDS[start : start + 7], k=count))

    folder.mkdir(exist_ok=True)
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
        own.mkdir(exist_ok=True)
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
        if isinstance(federation.get("privacy"), dict):
            party["privacy"] = {"ledger": "ledger", "physical_batch": 4}
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
