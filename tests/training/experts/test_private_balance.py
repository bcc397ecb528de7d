"""Balance in a private federation: loads travel inside of each release, everybody computes with one public value."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from coterie.config import FederationConfig
from coterie.dp.accounting.lots import LotPlan, Units, draw_lot
from coterie.dp.noise.discrete_gaussian import add_noise
from coterie.dp.noise.joint_noise import LOAD, RoundNoise
from coterie.dp.noise.randomness import random_source
from coterie.models import seam
from coterie.models.seam import expert_layers
from coterie.training.party.in_process import run_in_process
from coterie.training.party.inputs import PartyInputs
from coterie.training.party.run import PartyResult
from helpers.comparing import relative
from helpers.federations import PARTIES, assert_same, full_models, make_parts
from helpers.private_federation import PrivateWorld
from helpers.private_federation import already_compared as already_compared
from helpers.private_federation import watched as watched
from helpers.private_settings import (
    CLIP,
    COEFFICIENT,
    LOT,
    SHARE,
    SMOOTHING,
    balanced_settings,
    exchange_of,
    with_privacy,
)
from helpers.recorded import recorded_of
from helpers.waiting import until

pytestmark = pytest.mark.usefixtures("already_compared")


class Routed:
    """One process that trains as the federation should, with balance written out by hand from router outputs."""

    def __init__(self, model: nn.Module, mode: str) -> None:
        self.model, self.mode = model, mode
        self.layers = expert_layers(model)
        self.sizes = [layer.num_experts for layer in self.layers]
        self.load = torch.cat([torch.full((size,), 1 / size) for size in self.sizes]).double()
        self.even = self.load.clone()
        self.rounds = 0

    @contextmanager
    def seen(self) -> Iterator[list[Tensor]]:
        """Expert ids [T, K] of each layer of a forward."""
        found: list[Tensor] = []
        handles = [
            layer.module.register_forward_pre_hook(
                lambda module, args, kwargs: found.append([*args, *kwargs.values()][1]), with_kwargs=True
            )
            for layer in self.layers
        ]
        yield found
        for handle in handles:
            handle.remove()

    def record(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One record's clipped gradient, and its centred loads."""
        self.model.zero_grad()
        options = {} if self.mode == "bias" else {"output_router_logits": True}
        with self.seen() as chosen:
            out = self.model(input_ids=ids[None], use_cache=False, **options)
        loss = functional.cross_entropy(out.logits[0, :-1], ids[1:])
        if self.mode == "private_load":
            loads = self.load.split(self.sizes)
            terms = [
                size * (logits.softmax(-1).mean(0) * load.float()).sum()
                for size, logits, load in zip(self.sizes, out.router_logits, loads, strict=True)
            ]
            loss = loss + COEFFICIENT * torch.stack(terms).mean()
        loss.backward()
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in own.items()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))
        shares = [
            torch.bincount(each.flatten(), minlength=size).double() / each.numel()
            for each, size in zip(chosen, self.sizes, strict=True)
        ]
        return {n: g.clone() * min(1.0, CLIP / norm) for n, g in found.items()}, torch.cat(shares) - self.even

    def released(self, mean: Tensor) -> None:
        self.rounds += 1
        fresh = self.even + mean.double()
        keep = min(SMOOTHING, 1 - 1 / self.rounds)
        self.load = fresh if self.rounds == 1 else keep * self.load + (1 - keep) * fresh
        if self.mode == "bias":
            for layer, load, even in zip(
                self.layers, self.load.split(self.sizes), self.even.split(self.sizes), strict=True
            ):
                self.bias(layer).add_(COEFFICIENT * torch.sign(even - load).float())

    def bias(self, layer: seam.ExpertLayer) -> Tensor:
        gate = self.model.get_submodule(layer.name.rpartition(".")[0]).gate
        found = gate.e_score_correction_bias
        assert isinstance(found, Tensor)
        return found.data

    def train(self, config: FederationConfig, parts: Mapping[str, PartyInputs], sigma: float) -> None:
        optim = config.optim
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        step = torch.optim.AdamW(
            own.values(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        seam.select(self.model)
        self.model.train()
        bound = math.sqrt(sum(1 - 1 / size for size in self.sizes))
        # (C / s)^2 of gradients and loads together are 1 / sigma^2, of which loads take SHARE^2.
        stds = {name: sigma * CLIP / math.sqrt(1 - SHARE**2) for name in own} | {LOAD: sigma * bound / SHARE}
        for round_no in range(1, config.train.rounds + 1):
            total = {name: torch.zeros_like(p) for name, p in own.items()}
            total[LOAD] = torch.zeros(sum(self.sizes))
            for each in parts.values():
                assert each.privacy is not None
                source, count = random_source(each.privacy.seed), len(each.train)
                lot = draw_lot(round_no, LotPlan.of(count, LOT), Units.of_records(count), source, 0)
                for row in lot.records.tolist():
                    gradient, load = self.record(each.train[row]["input_ids"])
                    for name, value in gradient.items():
                        total[name] += value
                    total[LOAD] += load.float()
                nothing = {name: torch.zeros_like(value) for name, value in total.items()}
                for name, noise in add_noise(nothing, stds, source, f"noise|{round_no}|0").items():
                    total[name] += noise
            for name, param in own.items():
                param.grad = total[name] / (LOT * len(parts))
            step.step()
            self.released(total[LOAD] / (LOT * len(parts)))


def run(mode: str, config: FederationConfig, folder: Path, sigma: float | None):  # type: ignore[no-untyped-def]
    one = full_models(family="deepseek_v3" if mode == "bias" else "olmoe")[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, folder)
    parts = with_privacy(parts, folder, sigma=sigma)
    federation, _ = run_in_process(config, list(parts.values()), folder / "coordinator")
    return federation, parts, one


@pytest.mark.parametrize(("mode", "sigma"), [("private_load", 1e-7), ("private_load", 0.8), ("bias", 0.8)])
def test_federation_equals_centralised_training_with_the_same_loads_and_noise(tmp_path: Path, mode, sigma):
    """As without balance: with noise the tolerance covers its calibration (a factor below 1.0002)."""
    config = balanced_settings(mode, train__rounds=12 if sigma < 0.1 else 4)
    federation, parts, model = run(mode, config, tmp_path, sigma)
    whole = Routed(model, mode)
    whole.train(config, parts, sigma)
    load = torch.cat([whole.bias(layer) for layer in whole.layers]) if mode == "bias" else whole.load.float()
    assert [name for name in PARTIES if LOAD in exchange_of(federation, name).host.trunk.weights()], (
        "somebody is its home"
    )
    assert float((whole.load - whole.even).abs().max()) > 0.01, "loads that stay even would show nothing"
    assert_same(federation, model, 1e-5 if sigma < 0.1 else 2e-4, also={LOAD: load})


def test_without_the_loads_the_result_is_another_one(tmp_path: Path):
    """The comparison above could not pass by ignoring balance."""
    config = balanced_settings("private_load", train__rounds=4)
    federation, parts, model = run("private_load", config, tmp_path, 1e-7)
    whole = Routed(model, "private_load")
    whole.released = lambda mean: None  # type: ignore[method-assign]
    whole.train(config, parts, 1e-7)
    own = dict(model.named_parameters())
    gate = "model.layers.0.mlp.gate.weight"
    (served,) = [
        home[gate] for name in PARTIES if gate in (home := exchange_of(federation, name).host.trunk.weights())
    ]
    assert relative(served, own[gate]) > 1e-4


def test_invariant_9_gradients_and_loads_of_a_party_are_one_gaussian_of_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The noise that is really added, against the noise multiplier that the party's ledger counts with."""
    released: list[tuple[dict[str, float], set[str]]] = []
    cut = RoundNoise.cut

    def seen(self, sums, *more, **options):  # type: ignore[no-untyped-def]
        released.append(({name: self.std[self.part_of(name)] for name in sums}, set(sums)))
        return cut(self, sums, *more, **options)

    monkeypatch.setattr(RoundNoise, "cut", seen)
    config = balanced_settings("private_load", train__rounds=2)
    federation, _, model = run("private_load", config, tmp_path, None)
    sigmas = set()
    for name in PARTIES:
        end = federation.ends[name]
        assert isinstance(end, PartyResult)
        assert end.privacy is not None
        assert end.privacy["revealed"] == "noised sums of clipped gradients and of expert loads"
        assert end.privacy["rounds"] == 2
        sigmas.add(end.privacy["noise_multiplier"])
    assert len(released) == 2 * len(PARTIES), "one release a round"
    bound = math.sqrt(sum(1 - 1 / layer.num_experts for layer in expert_layers(model)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for stds, names in released:
        assert names == trained | {LOAD}, "every parameter and the loads get noise every round"
        (gradients,) = {std for name, std in stds.items() if name != LOAD}
        spent = (CLIP / gradients) ** 2 + (bound / stds[LOAD]) ** 2
        closest = min(sigmas, key=lambda sigma: abs(1 / sigma**2 - spent))
        assert spent <= 1 / closest**2
        assert spent == pytest.approx(1 / closest**2, rel=1e-2)
        assert (bound / stds[LOAD]) ** 2 / spent == pytest.approx(SHARE**2, rel=1e-2)


def test_home_of_the_loads_goes_back_with_its_checkpoint_and_the_same_bytes_are_sent_again(tmp_path: Path, watched):
    """A load that differed on the second way would change the pins of every round after it, and burn them."""
    rules = balanced_settings("private_load").privacy
    world = watched(PrivateWorld(tmp_path, rounds=8, privacy=rules))
    world.start()
    until(lambda: world.at(round_no=8))
    (home,) = [name for name in PARTIES if LOAD in exchange_of(world.federation, name).host.trunk.weights()]
    world.go_back(checkpoints=1, name=home)
    world.federation.up(world.parts()[home])
    world.finished()
    assert not world.uncounted
    for name in PARTIES:
        assert world.releases(name) == [(round_no, 0) for round_no in range(1, 9)]
    assert any(len(digests) > 1 for digests in world.announced.values())
    assert all(len(set(digests)) == 1 for digests in world.announced.values())


def test_what_leaves_an_owner_has_the_same_sizes_whatever_its_loads_are(tmp_path: Path):
    config = balanced_settings("private_load", train__rounds=2)
    seen = []
    for seed in (10, 500):
        folder = tmp_path / str(seed)
        parts = with_privacy(make_parts(config, full_models(), folder, data_seed=seed), folder, sigma=None)
        seen.append(recorded_of(config, folder, parts))
    assert seen[0] == seen[1]


def test_a_party_without_privacy_cannot_stand_beside_released_loads():
    with pytest.raises(ValidationError, match="needs every party to release its expert loads"):
        balanced_settings("private_load", mixed_privacy=True)
