"""Two ranks on GPUs beside one process: norms and clipped sums of the same records, and seconds.

    python benchmarks/gpu_ranks.py                      # part of benchmarks/gpu.sh
    python benchmarks/gpu_ranks.py --device cpu         # that the script itself runs, without a GPU

With two GPUs or more each rank has its own, and tensors go by NCCL. With one both use it, and tensors go through host
memory by Gloo, since NCCL refuses two ranks on one GPU; ``between_gpus`` says which it was. ``largest`` is the
largest relative difference to one process with the whole model on one GPU. ``refused`` is what opening a run says,
with the check of what its ranks compute together; empty where it opens and takes its round. It ends with an error
where something is above 1e-5 or refused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie import dp
from coterie.dp.clipping import Flat
from coterie.dp.per_sample.engine import Engine
from coterie.models import seam
from coterie.models.spread.spread import spread_experts, spread_of
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.ranks.processes import ProcessRanks, join_ranks
from coterie.ranks.ranks import Ranks
from harness import machine, write_figures

FAMILIES = ("olmoe", "gpt_oss")
WAYS: dict[str, dict[str, bool] | None] = {"devices": None, "experts_over": {}, "layers_over": {"gathered": True}}
AGREE = 1e-5
RECORDS, TOKENS, CLIP, REPEATS = 8, 32, 0.5, 3


def batches(rows: Tensor, at_once: int) -> Iterator[dict[str, Tensor]]:
    for ids in rows.split(at_once):
        yield {"input_ids": ids, "labels": ids}


def clipped(model: nn.Module, rows: Tensor, at_once: int) -> tuple[Tensor, dict[str, Tensor], float]:
    """Norms, clipped sums, and the median seconds of making them."""
    engine = Engine(model, clipping=Flat(CLIP), method="book_keeping")
    engine.compared = True  # with batches of one, by the session that was opened before
    seconds = []
    for _ in range(REPEATS):
        engine.take()
        began = time.perf_counter()
        norms = torch.cat([engine.accumulate(batch).norms for batch in batches(rows, at_once)])
        if rows.is_cuda:
            torch.cuda.synchronize(rows.device)
        seconds.append(time.perf_counter() - began)
    return norms, engine.take(), sorted(seconds)[REPEATS // 2]


def built(family: str, device: torch.device) -> nn.Module:
    """The same model everywhere."""
    model = tiny_model(family).to(device)
    seam.select(model)
    return model.eval()


def compared(ranks: Ranks, family: str, way: str, device: torch.device) -> dict[str, float]:
    """How far norms and sums are from those of one process, and the seconds of both; the same at all ranks."""
    rows = torch.randint(3, VOCAB, (RECORDS, TOKENS), generator=torch.Generator().manual_seed(5)).to(device)
    wanted, expected, alone_s = clipped(built(family, device), rows, 2)
    model, options = built(family, device), WAYS[way]
    if options is not None:
        spread_experts(model, ranks, **options)
    spread = spread_of(model)
    norms, sums, together_s = clipped(model, rows[ranks.rank :: ranks.world], 2)
    worst = 0.0
    for name, value in expected.items():
        if spread is not None and name in spread.cuts:
            value = spread.cuts[name].part(value, spread.held(spread.cuts[name]))
        else:
            ranks.add_up([sums[name]], 0)
            ranks.hand_out([sums[name]], 0)
        off = (sums[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)
        worst = max(worst, float(off))
    norms_off = float((norms / wanted[ranks.rank :: ranks.world] - 1).abs().max())
    found = ranks.together(f"{family} {way}", lambda: [norms_off, worst, together_s, alone_s])
    return {what: max(each[place] for each in found) for place, what in enumerate(("norms", "sums", "s", "alone_s"))}


def opens(ranks: Ranks, family: str, way: str, device: torch.device, folder: Path) -> str:
    """What opening a run says, with the comparison of what ranks compute together; empty where it opens."""
    model, options = built(family, device), WAYS[way]
    if options is not None:
        spread_experts(model, ranks, **options)
    ids = torch.randint(3, VOCAB, (16, TOKENS), generator=torch.Generator().manual_seed(6))
    records = [{"input_ids": row, "labels": row} for row in ids]
    budget, optimizer = dp.Budget(8.0, 1e-3), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    try:
        with dp.make_private(
            model, optimizer, records, budget=budget, lot_size=4, rounds=1, physical_batch=2, seed=1, ranks=ranks,
            ledger=folder, run=f"{family} {way}",
        ) as session:  # fmt: skip
            for lot in session:
                session.step(lot)
    except Exception as error:  # what is refused is a finding
        return f"{getattr(error, 'code', '-')}: {str(error).splitlines()[0][:200]}"
    return ""


def as_rank(kind: str, folder: Path, out: Path | None) -> None:
    device = torch.device("cpu")
    if kind == "cuda":
        own = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", own if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else 0)
        torch.cuda.set_device(device)
    with join_ranks() as ranks:
        assert isinstance(ranks, ProcessRanks)
        by_case: dict[str, Any] = {}
        for family in FAMILIES:
            for way in WAYS:
                by_case[f"{family} {way}"] = compared(ranks, family, way, device)
        opened = {way: opens(ranks, FAMILIES[0], way, device, folder) for way in WAYS}
        name = torch.cuda.get_device_name(device) if kind == "cuda" else "processor"
        largest = max(each[what] for each in by_case.values() for what in ("norms", "sums"))
        if ranks.rank == 0:
            figures = {
                "device": name, "between_gpus": ranks.between_gpus, "largest": largest, "refused": opened,
                "by_case": by_case, "machine": machine(),
            }  # fmt: skip
            print(figures, flush=True)
            write_figures(out, figures)
    if not largest <= AGREE or any(opened.values()):
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "torch finds no GPU here; --device cpu shows that the script runs\n")
    if options.folder is not None:
        as_rank(options.device, options.folder, options.json)
        return
    with tempfile.TemporaryDirectory() as folder:
        words = [__file__, "--device", options.device, "--folder", folder]
        words += ["--json", str(options.json.resolve())] if options.json else []
        sys.exit(subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words],
            check=False,
        ).returncode)  # fmt: skip


if __name__ == "__main__":
    main()
