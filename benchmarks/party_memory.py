"""What each rank of a party holds from a lot's first record to its push's last part, where sums are most of it.

    python benchmarks/party_memory.py --json party_memory.json    # a minute
    python benchmarks/party_memory.py --matrices 4                # for trying this script

Every rank computes its records of a lot (`isolation: fast`), and sums go to their owners, are noised and spooled.
Then rank 0 pushes part by part to a host that takes the bytes and drops them. Two kinds of models:

- Embeddings of 3.1 million values each. Arms: ``parts``, as a party does it; ``whole``, as it was before: every rank
  gets all noised sums, and all bytes of the push lie at rank 0 before the first leaves.
- Layers of 16 experts that are lent from files, as large as four embeddings each. Arms: ``layers``, whole ones at
  every rank (`devices`); ``rows``, those of each rank's own experts (`experts_over`).

Numbers are ranks.

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
from coterie.config import FederationConfig, PrivacySpec
from coterie.dp.accounting.budget import PrivacyWarning
from coterie.dp.accounting.releases import Pending
from coterie.dp.open_run import RunEntry, open_run
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.federation.cancel import NEVER
from coterie.federation.experts.parts import Part, chunks_in
from coterie.federation.experts.push_sums import Push, Pusher
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.transport import Lane, Message, Transport
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.spread.beside import spread_beside
from coterie.models.streaming.cache import FileStore, WeightCache
from coterie.models.streaming.streamer import LayerStreamer
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.ranks.ranks import Ranks
from coterie.training.data.packing import pack
from coterie.training.experts.exchange import make_contribution
from coterie.training.experts.gateway import SUMS, GatewayContribution, dismiss
from coterie.training.experts.held_sums import DTYPES, TRUNK, Asked, HeldSums, SumsAtOwners, SumValues, bring, held
from coterie.training.experts.host import model_parts
from coterie.training.experts.shared_trunk import shared_names
from coterie.training.party.helping import HelpingRank
from coterie.training.party.inputs import PartyInputs, PrivacyInputs, Weights, trunk_tensors
from coterie.training.party.own_trunk import OwnTrunk
from coterie.training.planning.measured import peak_rss_bytes
from harness import machine
from launched import figures_of

ARMS = {
    "whole-1": ("whole", 1), "parts-1": ("parts", 1), "whole-2": ("whole", 2), "parts-2": ("parts", 2),
    "layers-1": ("layers", 1), "layers-2": ("layers", 2), "rows-2": ("rows", 2), "layers-4": ("layers", 4),
    "rows-4": ("rows", 4),
}  # fmt: skip
ROWS, WIDTH = 16384, 192
EXPERTS, HIDDEN, INTERMEDIATE = 16, 256, 1024
"""12.6 million values a layer: as many as four embeddings."""


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


class Measured(HelpingRank):
    """A rank whose peak begins with the first lot, when everything is open."""

    before = 0

    def _do(self, step: dict[str, Any]) -> None:
        if step["what"] == SUMS:
            self.before = begin_peak()
        super()._do(step)


def begin_peak() -> int:
    """What this process has now; its peak begins anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(psutil.Process().memory_info().rss)


def party(ranks: Ranks, layers: int, folder: Path, over: int) -> tuple[PartyInputs, nn.Module]:
    """A party of a private federation, and the whole model whose experts it is lent."""
    sizes = {
        "num_hidden_layers": layers, "num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
    }  # fmt: skip
    whole, model = tiny_model("olmoe", **sizes), tiny_model("olmoe", **sizes)
    for layer in expert_layers(model):
        for name, param in layer.parameters().items():
            setattr(layer.module, name, nn.Parameter(torch.empty_like(param, device="meta")))
    rules = {"epsilon": 8.0, "delta": 1e-3, "lot_size": 8, "isolation": "fast"}
    federation = FederationConfig.model_validate({
        "name": "bench", "model": {"family": "olmoe"}, "exchange": "experts", "privacy": rules, "trunk": "shared",
        "weights_dtype": "float32", "train": {"rounds": 2},
        "parties": {name: {"endpoint": f"127.0.0.1:{7000 + i}"} for i, name in enumerate(("alder", "birch"))},
        "coordinator": {"endpoint": "127.0.0.1:7999"},
    })  # fmt: skip
    spec = PrivacySpec(**{**rules, "ledger": folder / "ledger", "physical_batch": 2, "method": "book_keeping"})
    torch.manual_seed(1)  # all ranks have the same records
    text = pack(torch.randint(3, VOCAB, (64, 16)).tolist(), sequence_length=16, packing="chunks", end_id=2)
    placement = Placement.of_spec(federation.placement, ["alder", "birch"], model)
    inputs = PartyInputs(
        "alder", federation, model, lambda: Weights(trunk_tensors(model), {}), placement, text, None, folder,
        torch.device("cpu"), cache="disk", privacy=PrivacyInputs(spec, 2, seed=3), ranks=ranks,
        spread=spread_beside(model, ranks, over) if over > 1 else None,
    )  # fmt: skip
    return inputs, whole


def be_party_rank(way: str, matrices: int, folder: Path) -> None:
    """One rank of a party whose layers are lent; its figures are written to a file of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PrivacyWarning)
    with dp.join_ranks(patience_s=120.0) as ranks:
        over = ranks.world if way == "rows" else 1
        inputs, whole = party(ranks, matrices // 4, folder, over)
        if ranks.rank > 0:
            del whole
            helping = Measured(inputs)
            helping.run()
            before, peak = helping.before, peak_rss_bytes()
        else:
            before, peak = be_gateway(inputs, whole, over)
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(peak - before), encoding="utf-8")


def be_gateway(inputs: PartyInputs, whole: nn.Module, over: int) -> tuple[int, int]:
    """Lend, compute and push; what rank 0 had before the lot, and its peak until the push was over."""
    layers = expert_layers(whole)
    assert inputs.cache_folder is not None
    cache = WeightCache(FileStore(inputs.cache_folder), len(layers), over)
    for layer in layers:
        cache.put(layer.index, {name: value.detach() for name, value in layer.parameters().items()})
    del layers, layer, whole
    trunk = OwnTrunk(inputs, inputs.weights(), shared_names(inputs.federation, inputs.model), on_host=True)
    made = make_contribution(trunk, lambda: "run")
    contribution = made if inputs.ranks.world == 1 else GatewayContribution(made, inputs, lambda: "run")
    streamer = LayerStreamer(cache, inputs.device, torch.float32)
    contribution.open(streamer)
    before = begin_peak()
    sums = contribution.sums(1, {}, streamer, NEVER)
    streamer.drop_all()
    assert sums.values is not None
    push([part for part in model_parts(inputs.federation, inputs.model, inputs.placement) if part.trained],
         sums.values, whole=False)  # fmt: skip
    peak = peak_rss_bytes()
    contribution.close()
    dismiss(inputs.ranks)
    streamer.close()
    return before, peak


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
        before = begin_peak()
        pending = run.begin(1, {})
        assert isinstance(pending, Pending)
        noised, _ = run.publish(pending, to_all=way == "whole")
        own = held(noised, {}, run.lot_sums.holdings)
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
        be = be_party_rank if options.rank_of in ("layers", "rows") else be_rank
        be(options.rank_of, options.matrices, options.folder)
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
