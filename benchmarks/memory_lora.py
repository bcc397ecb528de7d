"""Memory and disk of adapters in a federation, and of a full private run, against the bytes of the checkpoint.

    python benchmarks/memory_lora.py --json lora.json --size small

A bfloat16 checkpoint of OLMoE's shape with random weights; three parties, rank 4, within a budget, as real processes
over mTLS, and the same model in a private `coterie train`. Resident sizes are the kernel's high-water marks (VmHWM),
once as they are and once less those of the same processes with a model a hundred times smaller, which leaves what
interpreter and libraries take out. Beside them, as seen ten times a second: the most that was the process's own
(RssAnon), and the most of files that were mapped (RssFile: libraries, which processes share, and weights being read).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from coterie.config import FederationConfig, ModelSpec, PartyConfig, TrainConfig, dump_yaml
from coterie.demonstration.processes import Command, Processes
from coterie.federation.identity.provision import free_endpoints
from coterie.models.split.shards import TRUNK_FILE, shard_file, stored_shapes
from coterie.models.zoo.build import build_model
from coterie.training.data.tokenizer import train_tokenizer

_SIZES = ("VmHWM", "RssAnon", "RssFile")
PARTIES = ("alder", "birch", "cedar")
LENGTH, RECORDS, ROUNDS = 64, 4, 2
_COMMON: dict[str, Any] = {
    "num_experts_per_tok": 8,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4,
             "num_experts": 16, "num_attention_heads": 4, "num_key_value_heads": 4},
    "small": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8,
              "num_experts": 32, "num_attention_heads": 8, "num_key_value_heads": 8},
    "large": {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 16,
              "num_experts": 32, "num_attention_heads": 16, "num_key_value_heads": 16},
}  # fmt: skip
"""`large` has 889 million parameters, 1.78 GB; `small` 119 million, 0.24 GB."""


class Measured:
    """One model in one folder.

    Args:
        root: folder of everything.
        shape: key of `SHAPES`.
        dtype: of the federation's `model` block; None: not named.
    """

    def __init__(self, root: Path, shape: str, dtype: str | None) -> None:
        self.root, self._dtype = root, dtype
        root.mkdir(parents=True)
        words = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "re") for b in ("ta", "sen", "vor", "quil", "den")]
        lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(60)) for i in range(64)]
        (root / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        model = build_model(ModelSpec(family="olmoe", config=SHAPES[shape] | _COMMON, dtype="bfloat16"), seed=0)
        self.parameters = sum(param.numel() for param in model.parameters())
        model.save_pretrained(root / "model")
        train_tokenizer(lines, 300).save_pretrained(str(root / "model"))

    def federation(self, processes: Processes) -> dict[str, Any]:
        """Split, provision, and train adapters at three parties."""
        root = self.root
        *addresses, coordinator = free_endpoints(len(PARTIES) + 1)
        model = {"path": root / "model", "provenance": "public"} | ({"dtype": self._dtype} if self._dtype else {})
        config = FederationConfig.model_validate(
            {
                "name": "memory", "model": model, "lora": {"rank": 4},
                "parties": {name: {"endpoint": at} for name, at in zip(PARTIES, addresses, strict=True)},
                "coordinator": {"endpoint": coordinator}, "optim": {"lr": 1e-4},
                "train": {"rounds": ROUNDS, "batch_size": RECORDS, "micro_batch": RECORDS, "eval_every": 0,
                          "checkpoint_every": 1},
                "privacy": {"epsilon": 8.0, "delta": 1e-3, "lot_size": RECORDS},
                "join_deadline_s": 600.0, "deadline_s": 600.0,
            }
        )  # fmt: skip
        dump_yaml(root / "federation.yaml", config)
        for name in PARTIES:
            (root / name).mkdir()
            party = PartyConfig.model_validate(
                {
                    "party": name, "federation": root / "federation.yaml", "kit": root / "kits" / name,
                    "data": self._data(), "trunk": root / "weights" / TRUNK_FILE,
                    "shard": root / "weights" / shard_file(name), "run_dir": root / name / "run",
                    "privacy": {"ledger": root / name / "ledger", "physical_batch": RECORDS},
                }
            )  # fmt: skip
            dump_yaml(root / name / "party.yaml", party)
        settings = f"{root}/federation.yaml"
        split = self._watched(processes, "split", "split", "--federation", settings, "--out", f"{root}/weights")
        self._watched(processes, "provision", "provision", settings, "--out", f"{root}/kits")
        keeper = ("coordinator", settings, "--kit", f"{root}/kits/coordinator", "--run-dir", f"{root}/keeper")
        members = [self._command("coordinator", *keeper)]
        members += [self._command(name, "up", f"{root}/{name}/party.yaml") for name in PARTIES]
        began = time.monotonic()
        peaks = self._run(processes, members)
        runs = [root / name / "run" for name in PARTIES]
        newest = [max((run / "private" / "checkpoints").iterdir()) for run in runs]
        return {
            "seconds": time.monotonic() - began,
            "split_peak_bytes": split["split"]["VmHWM"],
            "split_bytes": size_of(root / "weights"),
            "party_peak_bytes": max(peaks[name]["VmHWM"] for name in PARTIES),
            "party_own_bytes": max(peaks[name]["RssAnon"] for name in PARTIES),
            "party_mapped_bytes": max(peaks[name]["RssFile"] for name in PARTIES),
            "party_explained_bytes": self._explained(),
            "checkpoint_bytes": max(map(size_of, newest)),
            "run_folder_bytes": max(map(size_of, runs)),
        }

    def train(self, processes: Processes) -> dict[str, Any]:
        """A full private run; memory, run folder, and the ledger with its spool beside it."""
        root = self.root
        config = TrainConfig.model_validate(
            {
                "model": {"path": root / "model", "provenance": "public"}, "data": self._data(),
                "optim": {"lr": 1e-4}, "run_dir": root / "run",
                "train": {"rounds": ROUNDS, "batch_size": RECORDS, "micro_batch": RECORDS, "eval_every": 0,
                          "checkpoint_every": 1},
                "privacy": {"epsilon": 8.0, "delta": 1e-3, "lot_size": RECORDS, "physical_batch": RECORDS,
                            "ledger": root / "ledger"},
            }
        )  # fmt: skip
        dump_yaml(root / "train.yaml", config)
        began = time.monotonic()
        peaks = self._watched(processes, "train", "train", f"{root}/train.yaml")
        exported = size_of(root / "run" / "public")
        return {
            "seconds": time.monotonic() - began,
            "peak_bytes": peaks["train"]["VmHWM"],
            "own_bytes": peaks["train"]["RssAnon"],
            "mapped_bytes": peaks["train"]["RssFile"],
            "run_folder_bytes": size_of(root / "run"),
            "ledger_bytes": size_of(root / "ledger"),
            "exported_bytes": exported,
        }

    def _explained(self) -> int:
        """What a party has to hold: the trunk, its output layer as it is computed in, and everybody's experts."""
        weights = self.root / "weights"
        files = (TRUNK_FILE, *map(shard_file, PARTIES))
        head = math.prod(stored_shapes(weights / TRUNK_FILE)["lm_head.weight"])
        wider = 0 if self._dtype == "bfloat16" else 2
        return sum((weights / file).stat().st_size for file in files) + wider * head

    def _data(self) -> dict[str, Any]:
        tokenizer = {"path": self.root / "model", "provenance": "public"}
        return {"train": [self.root / "text.txt"], "sequence_length": LENGTH, "tokenizer": tokenizer}

    def _command(self, name: str, *arguments: str) -> Command:
        return Command(name, arguments, self.root / "logs" / f"{name}.log")

    def _watched(self, processes: Processes, name: str, *arguments: str) -> dict[str, Counter[str]]:
        return self._run(processes, [self._command(name, *arguments)])

    def _run(self, processes: Processes, commands: list[Command]) -> dict[str, Counter[str]]:
        """Run commands side by side; the largest sizes of each by its name."""
        peaks = {command.name: Counter[str]() for command in commands}

        def look() -> None:
            for running in processes._running:  # noqa: SLF001 - a mark outlives nobody, so it is read on the way
                peaks[running.command.name] |= _sizes(running.process.pid)

        processes.run_all(commands, len(commands), look)
        return peaks


