"""What ranks do in tests of experts that are spread over them; `rank_processes.run_ranks` starts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie import dp
from coterie.config import LoraSpec, ModelSpec
from coterie.dp.clipping import policy
from coterie.dp.losses import default_loss
from coterie.dp.per_sample.engine import Engine
from coterie.dp.session import PrivateSession
from coterie.models import seam
from coterie.models.lora import attach_adapters
from coterie.models.spread.spread import spread_experts, spread_of
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.ranks.ranks import Ranks
from helpers.rank_tasks import BUDGET, LOT, words

RECORDS = 10
TOKENS = 12


def texts(records: int = RECORDS, seed: int = 5) -> Tensor:
    """[records, TOKENS] made-up token ids."""
    return torch.randint(3, VOCAB, (records, TOKENS), generator=torch.Generator().manual_seed(seed))


def built(family: str, lora: bool = False, checkpointing: bool = False) -> nn.Module:
    """The same model in every process."""
    model: Any = tiny_model(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = with_adapters(model)
    seam.select(model)
    model.train()
    return model


def with_adapters(model: nn.Module) -> nn.Module:
    """Adapters of the experts' matrices and of one of attention; their second factors are not zero."""
    names = [name for name in seam.expert_layers(model)[0].parameters() if not name.endswith("_bias")]
    adapted = attach_adapters(model, LoraSpec(rank=2, alpha=4.0, experts=tuple(names), modules=("q_proj",)), seed=1)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    return adapted


def batch_of(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "labels": rows}


