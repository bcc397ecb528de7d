"""Constant work, bfloat16 on the wire, parties with and without privacy, and what is refused at set-up."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import coterie.dp.open_run as open_run
from coterie.cli.privacy_lines import opening_lines, stopped_contributing
from coterie.config import PartyConfig, PartyPrivacy
from coterie.dp.accounting.lots import Lot
from coterie.dp.balance import Balance, Balancer
from coterie.dp.clipping import Flat
from coterie.dp.isolation.exact_engine import ExactEngine
from coterie.dp.losses import default_loss
from coterie.dp.per_sample.engine import Engine
from coterie.errors import ConfigError, CoterieError, NoRuleError, PrivacyError
from coterie.federation.experts.owner import SumSender
from coterie.models import seam
from coterie.models.seam import expert_layers
from coterie.models.zoo.tiny import tiny_model
from coterie.training.data.packing import RoundOrder
from coterie.training.experts.constant_work import ConstantWork
from coterie.training.experts.owner import ExpertsOwner
from coterie.training.experts.private_sums import PrivateSums
from coterie.training.experts.sum_bytes import stochastic_bfloat16
from coterie.training.party.in_process import run_in_process
from helpers.comparing import relative
from helpers.federations import PARTIES, experts_of, experts_settings, full_models, make_parts, settings, text
from helpers.private_settings import private_settings, with_privacy

# ---- constant work ----


def constant_settings(**changes: object):  # type: ignore[no-untyped-def]
    rules = {
        "epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.7, "lot_size": 3, "sampler": "truncated_poisson", "max_lot": 5,
    }  # fmt: skip
    return private_settings(
        **{"privacy": rules, "push_after_s": 1.0, "train__rounds": 3, "optim__eps": 1e-3, **changes}
    )


@pytest.mark.parametrize(("isolation", "batches", "rows"), [("fast", 3, 2), ("exact", 5, 1)])
def test_work_and_its_shapes_are_the_same_for_an_empty_and_a_full_lot_and_sums_leave_no_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolation: str, batches: int, rows: int
):
    sizes = {1: 0, 2: 1, 3: 5}
    monkeypatch.setattr(
        open_run, "draw_lot",
        lambda round_no, *rest: Lot(round_no, np.arange(sizes[round_no]), np.arange(sizes[round_no])),
    )  # fmt: skip
    shapes: dict[int, list[tuple]] = {}
    waited: list[float] = []
    current = [0]
    kind = ExactEngine if isolation == "exact" else Engine
    accumulate, compute, declare = kind.accumulate, ExpertsOwner.compute, SumSender.declare
    began: dict[int, float] = {}

    def seen(self, batch, **rest):  # type: ignore[no-untyped-def]
        shapes.setdefault(current[0], []).append(tuple(tuple(batch[name].shape) for name in sorted(batch)))
        return accumulate(self, batch, **rest)

    def starts(self, state, cancel, own):  # type: ignore[no-untyped-def]
        current[0] = state.round
        began[id(self.sender)] = time.monotonic()
        return compute(self, state, cancel, own)

    def leaves(self, attempt, **rest):  # type: ignore[no-untyped-def]
        waited.append(time.monotonic() - began[id(self)])
        declare(self, attempt, **rest)

    monkeypatch.setattr(kind, "accumulate", seen)
    monkeypatch.setattr(ExpertsOwner, "compute", starts)
    monkeypatch.setattr(SumSender, "declare", leaves)
    config = constant_settings(privacy__isolation=isolation)
    one = full_models()[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path)
    parts = with_privacy(parts, tmp_path, sigma=1e-7)
    for name, each in parts.items():
        assert each.privacy is not None
        parts[name] = replace(each, privacy=replace(each.privacy, push_after_s=1.0, sequence_length=12))
    federation, _ = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    # As many batches as hold five records; three parties.
    assert {round_no: len(found) for round_no, found in shapes.items()} == dict.fromkeys((1, 2, 3), 3 * batches)
    assert {shape for found in shapes.values() for shape in found} == {((rows, 12),) * 3}
    assert len(waited) == 9
    assert min(waited) >= 1.0
    assert_clipped_sums(config, one, parts, federation, sizes)


def assert_clipped_sums(config, model, parts, federation, sizes) -> None:  # type: ignore[no-untyped-def]
    """The rows that were added changed nothing: the result is that of clipping the real records one at a time."""
    from helpers.private_settings import clipped_gradient

    optim = config.optim
    step = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    seam.select(model)
    model.train()
    for size in sizes.values():
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for each in parts.values():
            for row in range(size):
                for name, gradient in clipped_gradient(model, each.train[row]["input_ids"]).items():
                    total[name] += gradient
        for name, param in model.named_parameters():
            param.grad = total[name] / (3 * len(parts))
        step.step()
    whole = dict(model.named_parameters())
    for name in PARTIES:
        exchange = experts_of(federation.runs[name])
        for key, value in exchange.host.trunk.weights().items():
            assert relative(value, whole[key]) < 1e-4, key


@pytest.mark.parametrize("method", ["book_keeping", "ghost"])
def test_rows_that_fill_up_a_batch_bring_no_balance_term(method):
    """How many there are depends on the lot: a gradient of theirs would be one that nobody clips to one record."""
    records = text(3)
    pair = records.collate([records[0], records[1]])
    longest = pair["input_ids"].shape[1] + 3
    sums = []
    for constant in (False, True):
        model = tiny_model("olmoe", num_hidden_layers=1)
        balancer = Balancer(Balance("per_sequence", coefficient=1.0), model, default_loss)
        engine = Engine(model, balancer, Flat(0.7), method)
        if constant:
            steady = ConstantWork(5, longest, 7, records.pad_id, torch.device("cpu"))
            figures = engine.accumulate(steady.fill(pair), counted=2).first(2)
        else:
            figures = engine.accumulate(pair)
        assert figures.losses.shape == (2,)
        sums.append(engine.take())
    for name, value in sums[0].items():
        assert relative(sums[1][name], value) < 1e-4, name


def test_constant_work_is_refused_where_units_are_users(tmp_path: Path):
    config = constant_settings()
    parts = with_privacy(make_parts(config, full_models(), tmp_path), tmp_path, sigma=1e-7)["alder"]
    assert parts.privacy is not None
    records = parts.train.with_users(["u"] * (int(parts.train.document_S.max()) + 1))
    layers = expert_layers(parts.model)
    with pytest.raises(ConfigError, match="unit: record"):
        PrivateSums(parts.model, layers, records, replace(parts.privacy, push_after_s=1.0), lambda: "run")


# ---- bfloat16 ----


def test_stochastic_rounding_is_unbiased_and_never_leaves_the_two_neighbours():
    values = torch.tensor([1.0 + 1 / 1024, -3.3, 1e-30, -7.7e20, 0.0, 2.0])
    coins = torch.Generator().manual_seed(0)
    rounded = torch.stack([stochastic_bfloat16(values, coins).float() for _ in range(20_000)])
    spread = torch.finfo(torch.bfloat16).eps * values.abs()
    assert bool(((rounded - values).abs() <= spread).all())
    # A coin's standard deviation is at most half of the spread; five of them over sqrt(20000).
    assert bool(((rounded.mean(0) - values).abs() <= 5 * 0.5 * spread / 20_000**0.5 + 1e-45).all())
    assert torch.equal(rounded[:, 4:].unique(), torch.tensor([0.0, 2.0])), "what bfloat16 holds exactly stays"


def test_stochastic_rounding_never_makes_a_finite_value_infinite():
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([largest, -largest, torch.finfo(torch.bfloat16).max] * 1000)
    rounded = stochastic_bfloat16(values, torch.Generator().manual_seed(0))
    assert bool(rounded.isfinite().all())


def test_bfloat16_both_ways_stays_close_to_float32(tmp_path: Path):
    """And hosts keep float32: an update far below bfloat16's step is not lost."""
    losses = {}
    for kind in ("float32", "bfloat16"):
        config = experts_settings(trunk="shared", weights_dtype=kind, push_dtype=kind, train__rounds=6)
        one = full_models()[PARTIES[0]]
        parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path / kind)
        federation, results = run_in_process(config, list(parts.values()), tmp_path / kind / "coordinator")
        losses[kind] = [results[name].loss for name in PARTIES]
        exchange = experts_of(federation.runs["alder"])
        held = [value for key, value in exchange.host.shard.state_dict().items() if "/" not in key]
        assert any(not torch.equal(value.to(torch.bfloat16).float(), value) for value in held)
    for exact, rounded in zip(losses["float32"], losses["bfloat16"], strict=True):
        assert exact is not None
        assert rounded == pytest.approx(exact, rel=0.02)