def _sizes(pid: int) -> Counter[str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    except OSError:
        return Counter()
    fields = dict(line.split(":", 1) for line in lines)
    return Counter({name: int(fields[name].split()[0]) * 1024 for name in _SIZES if name in fields})


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(size: str, arms: list[str], dtype: str | None, folder: Path) -> dict[str, Any]:
    """All figures, with those of the tiny model beside them."""
    out: dict[str, Any] = {"size": size, "torch": torch.__version__}
    for shape in dict.fromkeys(("tiny", size)):
        where = Measured(folder / shape, shape, dtype)
        found: dict[str, Any] = {"parameters": where.parameters, "checkpoint_bytes": 2 * where.parameters}
        with Processes(folder / shape, (sys.executable, "-P", "-m", "coterie.cli.app")) as processes:
            for arm in arms:
                print(f"{shape}: {arm} ...", file=sys.stderr, flush=True)
                found[arm] = getattr(where, arm)(processes)
        out[shape] = found
    whole, empty = out[size], out["tiny"]
    for arm, peak in (("federation", "party_peak_bytes"), ("train", "peak_bytes")):
        if arm in arms:
            net = whole[arm][peak] - empty[arm][peak]
            figures = {key: value for key, value in whole[arm].items() if key.endswith("_bytes")}
            out[f"{arm}_bytes_per_parameter"] = {
                key: value / whole["parameters"] for key, value in {**figures, f"net_{peak}": net}.items()
            }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--size", choices=list(SHAPES), default="small")
    parser.add_argument("--arms", nargs="+", choices=["federation", "train"], default=["federation", "train"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="`model.dtype` of federation.yaml")
    parser.add_argument("--folder", type=Path, help="work here and leave everything; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.size, arguments.arms, arguments.dtype, arguments.folder or Path(folder))
    text = json.dumps(figures, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
