"""Peak memory of one party against training the same model in one place, in fresh processes.

    python benchmarks/memory.py --json memory.json

An OLMoE-shaped model, scaled down: 16 MoE layers whose experts hold 93 % of the parameters. Full training with AdamW,
four parties, real processes. On a machine without a GPU nothing tells device memory from host memory, so device
memory comes from `coterie.training.device_memory`, and that model's total (device and host) is checked against the
resident memory of the real processes, importing apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

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
from coterie.federation.provision import free_endpoints
from coterie.models.build import build_model
from coterie.models.seam import expert_layers
from coterie.models.shards import TRUNK_FILE, shard_file
from coterie.training.device_memory import Shape, predict, saving
from coterie.training.tokenizer import train_tokenizer

PARTIES = ("alder", "birch", "cedar", "dogwood")
ROUNDS, RECORDS, LENGTH = 2, 4, 64
CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 160,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": LENGTH,
}
TRAIN = {"rounds": ROUNDS, "batch_size": RECORDS, "micro_batch": RECORDS, "eval_every": 0, "checkpoint_every": 0}


def prepare(root: Path) -> Shape:
    """Text, tokenizer and checkpoint; returns the model's shape."""
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "re") for b in ("ta", "sen", "vor", "quil", "den")]
    text = root / "text.txt"
    lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(60)) for i in range(64)]
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(lines, 300)
    model = build_model(ModelSpec(family="olmoe", config=CONFIG))
    experts = sum(param.numel() for layer in expert_layers(model) for param in layer.parameters().values())
    total = sum(param.numel() for param in model.parameters())
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(str(root / "model"))
    return Shape(total - experts, experts, CONFIG["num_hidden_layers"], len(PARTIES))


def imports_bytes(root: Path, processes: Processes) -> int:
    """Resident memory of a process that has only imported what every command imports, and opened its data."""
    config = TrainConfig(
        model=ModelSpec(
            family="olmoe", config={**CONFIG, "num_hidden_layers": 1, "num_experts": 4, "hidden_size": 32}
        ),
        data=data(root, Path()),
        train=TrainSpec(**TRAIN),
        run_dir=Path("tiny-run"),
        device="cpu",
    )
    dump_yaml(root / "tiny.yaml", config)
    (running,) = processes.run_all([command(root, "tiny", "train", "tiny.yaml")], 1, lambda: None)
    return running.usage.peak_rss_bytes


def centralised(root: Path, processes: Processes) -> int:
    """Peak resident memory of one process that trains all of the model."""
    config = TrainConfig(
        model=ModelSpec(path=Path("model"), provenance="public"),
        data=data(root, Path()),
        optim=OptimSpec(lr=1e-4),
        train=TrainSpec(**{**TRAIN, "batch_size": RECORDS * len(PARTIES)}),
        run_dir=Path("centralised-run"),
        device="cpu",
    )
    dump_yaml(root / "centralised.yaml", config)
    (running,) = processes.run_all([command(root, "centralised", "train", "centralised.yaml")], 1, lambda: None)
    return running.usage.peak_rss_bytes


def federated(root: Path, exchange: str, processes: Processes) -> dict[str, Any]:
    """Peak resident memory of every party, and its bytes on the wire."""
    where = root / exchange
    where.mkdir()
    *addresses, coordinator = free_endpoints(len(PARTIES) + 1)
    rules = {"epsilon": 8.0, "delta": 1e-3, "lot_size": RECORDS}
    config = FederationConfig.model_validate(
        {
            "name": "memory",
            "model": {"path": root / "model", "provenance": "public"},
            "parties": {name: {"endpoint": at} for name, at in zip(PARTIES, addresses, strict=True)},
            "coordinator": {"endpoint": coordinator},
            "optim": {"lr": 1e-4},
            "train": {**TRAIN, "in_flight": 1},
            "exchange": exchange,
            "join_deadline_s": 300.0,
            "deadline_s": 300.0,
            **({"privacy": rules} if exchange == "experts" else {}),
        }
    )
    dump_yaml(where / "federation.yaml", config)
    for name in PARTIES:
        (where / name).mkdir()
        own: dict[str, Any] = {"privacy": {"ledger": where / name / "ledger", "physical_batch": RECORDS}}
        party = PartyConfig.model_validate(
            {
                "party": name,
                "federation": where / "federation.yaml",
                "kit": where / "kits" / name,
                "data": data(root, where / name).model_dump(),
                "trunk": where / "weights" / TRUNK_FILE,
                "shard": where / "weights" / shard_file(name),
                "run_dir": where / name / "run",
                "device": "cpu",
                **(own if exchange == "experts" else {}),
            }
        )
        dump_yaml(where / name / "party.yaml", party)
    at = str(where)
    for name, *arguments in (
        ("split", "split", "--federation", f"{at}/federation.yaml", "--out", f"{at}/weights"),
        ("provision", "provision", f"{at}/federation.yaml", "--out", f"{at}/kits"),
    ):
        processes.run_all([command(root, f"{exchange}-{name}", *arguments)], 1, lambda: None)
    keeper = ("coordinator", f"{at}/federation.yaml", "--kit", f"{at}/kits/coordinator", "--run-dir", f"{at}/keeper")
    members = [command(root, f"{exchange}-coordinator", *keeper)]
    members += [command(root, f"{exchange}-{name}", "up", f"{at}/{name}/party.yaml") for name in PARTIES]
    parties = processes.run_all(members, len(members), lambda: None)[1:]
    results = [json.loads((where / name / "run" / "result.json").read_text("utf-8")) for name in PARTIES]
    sent = [sum(peer["sent"] for peer in result["wire"].values()) for result in results]
    tensors = [sum(peer["tensors_sent"] for peer in result["wire"].values()) for result in results]
    return {
        "peak_rss_bytes": max(party.usage.peak_rss_bytes for party in parties),
        "payload_over_tensors": sum(sent) / sum(tensors),
    }


def data(root: Path, where: Path) -> DataSpec:
    return DataSpec(
        train=(root / "text.txt",),
        sequence_length=LENGTH,
        tokenizer=TokenizerSpec(path=root / "model", provenance="public"),
    )


def command(root: Path, name: str, *arguments: str) -> Command:
    return Command(name, arguments, root / "logs" / f"{name}.log")


def measure() -> dict[str, Any]:
    """All arrangements, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shape = prepare(root)
        with Processes(root) as processes:
            base = imports_bytes(root, processes)
            alone = centralised(root, processes)
            together = {exchange: federated(root, exchange, processes) for exchange in ("tokens", "experts")}
    resident = {"centralised": alone} | {name: found["peak_rss_bytes"] for name, found in together.items()}
    out: dict[str, Any] = {
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": sys.version.split()[0]},
        "model": {
            "trunk_parameters": shape.trunk,
            "expert_parameters": shape.experts,
            "expert_share": shape.expert_share,
            "layers": shape.layers,
            "parties": shape.parties,
        },
        "imports_bytes": base,
        "arithmetic_saving": shape.expert_share * (1 - 1 / shape.parties),
        "arrangements": {},
    }
    for name, peak in resident.items():
        need = predict(name, shape)  # type: ignore[arg-type]
        state = peak - base
        out["arrangements"][name] = {
            "device_bytes": need.device,
            "device_saving": saving(name, shape),  # type: ignore[arg-type]
            "host_bytes": need.host,
            "predicted_resident_bytes": need.device + need.host,
            "measured_resident_bytes": state,
            "measured_over_predicted": state / (need.device + need.host),
            **({"payload_over_tensors": together[name]["payload_over_tensors"]} if name in together else {}),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures = measure()
    text = json.dumps(figures, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
