"""Small federations for tests, and the same training written out by hand as the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.config import FederationConfig
from coterie.models import seam
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.training.data.packing import RoundOrder, Sequences, pack
from coterie.training.experts.exchange import ExpertsExchange
from coterie.training.party.inputs import PartyInputs, Weights, trunk_tensors
from coterie.training.party.run import PartyRun
from coterie.training.tokens.exchange import TokensExchange

PARTIES = ("alder", "birch", "cedar")


def settings(**changes: object) -> FederationConfig:
    """A federation.yaml of three parties; nested settings by ``train__rounds=3``."""
    values: dict = {
        "name": "grove",
        "model": {"family": "olmoe"},
        "parties": {name: {"endpoint": f"127.0.0.1:{7000 + i}"} for i, name in enumerate(PARTIES)},
        "coordinator": {"endpoint": "127.0.0.1:7999"},
        "exchange": "tokens",
        # A large eps: with a tiny one Adam hides a wrong divisor.
        "optim": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "schedule": "constant"},
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
) -> dict[str, PartyInputs]:
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
        parts[name] = PartyInputs(
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


class _Masked:
    """Local experts, some of which add nothing."""

    def __init__(self, experts: Mapping[int, list[int]]) -> None:
        self._experts, self._local = experts, seam.LocalExperts()

    def __call__(self, call: seam.ExpertsCall) -> Tensor:
        ids = call.expert_ids_NK.clone()
        for expert in self._experts.get(call.layer.index, []):
            ids[ids == expert] = call.layer.num_experts
        return self._local(replace(call, expert_ids_NK=ids))


class ByHand:
    """The whole federation in one loop, with torch's own AdamW; changes ``models`` (experts of the first party's)."""

    def __init__(
        self, config: FederationConfig, models: Mapping[str, nn.Module], parts: Mapping[str, PartyInputs]
    ) -> None:
        self._spec, self._models, self._parts = config.train, models, parts
        optim = config.optim
        adam = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
        first = next(iter(models))
        self._experts = {
            (layer.index, name): param
            for layer in expert_layers(models[first])
            for name, param in layer.parameters().items()
        }
        self._trunks, self._steps = {}, {}
        for name, model in models.items():
            own = {id(p) for layer in expert_layers(model) for p in layer.parameters().values()}
            self._trunks[name] = [p for p in model.parameters() if id(p) not in own]
            self._steps[name] = torch.optim.AdamW(self._trunks[name], **adam)
            model.train()
            for layer in expert_layers(model):
                for key in layer.layout.parameter_names:
                    setattr(layer.module, key, self._experts[layer.index, key])
        self._steps[""] = torch.optim.AdamW(self._experts.values(), **adam)

    def train(
        self, rounds: Iterable[int], active: tuple[str, ...] = PARTIES, masked: Mapping[int, list[int]] | None = None
    ) -> None:
        """Some rounds, from 1, with some parties; masked experts get no token and do not step."""
        for name in active:
            seam.select(self._models[name], _Masked(masked or {}))
        for round_no in rounds:
            counts = dict.fromkeys(active, 0)
            for step in self._steps.values():
                step.zero_grad()
            for param in self._experts.values():
                param.grad = torch.zeros_like(param)
            for name in active:
                train = self._parts[name].train
                for row in RoundOrder(len(train), self._spec.batch_size, self._spec.seed).rows(round_no):
                    ids = train[row]["input_ids"].unsqueeze(0)
                    logits = self._models[name](input_ids=ids, use_cache=False).logits[0, :-1]
                    functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
                    counts[name] += ids.shape[1] - 1
                for param in self._trunks[name]:
                    param.grad = (param.grad if param.grad is not None else torch.zeros_like(param)) / counts[name]
            for param in self._experts.values():
                assert param.grad is not None
                param.grad /= sum(counts.values())
            for name in (*active, ""):
                self._steps[name].step()


def train_by_hand(
    config: FederationConfig, models: Mapping[str, nn.Module], parts: Mapping[str, PartyInputs]
) -> None:
    """All rounds with all parties; see `ByHand`."""
    ByHand(config, models, parts).train(range(1, config.train.rounds + 1), tuple(config.parties))


def tokens_of(run: PartyRun) -> TokensExchange:
    """A party's side of the `tokens` exchange."""
    assert isinstance(run.actor.exchange, TokensExchange)
    return run.actor.exchange


def experts_of(run: PartyRun) -> ExpertsExchange:
    """A party's side of the `experts` exchange."""
    assert isinstance(run.actor.exchange, ExpertsExchange)
    return run.actor.exchange


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))
