"""Small federations for tests, and the same training written out by hand as the reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.config import FederationConfig
from coterie.models import seam
from coterie.models.placement import Placement
from coterie.models.seam import expert_layers
from coterie.models.tiny import VOCAB, tiny_model
from coterie.training.packing import RoundOrder, Sequences, pack
from coterie.training.party_parts import PartyParts, Weights, trunk_tensors

PARTIES = ("alder", "birch", "cedar")


def settings(**changes: object) -> FederationConfig:
    """A federation.yaml of three parties; nested settings by ``train__rounds=3``."""
    values: dict = {
        "name": "grove",
        "model": {"family": "olmoe"},
        "parties": {name: {"endpoint": f"127.0.0.1:{7000 + i}"} for i, name in enumerate(PARTIES)},
        "coordinator": {"endpoint": "127.0.0.1:7999"},
        "exchange": "tokens",
        "optim": {"lr": 1e-2, "weight_decay": 0.1, "schedule": "constant"},
        "train": {"rounds": 4, "batch_size": 6, "micro_batch": 2, "eval_every": 0, "checkpoint_every": 2},
        "deadline_s": 8.0,
        "round_deadline_s": 60.0,
        "join_deadline_s": 30.0,
    }
    for name, value in changes.items():
        block, _, key = name.rpartition("__")
        (values[block] if block else values)[key] = value
    return FederationConfig.model_validate(values)


def text(seed: int, sequences: int = 24, length: int = 12) -> Sequences:
    """Random tokens, sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    documents = [
        torch.randint(
            3, VOCAB, (int(torch.randint(4, length, (1,), generator=generator)),), generator=generator
        ).tolist()
        for _ in range(sequences)
    ]
    return pack(documents, sequence_length=length, packing="chunks", end_id=2)


def full_models(parties: tuple[str, ...] = PARTIES, family: str = "olmoe") -> dict[str, nn.Module]:
    """One whole model per party: trunks differ, experts are the same."""
    models = {name: tiny_model(family, seed=i) for i, name in enumerate(parties)}
    first = models[parties[0]]
    for model in models.values():
        for theirs, ours in zip(expert_layers(model), expert_layers(first), strict=True):
            for name, param in theirs.parameters().items():
                param.data.copy_(ours.parameters()[name])
    return models


def shard_of(model: nn.Module, placement: Placement, party: str) -> dict[str, Tensor]:
    """The experts of one party, by global key."""
    hosted = placement.hosted(party)
    return {
        f"layer.{layer.index}.expert.{expert}.{name}": param.detach()[expert].clone()
        for layer in expert_layers(model)
        for name, param in layer.parameters().items()
        for expert in hosted.get(layer.index, [])
    }


def partial(model: nn.Module) -> nn.Module:
    """The model with its experts on the meta device."""
    model = copy.deepcopy(model)
    for layer in expert_layers(model):
        for name, param in layer.parameters().items():
            setattr(layer.module, name, nn.Parameter(torch.empty_like(param, device="meta")))
    return model


def make_parts(
    config: FederationConfig, models: Mapping[str, nn.Module], folder: Path, data_seed: int = 10
) -> dict[str, PartyParts]:
    """Parts of every party, as if read from split files."""
    parties = tuple(config.parties)
    placement = Placement.of_spec(config.placement, parties, models[parties[0]])
    parts = {}
    for i, name in enumerate(parties):
        empty = partial(models[name])
        weights = Weights(
            {key: value.detach().clone() for key, value in trunk_tensors(empty).items()},
            shard_of(models[name], placement, name),
        )
        run_dir = folder / name
        run_dir.mkdir(parents=True, exist_ok=True)
        parts[name] = PartyParts(
            party=name,
            federation=config,
            model=empty,
            weights=lambda weights=weights: weights,  # type: ignore[misc]
            placement=placement,
            train=text(data_seed + i),
            test=text(data_seed + 100 + i, sequences=7),
            run_dir=run_dir,
            device=torch.device("cpu"),
        )
    return parts


def train_by_hand(
    config: FederationConfig,
    models: Mapping[str, nn.Module],
    parts: Mapping[str, PartyParts],
    rounds: int | None = None,
    active: tuple[str, ...] | None = None,
) -> None:
    """The whole federation in one loop, with torch's own AdamW; changes ``models`` (experts of the first party's)."""
    names = active or tuple(config.parties)
    spec, optim = config.train, config.optim
    adam = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    experts = {id(p): p for layer in expert_layers(models[names[0]]) for p in layer.parameters().values()}
    trunks = {}
    for name in names:
        own = {id(p) for layer in expert_layers(models[name]) for p in layer.parameters().values()}
        trunks[name] = [p for p in models[name].parameters() if id(p) not in own]
        seam.select(models[name])
        models[name].train()
        if name != names[0]:
            for theirs, ours in zip(expert_layers(models[name]), expert_layers(models[names[0]]), strict=True):
                for key in ours.layout.parameter_names:
                    setattr(theirs.module, key, ours.parameters()[key])
    steps = [torch.optim.AdamW(trunk, **adam) for trunk in trunks.values()]
    steps.append(torch.optim.AdamW(experts.values(), **adam))
    for round in range(spec.rounds if rounds is None else rounds):
        counts = {}
        for step in steps:
            step.zero_grad()
        for param in experts.values():
            param.grad = torch.zeros_like(param)
        for name in names:
            rows = RoundOrder(len(parts[name].train), spec.batch_size, spec.seed).rows(round)
            counts[name] = 0
            for row in rows:
                ids = parts[name].train[row]["input_ids"].unsqueeze(0)
                logits = models[name](input_ids=ids, use_cache=False).logits[0, :-1]
                functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
                counts[name] += ids.shape[1] - 1
            for param in trunks[name]:
                param.grad = (param.grad if param.grad is not None else torch.zeros_like(param)) / counts[name]
        for param in experts.values():
            param.grad /= sum(counts.values())
        for step in steps:
            step.step()


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))
