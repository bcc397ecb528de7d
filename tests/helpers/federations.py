"""Small federations for tests, and the same training written out by hand as the reference."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from coterie.config import FederationConfig
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.training.data.packing import Sequences, pack
from coterie.training.experts.exchange import ExpertsExchange
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import PartyInputs, Weights, trunk_tensors
from coterie.training.party.run import PartyRun
from coterie.training.tokens.exchange import TokensExchange
from helpers.comparing import relative

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


def experts_settings(**changes: object):  # type: ignore[no-untyped-def]
    plain = {"exchange": "experts", "privacy": "none", "weights_dtype": "float32"}
    return settings(**{**plain, **changes})


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


def full_models(parties: tuple[str, ...] = PARTIES, family: str = "olmoe", **sizes: object) -> dict[str, nn.Module]:
    """One whole model per party: trunks differ, experts are the same."""
    models = {name: tiny_model(family, seed=i, **sizes) for i, name in enumerate(parties)}
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


def tokens_of(run: PartyRun) -> TokensExchange:
    """A party's side of the `tokens` exchange."""
    assert isinstance(run.actor.exchange, TokensExchange)
    return run.actor.exchange


def experts_of(run: PartyRun) -> ExpertsExchange:
    """A party's side of the `experts` exchange."""
    assert isinstance(run.actor.exchange, ExpertsExchange)
    return run.actor.exchange


def assert_same(
    federation: InProcessFederation,
    models: nn.Module | Mapping[str, nn.Module],
    tolerance: float = 1e-5,
    *,
    parties: Sequence[str] = PARTIES,
    also: Mapping[str, Tensor] | None = None,
) -> None:
    """Trunks and hosted weights of a federation against whole models, one for all or one for each party.

    Args:
        federation: at its end.
        models: as they should be; experts are those of the first party's.
        tolerance: of `relative`.
        parties: whose weights are compared.
        also: what hosts store besides, by name.
    """
    each = models if isinstance(models, Mapping) else dict.fromkeys(PARTIES, models)
    layers = expert_layers(each[PARTIES[0]])
    for name in parties:
        actor = federation.runs[name].actor
        whole = {**dict(each[name].named_parameters()), **(also or {})}
        if actor.inputs.federation.trunk == "private":
            for key, value in trunk_tensors(actor.inputs.model).items():
                if key in whole:
                    assert relative(value, whole[key]) < tolerance, (name, key)
        if isinstance(actor.exchange, ExpertsExchange):
            for key, value in actor.exchange.host.trunk.weights().items():
                assert relative(value, whole[key]) < tolerance, (name, key)
        for key, value in actor.exchange.hosted_state().items():
            if key.startswith("layer.") and "/" not in key:
                _, layer, _, expert, parameter = key.split(".")
                expected = layers[int(layer)].parameters()[parameter][int(expert)]
                assert relative(value, expected) < tolerance, (name, key)