# ---- mixed privacy ----


def test_a_party_without_privacy_counts_records_on_the_same_scale_as_private_ones(tmp_path: Path):
    """alder is private with next to no noise and nothing clipped, the others add mean losses of their records."""
    rules = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1e4, "lot_size": 24}
    config = private_settings(privacy=rules, mixed_privacy=True, train__rounds=3, optim__eps=1e-3)
    one = full_models()[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path)
    parts["alder"] = with_privacy({"alder": parts["alder"]}, tmp_path, sigma=1e-11)["alder"]
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    optim = config.optim
    step = torch.optim.AdamW(
        one.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    seam.select(one)
    one.train()
    for round_no in range(1, config.train.rounds + 1):
        step.zero_grad()
        count = 0
        for name in PARTIES:
            train = parts[name].train
            order = RoundOrder(len(train), config.train.batch_size, config.train.seed)
            rows = list(range(len(train))) if name == "alder" else [int(row) for row in order.rows(round_no)]
            count += len(rows)  # alder's rate is 1: every record is in every lot
            for row in rows:
                ids = train[row]["input_ids"]
                functional.cross_entropy(one(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:]).backward()
        for param in one.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad / count
        step.step()
    whole = dict(one.named_parameters())
    for name in PARTIES:
        exchange = experts_of(federation.runs[name])
        for key, value in exchange.host.trunk.weights().items():
            assert relative(value, whole[key]) < 1e-4, key
    assert results["alder"].privacy is not None
    assert results["birch"].privacy is None


# ---- refused at set-up ----


def private_parts(tmp_path: Path):  # type: ignore[no-untyped-def]
    config = private_settings(max_attempts=1)
    return config, with_privacy(make_parts(config, full_models(), tmp_path), tmp_path, sigma=1e-7)


def test_a_trainable_parameter_outside_the_mechanism_is_refused_by_name(tmp_path: Path):
    _, parts = private_parts(tmp_path)
    alder = parts["alder"]
    layer = expert_layers(alder.model)[0]
    layer.module.register_parameter("extra_scale", torch.nn.Parameter(torch.empty(3, device="meta")))
    assert alder.privacy is not None
    with pytest.raises(PrivacyError, match="extra_scale") as caught:
        PrivateSums(alder.model, expert_layers(alder.model), alder.train, alder.privacy, lambda: "run")
    assert caught.value.code == "dp-outside-mechanism"


class Counting(torch.nn.Module):
    """A norm that keeps count of what it has seen."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.detach().abs().sum()
        return self.inner(x)


def test_a_buffer_that_data_changes_is_refused_before_anything_leaves(tmp_path: Path):
    config, parts = private_parts(tmp_path)
    norm = parts["alder"].model.model.norm
    parts["alder"].model.model.norm = Counting(norm)
    weights = parts["alder"].weights()
    moved = {"model.norm.weight": "model.norm.inner.weight"}
    trunk = {moved.get(name, name): value for name, value in weights.trunk.items()}
    changed = replace(weights, trunk={**trunk, "model.norm.seen": torch.zeros(())})
    parts["alder"] = replace(parts["alder"], weights=lambda: changed)
    config = private_settings(max_attempts=1, trunk="private")
    parts = {name: replace(each, federation=config) for name, each in parts.items()}
    with pytest.raises(CoterieError) as caught:
        run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert caught.value.code == NoRuleError("", code="dp-buffer").code
    assert not list((tmp_path / "ledger-alder").rglob("release-*"))


# ---- what people read ----


def party_config(tmp_path: Path, **privacy: object) -> PartyConfig:
    paths = {name: tmp_path / name for name in ("federation", "kit", "trunk", "shard", "run_dir")}
    data = {"train": [tmp_path / "t.jsonl"], "sequence_length": 8}
    return PartyConfig.model_validate({"party": "alder", "data": data, **paths, **privacy})


def test_without_privacy_up_says_what_others_can_learn(tmp_path: Path):
    first, size, out = opening_lines(party_config(tmp_path), experts_settings())
    assert first.startswith("WARNING")
    for part in ("`privacy: none`", "gives whole records back", "first rounds", "how they change"):
        assert part in first
    # OLMoE-1B-7B: width 2,048, 64 experts, 8 a token; six sequences of up to eight tokens
    assert "about 16,384 tokens" in size
    assert "up to 48: all of it can be read" in size
    assert "budget" in out
    first, held_out = opening_lines(party_config(tmp_path), settings())
    assert first.startswith("WARNING")
    assert "can read this party's text" in first
    assert "held-out text crosses as well" in held_out
    assert len(opening_lines(party_config(tmp_path), settings(evaluate=False))) == 1


def test_up_says_what_is_recorded(tmp_path: Path):
    for config in (settings(transcript={"rounds": 3}), private_settings(transcript={"rounds": 3})):
        *_, line = opening_lines(party_config(tmp_path), config)
        assert "recorded for an audit" in line
        assert "the first 3 rounds" in line


def test_with_privacy_up_says_the_budget_and_where_the_ledger_is(tmp_path: Path):
    config = party_config(tmp_path, privacy=PartyPrivacy(epsilon=2.0, ledger=tmp_path / "books"))
    (line,) = opening_lines(config, private_settings())
    assert "epsilon 2 at delta 0.001 for 4 rounds" in line
    assert str(tmp_path / "books") in line


def test_a_spent_budget_is_said_once_it_matters():
    assert stopped_contributing(None) == ""
    assert stopped_contributing({"contributing": True, "rounds": 3}) == ""
    spent = {"contributing": False, "rounds": 3, "rounds_left": 0}
    assert "goes on hosting" in stopped_contributing(spent)
    assert "2 rounds of this party's budget are left" in stopped_contributing({**spent, "rounds_left": 2})
