"""What several ranks gain on a private run: time, processor time and memory of a step, beside one process.

    python benchmarks/ranks.py --json ranks.json                             # minutes
    python benchmarks/ranks.py --shape 32x256 --rounds 4 --tries 3           # the shape that is compared
    python benchmarks/ranks.py --model small --shape 4x16 --rounds 2 --tries 1    # seconds

Arms: ``alone``, one process; ``data-2``, whole models at 2 ranks; ``experts-2`` and ``experts-4``, experts spread
over 2 and 4 ranks; ``layers-2`` and ``layers-4``, the same, and each layer gathered whole while it is computed;
``groups-4``, two groups of 2 ranks that each hold all experts. A step is a whole round of a
private session: clipping, what crosses between ranks, noise, spool, ledger, AdamW. Ranks are processes here
with one thread each, and every arm has the same seeded lots. Arms take turns ``--tries`` times. A round's figure is
its median over the tries, so that arms are compared lot by lot; an arm's is the mean over its rounds but the first.

``efficiency`` is the processor time of ``alone`` over that of all ranks of an arm together: what else runs on the
machine changes it less than wall time (``speedup``). ``memory`` is the peak resident size of the largest rank beyond
what it has after imports, over that of ``alone``; the peak is reset when the model is built and cut. ``state`` is the
bytes of weights, sums and optimizer's state of the largest rank, over those of ``alone``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from coterie import dp
from coterie.dp.accounting.budget import PrivacyWarning
from coterie.models import seam
from coterie.models.spread.spread import spread_experts
from coterie.training.planning.measured import peak_rss_bytes
from dp_step import VOCABULARY, language_model
from launched import figures_of

ARMS = {
    "alone": ("alone", 1), "data-2": ("data", 2), "experts-2": ("experts", 2), "experts-4": ("experts", 4),
    "groups-4": ("groups", 4), "layers-2": ("layers", 2), "layers-4": ("layers", 4),
}  # fmt: skip
RECORDS = 256


def small_model() -> nn.Module:
    """Two layers of 8 experts, hidden 32: for trying this script."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    seam.select(model)
    return model


MODELS = {"41M": language_model, "small": small_model}


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def be_rank(mode: str, model_name: str, shape: str, rounds: int, folder: Path) -> None:
    """One rank's run; its figures are written to a file of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PrivacyWarning)
    imported = psutil.Process().memory_info().rss
    lot, tokens = (int(part) for part in shape.split("x"))
    ids = torch.randint(3, VOCABULARY, (RECORDS, tokens), generator=torch.Generator().manual_seed(1))
    steps = []
    with dp.join_ranks(patience_s=120.0) as ranks:
        model = MODELS[model_name]()
        if mode in ("experts", "groups", "layers"):
            spread_experts(model, ranks, 2 if mode == "groups" else None, gathered=mode == "layers")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        session = dp.make_private(
            model, torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False), [{"input_ids": row} for row in ids],
            collate, budget=dp.Budget(8.0, 1e-3), lot_size=lot, rounds=rounds + 1,
            physical_batch=-(-lot // ranks.world), clip_norm=1.0, seed=11, self_check=False, isolation="fast",
            method="book_keeping", ledger=folder / "ledger", run="bench", ranks=ranks,
        )  # fmt: skip
        with session:
            for each in session:
                wall, own = time.perf_counter(), time.process_time()
                session.step(each)
                steps.append((time.perf_counter() - wall, time.process_time() - own))
    kept = [v for own in session.optimizer.state.values() for v in own.values() if isinstance(v, Tensor)]
    state = sum(tensor.nbytes for tensor in (*model.parameters(), *session.lot_sums.engine.take().values(), *kept))
    figures = {"steps": steps[1:], "memory": peak_rss_bytes() - imported, "state": state}
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(figures), encoding="utf-8")


def run_arm(mode: str, world: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of all ranks of an arm."""
    command = [
        __file__, "--rank-of", mode, "--model", options.model, "--shape", options.shape,
        "--rounds", str(options.rounds),
    ]  # fmt: skip
    return figures_of(command, world, mode)


def summary(tries: list[list[dict[str, Any]]]) -> dict[str, float]:
    """An arm's figures: a round takes as long as its slowest rank, and the processor time of all."""
    rounds = list(zip(*(zip(*(rank["steps"] for rank in each), strict=True) for each in tries), strict=True))
    wall = statistics.fmean(statistics.median(max(own[0] for own in step) for step in same) for same in rounds)
    processor = statistics.fmean(statistics.median(sum(own[1] for own in step) for step in same) for same in rounds)
    memory = statistics.median(max(rank["memory"] for rank in each) for each in tries)
    state = max(rank["state"] for rank in tries[0])
    return {"wall_s": wall, "processor_s": processor, "memory_bytes": memory, "state_bytes": state}


def main() -> None:
    """Run all arms, or be one rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="41M")
    parser.add_argument("--shape", default="16x64", help="expected records of a lot, and tokens of each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tries", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="beside `alone`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        be_rank(options.rank_of, options.model, options.shape, options.rounds, options.folder)
        return
    chosen = {name: arm for name, arm in ARMS.items() if name in ("alone", *options.arms)}
    tries: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in chosen}
    for number in range(options.tries):
        for name, (mode, world) in chosen.items():
            tries[name].append(run_arm(mode, world, options))
            print(f"{name}, try {number + 1} of {options.tries}", file=sys.stderr, flush=True)
    arms = {name: summary(found) for name, found in tries.items()}
    alone = arms["alone"]
    for name, own in arms.items():
        own["efficiency"] = alone["processor_s"] / own["processor_s"]
        own["speedup"] = alone["wall_s"] / own["wall_s"]
        own["memory"] = own["memory_bytes"] / alone["memory_bytes"]
        own["state"] = own["state_bytes"] / alone["state_bytes"]
        print(
            f"{name:>10}  step {own['wall_s']:.2f} s, processor {own['processor_s']:.2f} s, "
            f"efficiency {own['efficiency']:.2f}, speedup {own['speedup']:.2f}, memory {own['memory']:.2f} of alone, "
            f"state {own['state']:.2f}"
        )
    load = os.getloadavg()[0]
    print(f"load {load:.1f} on {os.cpu_count()} processors")
    if options.json is not None:
        described = {"model": options.model, "shape": options.shape, "load": load, "cpus": os.cpu_count()}
        options.json.write_text(json.dumps({"machine": described, "arms": arms}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
