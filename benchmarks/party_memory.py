"""What each rank of a party holds from a lot's first record to its push's last part, where sums are most of it.

    python benchmarks/party_memory.py --json party_memory.json    # a minute
    python benchmarks/party_memory.py --matrices 4                # for trying this script

Every rank computes its records of a lot (`isolation: fast`, embeddings of 3.1 million values each), and sums go to
their owners, are noised and spooled. Then rank 0 pushes one part for each embedding to a host that takes the bytes
and drops them. Arms: ``parts``, as a party does it; ``whole``, as it was before: every rank gets all noised sums, and
all bytes of the push lie at rank 0 before the first leaves. ``1`` and ``2`` are ranks.

``peak`` is the kernel's high-water mark (VmHWM) beyond what the rank had when the run was open.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from coterie import dp
from coterie.dp.accounting.budget import PrivacyWarning
from coterie.dp.accounting.releases import Pending
from coterie.dp.open_run import RunEntry, open_run
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.federation.experts.parts import Part, chunks_in
from coterie.federation.experts.push_sums import Push, Pusher
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.transport import Lane, Message, Transport
from coterie.ranks.ranks import Ranks
from coterie.training.experts.held_sums import DTYPES, TRUNK, Asked, HeldSums, SumsAtOwners, SumValues, bring, held
from coterie.training.planning.measured import peak_rss_bytes
from harness import machine
from launched import figures_of

ARMS = {"whole-1": ("whole", 1), "parts-1": ("parts", 1), "whole-2": ("whole", 2), "parts-2": ("parts", 2)}
ROWS, WIDTH = 16384, 192


class Embeddings(nn.Module):
    """Sums of some embeddings; nearly no activations."""

    def __init__(self, matrices: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(ROWS, WIDTH) for _ in range(matrices))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([table(ids) for table in self.tables]).sum(0)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return cast("Tensor", model(batch["ids"])).square().mean((1, 2))


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"ids": torch.stack([item["ids"] for item in items])}


class Sink:
    """A transport whose peer takes every push and drops it."""

    def request_async(self, host: str, lane: Lane, message: Message, deadline_s: float) -> Future[Message]:
        answer: Future[Message] = Future()
        body = {"missing": list(range(chunks_in(message.body["size"])))} if "size" in message.body else {}
        answer.set_result(message.reply(message.kind, body))
        return answer


def push(parts: Sequence[Part], values: SumValues, whole: bool) -> None:
    """Bring all parts to the host."""

    def encoded(part: Part) -> Tensor:
        return part.encode(values.of(part), torch.float32)

    ready = {part.number: encoded(part) for part in parts} if whole else {}
    items = [
        Push(part, lambda part=part: ready[part.number] if whole else encoded(part), "")  # type: ignore[misc]
        for part in parts
    ]
    Pusher(cast("Transport", Sink()), deadline_s=60.0).push_all(items, Attempt(1, 1))


def gateway(own: HeldSums, ranks: Ranks, listed: Sequence[Any]) -> SumsAtOwners:
    """As `coterie.training.experts.gateway` asks the other ranks."""

    @contextmanager
    def telling(asked: Sequence[Asked], dtype: torch.dtype) -> Iterator[None]:
        ranks.tell("part", lambda: {"asked": [list(each) for each in asked], "dtype": str(dtype)})
        yield

    return SumsAtOwners(own, ranks, listed, telling)


def be_rank(way: str, matrices: int, folder: Path) -> None:
    """One rank's lot and push; its figures are written to a file of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PrivacyWarning)
    torch.manual_seed(1)  # all ranks have the same records
    records = [{"ids": row} for row in torch.randint(0, ROWS, (64, 16))]
    plan = PrivacyPlan(dp.Budget(8.0, 1e-3), 2, 8, seed=3)
    with dp.join_ranks(patience_s=120.0) as ranks:
        model = Embeddings(matrices)
        options = ComputeOptions(physical_batch=2, self_check=False, method="book_keeping")
        data, engine = PrivateData.of(records, collate), options.engine(plan, model, loss)
        engine.compared = True
        run = open_run(plan, options, data, model, engine, None, RunEntry(folder / "ledger", "run"), ranks=ranks)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = psutil.Process().memory_info().rss
        pending = run.begin(1, {})
        assert isinstance(pending, Pending)
        noised, _ = run.publish(pending, to_all=way == "whole")
        own = held(noised, {})
        del noised
        listed = ranks.together("who has which sums", own.listed)
        if ranks.rank == 0:
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            parts = [Part(number, "birch", TRUNK, (), (each,)) for number, each in enumerate(shapes.items())]
            push(parts, gateway(own, ranks, listed) if ranks.world > 1 else own, way == "whole")
            ranks.tell("part", lambda: None)
        else:
            while (step := ranks.tell("part", lambda: None)) is not None:
                bring(own, ranks, [Asked(*each) for each in step["asked"]], DTYPES[step["dtype"]])
        run.close()
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(peak_rss_bytes() - before), encoding="utf-8")


def main() -> None:
    """Run all arms, or be one rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        be_rank(options.rank_of, options.matrices, options.folder)
        return
    sums = 4 * options.matrices * ROWS * WIDTH
    print(f"sums {sums / 1e6:.0f} MB")
    arms = {}
    for name, (way, world) in ARMS.items():
        arms[name] = figures_of([__file__, "--rank-of", way, "--matrices", str(options.matrices)], world, name)
        print(f"{name:>8}  peak {', '.join(f'{each / sums:.2f}' for each in arms[name])} times the sums", flush=True)
    if options.json is not None:
        found = {"machine": machine(), "sums_bytes": sums, "peak_bytes": arms}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
