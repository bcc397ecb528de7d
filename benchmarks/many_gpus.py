"""What 8 and 64 GPUs would need and take for OLMoE-1B-7B and Qwen3-30B-A3B: a calculation; nothing ran on a GPU.

    python benchmarks/many_gpus.py                # the tables of docs/concepts/several-devices.md, in seconds
    python benchmarks/many_gpus.py --measure      # first count the bytes again, on small models, with real ranks

Bytes are coterie's own: `BYTES` is what ``--measure`` counts, on two small models and at 2 and 4 ranks, in sessions
as they are: state at a rank, what is added up and handed out between ranks, rows that travel to experts, what lies
in the spool. It ends with an error where the count differs. Shapes are those of the published configs. Rates:
NVIDIA's peak rates of H100 SXM and DGX H100, of which `SHARE` is taken; noise and disk as in ordinary machines.
Tokens choose experts evenly, nothing overlaps.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coterie import dp
from coterie.dp.accounting.budget import PrivacyWarning
from coterie.models import seam
from coterie.models.spread.spread import spread_experts
from coterie.models.zoo.build import build_model
from coterie.models.zoo.families import experts_per_token
from coterie.models.zoo.presets import preset
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.ranks.ranks import Ranks
from launched import figures_of

MODELS = ("OLMoE-1B-7B", "Qwen3-30B-A3B")
LOT, TOKENS, LORA_RANK = 1024, 512, 16
"""Expected records of a lot, tokens of each, and the rank of adapters on all experts."""

# NVIDIA H100 Tensor Core GPU datasheet (SXM, without sparsity) and DGX H100 user guide.
BF16, FLOAT32 = 989.4e12, 66.9e12
NVLINK, INFINIBAND, PCIE = 450e9, 50e9, 64e9
"""Bytes a second in one direction: of a GPU inside its node, of its own network card, to host memory."""
MEMORY, NODE = 80e9, 8
SHARE = 0.4
"""Of the peak rates, what large products and exchanges come to."""
NOISE_S = 1.7e-9
"""A value, one core: docs/concepts/dp-engine.md."""
CORES, DISK = 8, 2e9
"""Cores of each rank, and bytes a second that a node's disk writes, synced."""


@dataclass(frozen=True)
class Bytes:
    """Counted by `measure`, in float32.

    Attributes:
        weight, optimizer, sums: of a trained value, at a rank that holds it.
        up: of a value that is added up at its owner, from each of the others.
        down: of one that its owner hands out, to each of the others.
        vectors: hidden vectors of a row (one token, one rank) that cross in a round.
        row_numbers: bytes of a row beside them, over (2 K weights, K experts and a record) times 4: there once,
            weights' gradients back.
        spool: of a released value.
    """

    weight: float = 4.0
    optimizer: float = 8.0
    sums: float = 4.0
    up: float = 4.0
    down: float = 4.0
    vectors: float = 4.0
    row_numbers: float = 1.0
    spool: float = 4.0


BYTES = Bytes()


# ---- shapes ----


