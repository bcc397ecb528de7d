"""What `coterie plan` expects of a run on this machine, beside what the run then takes.

    python benchmarks/planning.py --json planning.json

Six shapes, scaled down: four families, plain and with a budget, with and without recomputed activations, one with a
dense layer before the MoE ones, one whose kinds of attention alternate. The plan measures two models of few layers on
synthetic records (`coterie.training.single.calibrated`); the run trains the whole model on text, and is measured by
the allocator (peak of a round) and by the clock (median of its rounds). Wants an otherwise idle machine: the plan's
time is that of the moments in which it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from coterie.config import TrainConfig
from coterie.training.planning.allocations import peak_bytes
from coterie.training.single.calibrated import calibrate
from coterie.training.single.prepared import prepare
from coterie.training.single.private_stepper import PrivateStepper
from coterie.training.single.stepper import PlainStepper

WORDS = ("river", "stone", "wind", "rain", "leaf", "moss", "fern", "cloud", "path", "root", "bark", "seed")
ROUNDS = 5
HIDDEN = "as wide as the model"
COMMON: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Case:
    """One shape to plan and to train.

    Attributes:
        name: for the report.
        family: transformers' name of it.
        settings: of its config, beside the sizes that all have; `HIDDEN` stands for the model's width.
        private: with a budget.
        recompute: activations are computed again in the backward pass.
    """

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    private: bool = False
    recompute: bool = False


EIGHT = {"num_experts": 8}
CASES = (
    Case("OLMoE", "olmoe", EIGHT),
    Case("OLMoE, recomputed", "olmoe", EIGHT, recompute=True),
    Case("OLMoE, epsilon 8", "olmoe", EIGHT, private=True),
    Case("Qwen3-MoE", "qwen3_moe", {**EIGHT, "head_dim": 16, "moe_intermediate_size": HIDDEN}),
    Case(
        "DeepSeek-V2, one dense layer first",
        "deepseek_v2",
        {
            "first_k_dense_replace": 1,
            "moe_intermediate_size": HIDDEN,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    Case("gpt-oss, attention in turn", "gpt_oss", {"head_dim": 16, "num_local_experts": 8, "sliding_window": 16}),
)


@dataclass(frozen=True)
class Outcome:
    """Planned and measured figures of one shape."""

    planned_bytes: int
    measured_bytes: int
    planned_seconds: float
    measured_seconds: float
    plan_took_seconds: float

    @property
    def memory_ratio(self) -> float:
        """Planned over measured."""
        return self.planned_bytes / self.measured_bytes

    @property
    def time_ratio(self) -> float:
        """Planned over measured."""
        return self.planned_seconds / self.measured_seconds


def settings(case: Case, folder: Path, *, hidden: int, layers: int, length: int) -> TrainConfig:
    """A train.yaml of a shape, with text in ``folder``."""
    text = folder / "text.jsonl"
    rows = [" ".join(WORDS[(row * 7 + word * word) % len(WORDS)] for word in range(length)) for row in range(48)]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    public = folder / "public.txt"
    public.write_text(" ".join(rows[0].split()[::-1]) + "\n", encoding="utf-8")
    own = {name: hidden if value == HIDDEN else value for name, value in case.settings.items()}
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": layers}
    batch = {"batch_size": 16, "micro_batch": 4}
    return TrainConfig.model_validate(
        {
            "model": {
                "family": case.family,
                "config": {**COMMON, **sizes, **own},
                "gradient_checkpointing": case.recompute,
            },
            "data": {
                "train": [text],
                "sequence_length": length,
                "packing": "records",
                "tokenizer": {"train": {"files": [public], "vocab_size": 300}},
            },
            "optim": {"lr": 1e-4},
            "train": {"rounds": ROUNDS + 1, "eval_every": 0, "checkpoint_every": 0, **batch},
            "run_dir": folder / "run",
            **(
                {
                    "privacy": {
                        "epsilon": 8.0,
                        "delta": 1e-3,
                        "lot_size": 16,
                        "physical_batch": 4,
                        "seeded": True,
                        "ledger": folder / "ledger",
                    }
                }
                if case.private
                else {}
            ),
        }
    )


def outcome(config: TrainConfig, clock: Callable[[], float] = time.monotonic) -> Outcome:
    """Plan a run, then do its rounds; ``clock`` counts seconds, or anything else that work adds to."""
    prepared, documents = prepare(config)
    planned = calibrate(config, prepared.tokenizer, prepared.train, clock)
    stepper = PlainStepper(prepared) if config.privacy is None else PrivateStepper(prepared, documents)
    try:
        model = prepared.model
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        most = peak_bytes(stepper.step, next(model.parameters()).device)
        seconds = []
        while not stepper.finished:
            began = clock()
            stepper.step()
            seconds.append(clock() - began)
    finally:
        stepper.close()
    return Outcome(
        planned.peak_bytes, held + most, planned.round_seconds, statistics.median(seconds), planned.took_seconds
    )


def measure(hidden: int, layers: int, length: int, *, processor: bool) -> dict[str, Any]:
    """All shapes, one after the other; by processor time where other work shares the cores."""
    clock = time.process_time if processor else time.monotonic
    found: dict[str, Any] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            done = outcome(settings(case, Path(folder), hidden=hidden, layers=layers, length=length), clock)
        found[case.name] = {**asdict(done), "memory_ratio": done.memory_ratio, "time_ratio": done.time_ratio}
        print(
            f"{case.name:<36} memory {done.memory_ratio:.3f}  time {done.time_ratio:.3f}", file=sys.stderr, flush=True
        )
    return {
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "clock": "processor" if processor else "wall",
        "shape": {"hidden": hidden, "layers": layers, "length": length},
        "cases": found,
        "within": {
            "memory, 10 %": all(abs(each["memory_ratio"] - 1) <= 0.1 for each in found.values()),
            "time, 25 %": all(abs(each["time_ratio"] - 1) <= 0.25 for each in found.values()),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--hidden", type=int, default=128, help="width of the models, and of their experts")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--length", type=int, default=64, help="words, and most tokens, of a record")
    parser.add_argument("--processor", action="store_true", help="count processor time: the machine has other work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(arguments.hidden, arguments.layers, arguments.length, processor=arguments.processor)
    text = json.dumps(figures, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