def clipped(engine: Engine, rows: Tensor, size: int, batches: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sums and norms of some records in so many physical batches; those without a record are filled up."""
    norms = []
    for number in range(batches):
        own = rows[number * size : (number + 1) * size]
        filled = own if len(own) else torch.full((1, TOKENS), 3)
        norms.append(engine.accumulate(batch_of(filled), counted=len(own)).norms[: len(own)])
    return engine.take(), torch.cat(norms)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def norms_and_sums(ranks: Ranks, family: str, options: Mapping[str, Any]) -> dict[str, float]:
    """How far norms and sums are from one process's with the whole model: the largest relative differences.

    Options: ``clipping``, ``method``, ``lora``, ``checkpointing``, ``records_of`` (by rank; default: in turn).
    """
    chosen = {"clipping": "flat", "method": "book_keeping", "clip_norm": 0.7} | dict(options)
    rows = texts()
    shares = chosen.get("records_of") or [list(range(rank, RECORDS, ranks.world)) for rank in range(ranks.world)]

    def engine_of(model: nn.Module) -> Engine:
        made = Engine(model, clipping=policy(chosen["clipping"], chosen["clip_norm"]), method=chosen["method"])
        made.compared = True
        return made

    def model() -> nn.Module:
        return built(family, bool(chosen.get("lora")), bool(chosen.get("checkpointing")))

    whole, part = model(), model()
    spread_experts(part, ranks)
    spread = spread_of(part)
    assert spread is not None
    expected, expected_norms = clipped(engine_of(whole), rows, 5, 2)
    own = rows[torch.tensor(shares[ranks.rank], dtype=torch.int64)]
    sums, norms = clipped(engine_of(part), own, 2, max(-(-len(share) // 2) for share in shares))
    worst = 0.0
    for name, value in expected.items():
        cut = spread.cuts.get(name)
        if cut is None:
            ranks.add_up([sums[name]], 0)
            ranks.hand_out([sums[name]], 0)
        else:
            value = cut.part(value, spread.held(cut))
        worst = max(worst, difference(sums[name], value))
    wanted = expected_norms[torch.tensor(shares[ranks.rank], dtype=torch.int64)]
    return {"norms": float((norms / wanted - 1).abs().max()) if len(norms) else 0.0, "sums": worst}


# -- private sessions ------------------------------------------------------------------------------------------------


def sizes(family: str = "olmoe") -> nn.Module:
    """A model of one layer, small enough to be trained for some rounds."""
    model: Any = build_model(
        ModelSpec(
            family=family,
            config={
                "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "vocab_size": 40,
                "max_position_embeddings": 32, "pad_token_id": None,
            },
        ),
        seed=3,
    )  # fmt: skip
    seam.select(model)
    return model


def collated(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    rows = torch.stack([item["input_ids"] for item in items])
    return batch_of(rows) | {"scale": torch.stack([item["scale"] for item in items])}


def scaled_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return default_loss(model, {name: batch[name] for name in ("input_ids", "labels")}) * batch["scale"]


def opened(ranks: Ranks, folder: Path, *, spread: bool = True, lora: bool = False, **options: Any) -> PrivateSession:
    """A session on `words`; the experts of its model are spread over the ranks."""
    model = sizes()
    if lora:
        model = with_adapters(model)
    if spread:
        spread_experts(model, ranks)
    broken = options.pop("broken", None)
    loss = no_loss if options.pop("noise_alone", False) else scaled_loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    chosen: dict[str, Any] = {
        "budget": dp.Budget(*BUDGET), "lot_size": LOT, "rounds": 3, "physical_batch": 3, "clip_norm": 0.5,
        "seed": 7, "self_check": False, "run": "words", "ledger": folder / "ledger", "method": "book_keeping",
    }  # fmt: skip
    return dp.make_private(model, optimizer, words(broken=broken), collated, loss, ranks=ranks, **chosen | options)


def no_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return scaled_loss(model, batch) * 0.0


def whole_values(ranks: Ranks, model: nn.Module, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """By name, with the parts of all ranks put together, at every rank."""
    spread = spread_of(model)
    found = {}
    for name, own in tensors.items():
        assert own is not None
        cut = None if spread is None else spread.cuts.get(name)
        if cut is None:
            found[name] = own.detach().clone()
            continue
        whole = torch.full(cut.shape(), torch.nan)
        for rank in range(ranks.world):
            held = cut.held(rank, ranks.world)
            part = own.detach().clone().contiguous() if rank == ranks.rank else torch.empty(cut.shape(held))
            ranks.hand_out([part], rank)
            cut.put(part, held, whole, range(cut.experts))
        found[name] = whole
    return found


def flat(ranks: Ranks, model: nn.Module) -> list[float]:
    """All weights of a model, wherever they lie."""
    whole = whole_values(ranks, model, dict(model.named_parameters()))
    return torch.cat([value.reshape(-1) for value in whole.values()]).tolist()


def train(ranks: Ranks, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """A whole run; weights after every round, figures of its lots, and what every rank has of the trunk."""
    chosen = dict(options)
    FAULTS.get(chosen.pop("fault", ""), lambda ranks: None)(ranks)
    weights, figures = [], []
    with opened(ranks, folder, **chosen) as session:
        for lot in session:
            session.step(lot)
            weights.append(flat(ranks, session.model))
            assert session.last is not None
            figures.append((session.last.drawn, session.last.loss, session.last.clipped, session.last.masked))
        counted = len(session.ledger.releases(session.run)) if ranks.rank == 0 else None
        held = sum(p.numel() for p in session.model.parameters())
    return {"weights": weights, "figures": figures, "counted": counted, "held": held}


def noise_alone(ranks: Ranks, folder: Path, options: Mapping[str, Any]) -> list[float]:
    """The gradients that one round leaves where all records' are zero."""
    with opened(ranks, folder, noise_alone=True, **options) as session:
        session.put_gradients()
        gradients = {name: p.grad for name, p in session.model.named_parameters() if p.requires_grad}
        whole = whole_values(ranks, session.model, gradients)
    return torch.cat([whole[name].reshape(-1) for name in sorted(whole)]).tolist()


FAULTS: dict[str, Callable[[Ranks], None]] = {}