@dataclass(frozen=True)
class Layout:
    """A model by its matrices.

    Attributes:
        name: as published.
        trunk: (rows, columns) of every matrix that each token passes.
        experts: of every expert matrix of one layer, once for each of its experts.
        layers, count, chosen, hidden: MoE layers, experts of each, those of a token, width.
        other: parameters in neither: embeddings that are looked up, norms, biases.
    """

    name: str
    trunk: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, int], ...]
    layers: int
    count: int
    chosen: int
    hidden: int
    other: int

    @classmethod
    def of(cls, name: str) -> Layout:
        """A published model."""
        model = build_model(preset(name), meta=True)
        layers = seam.expert_layers(model)
        stacked = layers[0].parameters().values()
        inside = {id(p) for layer in layers for p in layer.parameters().values()}
        looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        rest = [p for p in model.parameters() if id(p) not in inside]
        matrices = [tuple(p.shape) for p in rest if p.ndim == 2 and id(p) not in looked_up]
        config: Any = model.config
        return cls(
            name, tuple(matrices), tuple((p.shape[-2], p.shape[-1]) for p in stacked), len(layers),
            layers[0].num_experts, experts_per_token(config), int(config.hidden_size),
            sum(p.numel() for p in rest) - sum(a * b for a, b in matrices),
        )  # fmt: skip

    @property
    def trunk_values(self) -> int:
        """Parameters that are no expert's."""
        return self.other + sum(a * b for a, b in self.trunk)

    @property
    def expert_values(self) -> int:
        """Parameters of all experts."""
        return self.layers * self.count * sum(a * b for a, b in self.experts)

    @property
    def adapter_values(self) -> int:
        """Of LoRA on all experts."""
        return self.layers * self.count * sum(LORA_RANK * (a + b) for a, b in self.experts)

    def products(self) -> float:
        """Operations of one pass of one token through all matrices it meets, and its attention."""
        active = sum(a * b for a, b in self.trunk) + self.layers * self.chosen * sum(a * b for a, b in self.experts)
        return 2.0 * active + self.layers * 2.0 * TOKENS * self.hidden

    def clipping(self, lora: bool) -> float:
        """Operations of a record for its norms, the cheaper of both ways each time, and for the clipped sums."""
        total = 0.0
        rows = TOKENS * self.chosen / self.count  # of a record at one expert
        for a, b in _trained(self.experts, lora):
            total += self.layers * self.count * (_norm(rows, a, b) + 2 * rows * a * b)
        if not lora:
            total += sum(_norm(TOKENS, a, b) + 2.0 * TOKENS * a * b for a, b in self.trunk)
        return total


def _trained(matrices: Sequence[tuple[int, int]], lora: bool) -> Iterator[tuple[int, int]]:
    for a, b in matrices:
        yield from ((LORA_RANK, b), (a, LORA_RANK)) if lora else ((a, b),)


def _norm(rows: float, a: int, b: int) -> float:
    return min(2 * rows * a * b, 2 * rows * rows * (a + b))


# ---- the calculation ----


@dataclass(frozen=True)
class Row:
    """One line of a table: seconds of a round, bytes at a GPU."""

    gpus: int
    way: str
    state: float
    crossing: float
    crossing_s: float
    compute_s: float
    clip_s: float
    noise_s: float
    spool_s: float

    @property
    def total_s(self) -> float:
        """Nothing overlaps but the disk, which writes a result beside the next round and then has to be done."""
        return max(self.crossing_s + self.compute_s + self.clip_s + self.noise_s, self.spool_s)

    def cells(self) -> list[str]:
        """As the page shows it."""
        fits = "" if self.state <= MEMORY else ", does not fit"
        seconds = (self.compute_s, self.clip_s, self.crossing_s, self.noise_s, self.spool_s, self.total_s)
        return [
            str(self.gpus), self.way, f"{self.state / 1e9:.3g} GB{fits}", f"{self.crossing / 1e9:.2g} GB",
            *(f"{each:.2g}" for each in seconds),
        ]  # fmt: skip


COLUMNS = (
    "GPUs", "way", "state of a GPU", "crosses, of a GPU", "forward, backward", "norms, sums", "crossing", "noise",
    "spool", "round, s",
)  # fmt: skip


def state_bytes(layout: Layout, lora: bool, over: int, gpus: int) -> float:
    """Weights in bfloat16 and sums in float32 where they are held, AdamW with a master copy in float32 at owners."""
    frozen = BYTES.weight / 2
    experts = layout.adapter_values if lora else layout.expert_values
    trunk = 0 if lora else layout.trunk_values
    held = frozen * (layout.trunk_values + layout.expert_values / over + (experts / over if lora else 0))
    return held + BYTES.sums * (trunk + experts / over) + (BYTES.optimizer + BYTES.weight) * (trunk + experts) / gpus


