"""The closed forms against arithmetic by hand, against what a run held, and against what crossed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coterie.config import FederationConfig
from coterie.models.seam import expert_layers
from coterie.training.party.in_process import run_in_process
from coterie.training.planning.closed_form import Shape, predict, saving
from coterie.training.planning.plan import make_plan
from helpers.federations import PARTIES, experts_of, full_models, make_parts, settings

OLMOE = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
FOUR = ("alder", "birch", "cedar", "dogwood")


def olmoe(**changes: object) -> FederationConfig:
    values: dict[str, object] = {
        "name": "olmoe",
        "model": {"family": "olmoe", "config": OLMOE, "dtype": "bfloat16"},
        "parties": {name: {"endpoint": f"127.0.0.1:{7000 + i}"} for i, name in enumerate(FOUR)},
        "coordinator": {"endpoint": "127.0.0.1:7999"},
        "train": {"rounds": 1, "batch_size": 8},
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "lot_size": 8},
    }
    return FederationConfig.model_validate(values | changes)


def test_olmoe_is_what_its_paper_says_and_costs_what_arithmetic_says():
    plan = make_plan(olmoe())
    experts = 16 * 64 * 3 * 2048 * 1024
    assert plan.experts == experts
    assert plan.trunk + plan.experts == pytest.approx(6.92e9, rel=1e-3)
    assert plan.expert_share == pytest.approx(0.931, abs=1e-3)
    alder = next(each for each in plan.parties if each.party == "alder" and each.exchange == "experts")
    assert (alder.down, alder.up) == (2 * experts * 3 // 4, 4 * experts * 3 // 4)
    # 8 experts on 4 hosts: 2.7 of the 3 others are chosen; vectors of 2048 bfloat16, 4 ways, 16 layers: 0.71 MB.
    assert plan.bytes_per_token == pytest.approx(0.708e6, rel=2e-3)
    assert plan.break_even_tokens == pytest.approx((alder.down + alder.up) / plan.bytes_per_token, abs=1)
    layer, trunk = experts // 16, plan.trunk
    assert alder.need.device == 2 * trunk + 2 * 2 * layer + 4 * layer * 2 // 3


def test_a_preconditioner_takes_room_beside_every_trunk():
    budget = {"epsilon": 8.0, "delta": 1e-5, "lot_size": 8}
    factors = {"path": "anywhere.safetensors", "provenance": "public"}
    plain, with_factors = make_plan(olmoe()), make_plan(olmoe(privacy={**budget, "preconditioner": factors}))
    # By layer: q, k, v and o of 2048 by 2048, both ends of the experts; then the table (a number a row) and the head,
    # whose 50304 rows are too many for a matrix. The router is no plain linear layer.
    layer = 4 * 2 * 2048**2 + 2 * 2048**2
    more = 2 * (16 * layer + 2 * (50304 + 2048**2))
    assert with_factors.factor_bytes == more
    assert with_factors.centralised_bytes == plain.centralised_bytes + more
    for one, other in zip(with_factors.parties, plain.parties, strict=True):
        if one.exchange == "experts":
            assert (one.need.device, one.need.host) == (other.need.device + more, other.need.host)


def test_with_float32_everywhere_on_the_device_tokens_saves_what_the_paper_counts():
    """PC-MoE keeps hosted experts with their optimiser on the device: f (1 - 1/n)."""
    shape = Shape(trunk=7, experts=93, layers=1, parties=4)
    on_device = 16 * (shape.trunk + shape.experts / 4)
    assert 1 - on_device / predict("centralised", shape).device == pytest.approx(0.93 * 0.75)
    assert saving("tokens", shape) > 0.93 * 0.75, "ours has the optimiser of hosted experts beside the device"


def test_more_activations_shrink_the_saving():
    shape = Shape(trunk=7_000, experts=93_000, layers=16, parties=4, matrix=4_000)
    assert saving("experts", shape) > saving("experts", shape, activations=100_000) > 0


def test_a_shared_trunk_moves_and_a_bfloat16_push_halves_what_goes_up():
    private, shared = make_plan(olmoe()).parties[-1], make_plan(olmoe(trunk="shared")).parties[-1]
    assert private.down is not None
    assert shared.down is not None
    assert shared.down - private.down == pytest.approx(2 * make_plan(olmoe()).trunk * 3 / 4, abs=2)
    assert shared.need.host < private.need.host + make_plan(olmoe()).trunk * 12
    narrow = make_plan(olmoe(push_dtype="bfloat16")).parties[-1]
    assert narrow.up is not None
    assert private.up == 2 * narrow.up


def test_a_budget_is_not_warned_of_pushes_without_one():
    (first, *_) = make_plan(olmoe(privacy="none")).warnings["experts"]
    assert "`privacy: none`" in first
    assert make_plan(olmoe(privacy={"epsilon": 8, "delta": 1e-6, "lot_size": 64})).warnings["experts"] == []


def test_unequal_hosts_get_unequal_plans():
    table = {layer: dict.fromkeys(range(64), "alder") for layer in range(16)}
    table[0] = {expert: "birch" if expert < 32 else "alder" for expert in range(64)}
    found = {each.party: each for each in make_plan(olmoe(placement=table)).parties if each.exchange == "experts"}
    assert found["birch"].hosted == 32 * 3 * 2048 * 1024
    assert found["cedar"].hosted == 0
    assert found["alder"].down == 2 * found["birch"].hosted
    assert found["alder"].need.host > found["cedar"].need.host


def test_planned_bytes_are_those_of_a_real_round_and_the_device_holds_what_was_planned(tmp_path: Path):
    config = settings(exchange="experts", privacy="none", train__rounds=3, train__eval_every=0)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    model = models[PARTIES[0]]
    whole = config.model_copy(update={"model": config.model.model_copy(update={"config": vars_of(model)})})
    plan = {each.party: each for each in make_plan(whole).parties if each.exchange == "experts"}
    layer = sum(p.numel() for p in expert_layers(model)[0].parameters().values())
    for name in PARTIES:
        exchange = experts_of(federation.runs[name])
        assert exchange.owner.streamer.peak_bytes == 2 * torch.bfloat16.itemsize * layer
    received = sum(peer["tensors_received"] for result in results.values() for peer in result.wire.values())
    # Three rounds, and once more the weights for the evaluation at the end.
    assert received == sum(4 * (plan[name].down or 0) + 3 * (plan[name].up or 0) for name in PARTIES)


def vars_of(model: torch.nn.Module) -> dict[str, object]:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "num_experts", "num_experts_per_tok",
    )  # fmt: skip
    return {name: getattr(model.config, name) for name in names}  # type: ignore[union-attr]


def test_memory_beside_the_device_grows_with_parties_and_push_format():
    shape = Shape(trunk=7_000, experts=93_000, layers=16, parties=4, matrix=4_000)
    assert predict("experts", replace(shape, push_bytes=2)).host < predict("experts", shape).host
    assert predict("experts", replace(shape, wire_bytes=4)).device > predict("experts", shape).device
