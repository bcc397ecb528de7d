"""The training of a federation written out by hand, as the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.config import FederationConfig
from coterie.models import seam
from coterie.models.seam import expert_layers
from coterie.training.data.packing import RoundOrder
from coterie.training.party.inputs import PartyInputs
from helpers.federations import PARTIES


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


class Union:
    """One process on the union of the parties' sequences, which can go on without one of them."""

    def __init__(self, config: FederationConfig, model: nn.Module, parts: Mapping[str, PartyInputs]) -> None:
        self.config, self.model, self.parts = config, model, parts
        optim = config.optim
        self.step = torch.optim.AdamW(
            model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        model.train()

    def train(
        self,
        rounds: range,
        active: tuple[str, ...] = PARTIES,
        frozen: frozenset[str] = frozenset(),
        masked: Mapping[int, list[int]] | None = None,
    ) -> None:
        """Parameters in ``frozen`` stand still; torch's AdamW leaves out what has no gradient."""
        seam.select(self.model, _Masked(masked or {}))
        for round_no in rounds:
            for param in self.model.parameters():
                param.grad = torch.zeros_like(param)
            count = 0
            for name in active:
                train, spec = self.parts[name].train, self.config.train
                for row in RoundOrder(len(train), spec.batch_size, spec.seed).rows(round_no):
                    ids = train[row]["input_ids"].unsqueeze(0)
                    logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
                    functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
                    count += ids.shape[1] - 1
            for name, param in self.model.named_parameters():
                param.grad = None if name in frozen else param.grad / count
            self.step.step()


def train_by_hand(
    config: FederationConfig, models: Mapping[str, nn.Module], parts: Mapping[str, PartyInputs]
) -> None:
    """All rounds with all parties; see `ByHand`."""
    ByHand(config, models, parts).train(range(1, config.train.rounds + 1), tuple(config.parties))