def row(layout: Layout, gpus: int, over: int, lora: bool) -> Row:
    """One way.

    Args:
        layout: the model.
        gpus: of the party.
        over: ranks that the experts of every layer are spread over; 1: whole models everywhere.
        lora: train adapters of the experts alone.
    """
    replicas, tokens = gpus // over, LOT * TOKENS / gpus
    experts = layout.adapter_values if lora else layout.expert_values
    trunk = 0 if lora else layout.trunk_values
    network = NVLINK if gpus <= NODE else INFINIBAND
    both = BYTES.up + BYTES.down
    sums = both * (trunk * (gpus - 1) / gpus + experts / over * (replicas - 1) / replicas)
    visited = (over - 1) * (1 - (1 - 1 / over) ** layout.chosen)
    numbers = BYTES.row_numbers * 4 * (3 * layout.chosen + 1)
    rows = tokens * layout.layers * visited * (BYTES.vectors * layout.hidden * 2 + numbers)  # bfloat16
    rows_s = rows / (NVLINK if over <= NODE else INFINIBAND)
    released = trunk + experts
    compute = tokens * layout.products() * 2  # forward, and backward to the inputs
    on_disk = BYTES.spool * released / gpus * min(gpus, NODE)
    way = "records" if over == 1 else "experts" if replicas == 1 else f"experts, {replicas} groups"
    return Row(
        gpus, way, state_bytes(layout, lora, over, gpus), sums + rows, (sums / network + rows_s) / SHARE,
        compute / BF16 / SHARE,
        LOT / gpus * layout.clipping(lora) / FLOAT32 / SHARE,
        released / gpus * (NOISE_S / CORES + 2 * BYTES.sums / PCIE), on_disk / DISK,
    )  # fmt: skip


def rows_of(layout: Layout, lora: bool) -> list[Row]:
    """All ways of a model."""
    return [
        row(layout, 8, 1, lora), row(layout, 8, 8, lora),
        row(layout, 64, 1, lora), row(layout, 64, 8, lora), row(layout, 64, 64, lora),
    ]  # fmt: skip


