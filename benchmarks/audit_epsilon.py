"""Does the audit of epsilon raise the alarm when it should, and only then?

Faults are planted into the engine as it runs, never by a switch in the product: noise off, noise halved, clipping
off, and every token clipped by itself (what per-sample clipping becomes where each row is taken for a sample). Each
is audited with many seeds beside an honest run, on a small model, or on one's own settings:

    python benchmarks/audit_epsilon.py --seeds 20 --canaries 200 --json epsilon.json
    python benchmarks/audit_epsilon.py --config train.yaml --seeds 3

Results are written after every audit; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coterie.audit.epsilon.findings import ClaimVerdict, EpsilonFindings
from coterie.audit.epsilon.run import audit_epsilon
from coterie.audit.epsilon.subject import Subject
from coterie.config import (
    DataSpec,
    ModelSpec,
    OptimSpec,
    PrivacySpec,
    TokenizerSpec,
    TokenizerTraining,
    TrainConfig,
    TrainSpec,
    load_yaml,
)
from coterie.dp.isolation import exact_engine
from coterie.dp.noise import discrete_gaussian
from coterie.dp.per_sample import engine, gradient_groups

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "over", "hills", "far", "away", "from", "home"]
MODEL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32,
}


def small(folder: Path, **privacy: Any) -> TrainConfig:
    """Settings of a small private run on made-up text; nothing is run."""
    chosen = random.Random(1)
    text = folder / "text.jsonl"
    lines = [" ".join(chosen.choices(WORDS, k=chosen.randint(3, 12))) for _ in range(60)]
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    public = folder / "public.txt"
    public.write_text(" ".join(WORDS) + "\n")
    settings = {
        "epsilon": 8.0,
        "clip_norm": 0.1,
        "delta": 1e-5,
        "isolation": "fast",
        "ledger": folder / "ledger",
    } | privacy
    return TrainConfig(
        model=ModelSpec(family="qwen3_moe", config=MODEL),
        data=DataSpec(
            train=(text,),
            sequence_length=16,
            tokenizer=TokenizerSpec(train=TokenizerTraining(files=(public,), vocab_size=400)),
            provenance="private",
            packing="records",
        ),
        optim=OptimSpec(kind="sgd" if "noise_bands" in settings else "adamw"),
        train=TrainSpec(rounds=3, batch_size=15, seed=1),
        privacy=PrivacySpec(**settings),
        run_dir=folder / "run",
        device="cpu",
    )


@contextmanager
def put(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def scaled_noise(times: float) -> Iterator[None]:
    """The sampler gives so much of what it drew."""
    drawn = discrete_gaussian._doubled

    def less(bucket: np.ndarray, fine: np.ndarray) -> np.ndarray:
        return np.rint(drawn(bucket, fine) * times).astype(np.int32)

    with put(discrete_gaussian, "_doubled", less):
        yield


@contextmanager
def clipping_off() -> Iterator[None]:
    """Every factor is 1."""
    with put(gradient_groups, "bounded_factors", lambda clipping, norms, thresholds: torch.ones_like(norms)):
        yield


@contextmanager
def tokens_clipped_singly() -> Iterator[None]:
    """Every predicted token is taken for a sample of its own."""
    whole = {kind: kind.accumulate for kind in (engine.Engine, exact_engine.ExactEngine)}

    def accumulate(self: engine.Engine, batch: Any, counted: int | None = None) -> Any:
        labels = batch["labels"]
        for place in range(1, max(2, labels.shape[1])):
            one = torch.full_like(labels, -100)
            one[:, place:][:, :1] = labels[:, place:][:, :1]
            found = whole[type(self)](self, {**batch, "labels": one}, counted)
        return found

    with put(engine.Engine, "accumulate", accumulate), put(exact_engine.ExactEngine, "accumulate", accumulate):
        yield


@contextmanager
def honest() -> Iterator[None]:
    yield


FAULTS: dict[str, Callable[[], Any]] = {
    "honest": honest,
    "noise off": lambda: scaled_noise(0.0),
    "noise halved": lambda: scaled_noise(0.5),
    "clipping off": clipping_off,
    "tokens clipped singly": tokens_clipped_singly,
}


def audited(subject: Subject, fault: str, seed: int, canaries: int, budget_s: float) -> EpsilonFindings:
    """One audit with a fault planted."""
    with FAULTS[fault]():
        return audit_epsilon(subject, seed=seed, canaries=canaries, budget_s=budget_s)


def row(fault: str, seed: int, found: EpsilonFindings) -> dict[str, Any]:
    """What a table needs of one audit."""
    return {
        "fault": fault,
        "seed": seed,
        "verdict": found.verdict.value,
        "premises": [each.name for each in found.premises if each.verdict is ClaimVerdict.ALARM],
        "one_run": {each.score: each.verdict.value for each in found.one_run},
        "auc": {each.score: each.auc for each in found.one_run},
        "bounds": {each.score: [each.lower, each.gaussian_lower, each.alarm_lower] for each in found.one_run},
        "epsilon_claimed": found.epsilon_claimed,
        "epsilon_lower": found.epsilon_lower,
        "epsilon_measured": found.epsilon_measured,
        "noise": next(each.value for each in found.premises if each.name == "noise"),
        "contribution": max(each.value for each in found.premises if each.name.startswith("contribution")),
    }


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """One fault's audits in a line."""
    alarms = sum(each["verdict"] == ClaimVerdict.ALARM for each in rows)
    seen = sum(ClaimVerdict.ALARM in each["one_run"].values() for each in rows)
    above = sum(float(each["epsilon_lower"] or 0) > each["epsilon_claimed"] for each in rows)
    noise, reach = ([each[name] for each in rows] for name in ("noise", "contribution"))
    return (
        f"{rows[0]['fault']:24} alarm in {alarms} of {len(rows)}, by canaries alone in {seen}, lower bound above the "
        f"claim in {above}; noise {min(noise):.4f} to {max(noise):.4f}, contribution {min(reach):.4f} to "
        f"{max(reach):.4f}; {sum(each['cpu_s'] for each in rows) / len(rows):.1f} CPU-seconds each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--canaries", type=int, default=200, help="0: premises alone")
    parser.add_argument("--budget-s", type=float, default=30.0)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--config", type=Path, help="train.yaml; default: a small model")
    parser.add_argument("--isolation", choices=["fast", "exact"], default="fast")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_yaml(chosen.config, TrainConfig) if chosen.config else None
        subject = Subject.of_settings(config or small(Path(folder), isolation=chosen.isolation))
        rows: list[dict[str, Any]] = []
        if chosen.json is not None and chosen.json.is_file():
            rows = json.loads(chosen.json.read_text("utf-8"))
        done = {(each["fault"], each["seed"]) for each in rows}
        for fault in chosen.faults:
            for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
                if (fault, seed) in done:
                    continue
                began = time.process_time()
                found = audited(subject, fault, seed, chosen.canaries, chosen.budget_s)
                rows.append({**row(fault, seed, found), "cpu_s": time.process_time() - began})
                if chosen.json is not None:
                    chosen.json.write_text(json.dumps(rows, indent=1, default=str))
            print(told([each for each in rows if each["fault"] == fault]), flush=True)


if __name__ == "__main__":
    main()
