"""Peak memory of one party against training the same model in one place, in fresh processes.

    python benchmarks/memory.py --json memory.json

An OLMoE-shaped model, scaled down: 16 MoE layers whose experts hold 93 % of the parameters. Full training with AdamW,
four parties, real processes over mTLS. Two measurements of every arrangement:

- device: the processes run on a device that counts what it holds (`counted_device.py`), or on the GPU where there is
  one. What torch allocates there is what a GPU holds; nothing is taken from the closed form. A second run with a
  quarter of the tokens tells what grows with them (activations, rows kept for clipping) from what does not (state).
- resident: on the processor, the largest resident size, without that of the same processes with a model a hundred
  times smaller (interpreter, libraries, transport). It says what host and device hold together.

Both stand beside the closed form of `coterie.training.planning.closed_form`, which knows the state alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from coterie.config import (
    DataSpec,
    FederationConfig,
    ModelSpec,
    OptimSpec,
    PartyConfig,
    TokenizerSpec,
    TrainConfig,
    TrainSpec,
    dump_yaml,
)
from coterie.demonstration.processes import Command, Processes
from coterie.federation.identity.provision import free_endpoints
from coterie.models.seam import expert_layers
from coterie.models.split.shards import TRUNK_FILE, shard_file
from coterie.models.zoo.build import build_model
from coterie.training.data.tokenizer import train_tokenizer
from coterie.training.planning.closed_form import Arrangement, Shape, predict

PARTIES = ("alder", "birch", "cedar", "dogwood")
ROUNDS, LENGTH = 2, 64
LARGE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 160,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SMALL = LARGE | {"hidden_size": 32, "intermediate_size": 16, "num_experts": 16, "num_hidden_layers": 16}


@dataclass(frozen=True)
class Arm:
    """One arrangement to measure."""

    name: str
    arrangement: Arrangement
    settings: dict[str, Any] = field(default_factory=dict)


ARMS = (
    Arm("centralised", "centralised"),
    Arm("tokens", "tokens", {"exchange": "tokens"}),
    Arm("experts", "experts", {"exchange": "experts"}),
    Arm("experts, shared trunk", "experts", {"exchange": "experts", "trunk": "shared"}),
)


class Measured:
    """Runs arrangements with one model.

    Args:
        root: folder of everything.
        config: of the model.
        records: sequences of a party's round, all in one micro-batch.
    """

    def __init__(self, root: Path, config: dict[str, Any], records: int) -> None:
        self.root, self.records = root, records
        root.mkdir(parents=True)
        words = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "re") for b in ("ta", "sen", "vor", "quil", "den")]
        lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(60)) for i in range(64)]
        (root / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        model = build_model(ModelSpec(family="olmoe", config=config))
        stacked = [param for layer in expert_layers(model) for param in layer.parameters().values()]
        experts, known = sum(param.numel() for param in stacked), {id(param) for param in stacked}
        trunk = [param.numel() for param in model.parameters() if id(param) not in known]
        model.save_pretrained(root / "model")
        train_tokenizer(lines, 300).save_pretrained(str(root / "model"))
        self.shape = Shape(
            trunk=sum(trunk),
            experts=experts,
            layers=config["num_hidden_layers"],
            parties=len(PARTIES),
            matrix=max(param.numel() for param in stacked),
            largest_trunk=max(trunk),
        )

    def run(self, arm: Arm, processes: Processes, tag: str) -> dict[str, Any]:
        """Train one arrangement to the end; the logs and results lie under ``tag``."""
        where = self.root / tag / arm.name.replace(", ", "-").replace(" ", "-")
        where.mkdir(parents=True)
        return self._centralised(where, processes) if not arm.settings else self._federated(where, arm, processes)

    def _centralised(self, where: Path, processes: Processes) -> dict[str, Any]:
        config = TrainConfig(
            model=ModelSpec(path=self.root / "model", provenance="public"),
            data=self._data(),
            optim=OptimSpec(lr=1e-4),
            train=TrainSpec(**self._train(self.records * len(PARTIES))),
            run_dir=where / "run",
        )
        dump_yaml(where / "train.yaml", config)
        (ran,) = processes.run_all([_command(where, "train", "train", f"{where}/train.yaml")], 1, lambda: None)
        return {"pids": [ran.process.pid]}

    def _federated(self, where: Path, arm: Arm, processes: Processes) -> dict[str, Any]:
        *addresses, coordinator = free_endpoints(len(PARTIES) + 1)
        private = arm.settings["exchange"] == "experts"
        rules = {"privacy": {"epsilon": 8.0, "delta": 1e-3, "lot_size": self.records}} if private else {}
        config = FederationConfig.model_validate(
            {
                "name": "memory",
                "model": {"path": self.root / "model", "provenance": "public"},
                "parties": {name: {"endpoint": at} for name, at in zip(PARTIES, addresses, strict=True)},
                "coordinator": {"endpoint": coordinator},
                "optim": {"lr": 1e-4},
                "train": {**self._train(self.records), "in_flight": 1},
                "join_deadline_s": 300.0,
                "deadline_s": 300.0,
                **arm.settings,
                **rules,
            }
        )
        dump_yaml(where / "federation.yaml", config)
        for name in PARTIES:
            (where / name).mkdir()
            own = {"privacy": {"ledger": where / name / "ledger", "physical_batch": self.records}} if private else {}
            party = PartyConfig.model_validate(
                {
                    "party": name,
                    "federation": where / "federation.yaml",
                    "kit": where / "kits" / name,
                    "data": self._data().model_dump(),
                    "trunk": where / "weights" / TRUNK_FILE,
                    "shard": where / "weights" / shard_file(name),
                    "run_dir": where / name / "run",
                    **own,
                }
            )
            dump_yaml(where / name / "party.yaml", party)
        settings = f"{where}/federation.yaml"
        for name, *arguments in (
            ("split", "split", "--federation", settings, "--out", f"{where}/weights"),
            ("provision", "provision", settings, "--out", f"{where}/kits"),
        ):
            processes.run_all([_command(where, name, *arguments)], 1, lambda: None)
        keeper = ("coordinator", settings, "--kit", f"{where}/kits/coordinator", "--run-dir", f"{where}/keeper")
        members = [_command(where, "coordinator", *keeper)]
        members += [_command(where, name, "up", f"{where}/{name}/party.yaml") for name in PARTIES]
        ran = processes.run_all(members, len(members), lambda: None)[1:]
        ended = [where / name / "run" / "private" / "result.json" for name in PARTIES]
        results = [json.loads(path.read_text("utf-8")) for path in ended]
        sent, tensors = (
            sum(peer[what] for result in results for peer in result["wire"].values())
            for what in ("sent", "tensors_sent")
        )
        return {"pids": [party.process.pid for party in ran], "payload_over_tensors": sent / tensors}

    def _data(self) -> DataSpec:
        tokenizer = TokenizerSpec(path=self.root / "model", provenance="public")
        return DataSpec(train=(self.root / "text.txt",), sequence_length=LENGTH, tokenizer=tokenizer)

    def _train(self, batch_size: int) -> dict[str, Any]:
        fixed = {"rounds": ROUNDS, "eval_every": 0, "checkpoint_every": 0}
        return {**fixed, "batch_size": batch_size, "micro_batch": self.records}


def _command(where: Path, name: str, *arguments: str) -> Command:
    return Command(name, arguments, where / "logs" / f"{name}.log")


def measure(records: int, names: list[str] | None) -> dict[str, Any]:
    """All arrangements, one after the other."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        large = Measured(Path(folder) / "large", LARGE, records)
        thin = Measured(Path(folder) / "thin", LARGE, records // 4)
        small = Measured(Path(folder) / "small", SMALL, records)
        shape = large.shape
        for arm in ARMS:
            if names and arm.name not in names:
                continue
            began = time.monotonic()
            print(f"{arm.name} ...", file=sys.stderr, flush=True)
            figures = Path(folder) / "figures"
            runner = str(Path(__file__).with_name("counted_device.py"))
            command = (
                sys.executable,
                "-P",
                runner,
                os.environ.get("COTERIE_COUNTED_BUILD", f"{folder}/build"),
                str(figures),
            )
            with Processes(Path(folder), command) as processes:
                device = large.run(arm, processes, "device")
                quarter = thin.run(arm, processes, "device")
            with Processes(Path(folder), (*command[:-2], "-", str(figures))) as processes:
                resident = large.run(arm, processes, "resident")
                empty = small.run(arm, processes, "resident")

            def most(run: dict[str, Any], what: str, at: Path = figures) -> int:
                return max(json.loads((at / f"{pid}.json").read_text("utf-8"))[what] for pid in run["pids"])

            held, fewer = most(device, "peak_device_bytes"), most(quarter, "peak_device_bytes")
            state = held - (held - fewer) * records / (records - records // 4)
            need = predict(arm.arrangement, replace(shape, shared_trunk=arm.settings.get("trunk") == "shared"))
            together = most(resident, "peak_rss_bytes") - most(empty, "peak_rss_bytes")
            out[arm.name] = {
                "device_bytes": held,
                "device_bytes_with_a_quarter_of_the_tokens": fewer,
                "device_state_bytes": state,
                "predicted_device_state_bytes": need.device,
                "state_over_predicted": state / need.device,
                "resident_bytes": together,
                "predicted_host_bytes": need.host,
                "resident_over_predicted": together / (held + need.host),
                "seconds": time.monotonic() - began,
            }
            if "payload_over_tensors" in device:
                out[arm.name]["payload_over_tensors"] = device["payload_over_tensors"]
    alone = out.get("centralised")
    for found in out.values():
        if alone:
            found["device_saving"] = 1 - found["device_bytes"] / alone["device_bytes"]
            found["device_state_saving"] = 1 - found["device_state_bytes"] / alone["device_state_bytes"]
    return {
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "counted, on the processor",
        },
        "model": {
            "trunk_parameters": shape.trunk,
            "expert_parameters": shape.experts,
            "expert_share": shape.expert_share,
            "layers": shape.layers,
            "parties": shape.parties,
            "tokens_of_a_micro_batch": records * LENGTH,
        },
        "arithmetic_saving": shape.expert_share * (1 - 1 / shape.parties),
        "arrangements": out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--records", type=int, default=4, help="sequences of 64 tokens in a micro-batch")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="default: all")
    arguments = parser.parse_args()
    figures = measure(arguments.records, arguments.arms)
    text = json.dumps(figures, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