def tables() -> str:
    """The tables, as Markdown."""
    text = []
    for name in MODELS:
        layout = Layout.of(name)
        for lora in (False, True):
            what = f"LoRA r={LORA_RANK} on all experts" if lora else "all parameters"
            text += [f"**{name}, {what}**", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
            text += ["| " + " | ".join(each.cells()) + " |" for each in rows_of(layout, lora)] + [""]
    return "\n".join(text)


# ---- counting ----


@dataclass
class Count:
    """What one rank sent in a round."""

    up: int = 0
    down: int = 0
    rows: int = 0
    row_bytes: int = 0
    vector_bytes: int = 0


def counted(ranks: Ranks, hidden: int) -> Count:
    """Count what one rank sends to others, from now on."""
    count = Count()
    add_up, hand_out, exchange = ranks.add_up, ranks.hand_out, ranks.exchange

    def up(pieces: Sequence[Tensor], owner: int) -> None:
        count.up += _size(pieces) * (owner != ranks.rank)
        add_up(pieces, owner)

    def down(pieces: Sequence[Tensor], owner: int) -> None:
        count.down += _size(pieces) * (owner == ranks.rank) * (ranks.world - 1)
        hand_out(pieces, owner)

    def rows(tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        if tensor.ndim > 1:  # else: how many rows there will be
            abroad = sum(send) - send[ranks.rank]
            size = abroad * tensor.shape[1:].numel() * tensor.element_size()
            if tensor.shape[-1] == hidden:
                count.vector_bytes += size
            else:
                count.row_bytes += size
                count.rows += abroad if tensor.dtype == torch.int32 else 0  # experts and record, told once a row
        return exchange(tensor, send, receive)

    for name, method in (("add_up", up), ("hand_out", down), ("exchange", rows)):
        setattr(ranks, name, method)
    return count


def _size(pieces: Sequence[Tensor]) -> int:
    return sum(piece.numel() * piece.element_size() for piece in pieces)


def be_rank(family: str, spread: bool, folder: Path) -> None:
    """One rank of a small private run; what it counted is written to a file of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PrivacyWarning)
    ids = torch.randint(3, VOCAB, (24, 8), generator=torch.Generator().manual_seed(1))
    with dp.join_ranks(patience_s=120.0) as ranks:
        model = tiny_model(family)
        hidden, chosen = int(model.config.hidden_size), experts_per_token(model.config)
        if spread:
            spread_experts(model, ranks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        session = dp.make_private(
            model, optimizer, [{"input_ids": own, "labels": own} for own in ids], budget=dp.Budget(8.0, 1e-3),
            lot_size=8, rounds=1, physical_batch=8, clip_norm=1.0, seed=11, self_check=False, isolation="fast",
            method="book_keeping", ledger=folder / "ledger", run="bytes", ranks=ranks,
        )  # fmt: skip
        with session:
            lot = session.next_lot()
            sums = session.lot_sums.compute(lot, "1|0")
            session.save(folder / "saved")  # a spool is kept for a checkpoint alone
            count = counted(ranks, hidden)
            session.step(lot)
            ranks.together("spooled", lambda: None)
            files = folder.glob("ledger/*/spool/**/release-*")
            spooled = sum(_size([*load_file(path).values()]) for path in files)
    trained = [p for p in model.parameters() if p.requires_grad]
    apart = (
        sum(p.numel() for layer in seam.expert_layers(model) for p in layer.parameters().values()) if spread else 0
    )
    state = [value for each in optimizer.state.values() for name, value in each.items() if name != "step"]
    figures = {
        **vars(count), "values": sum(p.numel() for p in trained), "apart": apart, "weights": _size(trained),
        "sums": _size([*sums.values()]), "optimizer": _size(state), "spooled": spooled, "chosen": chosen,
        "hidden": hidden,
    }  # fmt: skip
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(figures), encoding="utf-8")


def run_ranks(family: str, spread: bool, world: int) -> list[dict[str, int]]:
    """What all ranks of a small run counted."""
    return figures_of([__file__, "--rank-of", family, *(["--spread"] * spread)], world, family)


def bytes_of(found: Sequence[dict[str, int]]) -> Bytes:
    """From what the ranks of one run counted."""

    def total(name: str) -> int:
        return sum(own[name] for own in found)

    first, others = found[0], len(found) - 1
    everywhere = first["values"] - first["apart"]
    rows, chosen = total("rows"), first["chosen"]
    return Bytes(
        total("weights") / total("values"), total("optimizer") / (everywhere + total("apart")),
        total("sums") / total("values"),
        total("up") / everywhere / others, total("down") / everywhere / others,
        total("vector_bytes") / rows / first["hidden"] / 4 if rows else BYTES.vectors,
        total("row_bytes") / rows / (4 * (3 * chosen + 1)) if rows else BYTES.row_numbers,
        first["spooled"] / (everywhere + total("apart")),
    )  # fmt: skip


def measure() -> None:
    """Count again; ends with an error where `BYTES` says otherwise."""
    for family in ("olmoe", "qwen3_moe"):
        for spread, world in ((False, 2), (False, 4), (True, 2), (True, 4)):
            found = bytes_of(run_ranks(family, spread, world))
            print(family, "experts" if spread else "records", f"over {world} ranks:", found, file=sys.stderr)
            if found != BYTES:
                raise SystemExit(f"counted {found}, and the tables are made from {BYTES}")


def main() -> None:
    """Print the tables, or be one rank of a count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="count the bytes again, first")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--spread", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        be_rank(options.rank_of, options.spread, options.folder)
        return
    if options.measure:
        measure()
    print(tables())


if __name__ == "__main__":
    main()
