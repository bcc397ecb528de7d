"""The `experts` exchange with privacy, against clipping one record at a time in one process."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from coterie.config import FederationConfig
from coterie.dp import open_run
from coterie.dp.accounting.lots import Lot, LotPlan, Units, draw_lot
from coterie.dp.noise.discrete_gaussian import add_noise
from coterie.dp.noise.randomness import random_source
from coterie.models import seam
from coterie.training.party.in_process import InProcessFederation, run_in_process
from coterie.training.party.inputs import PartyInputs
from coterie.training.party.run import PartyResult
from helpers.federations import PARTIES, assert_same, full_models, make_parts
from helpers.private_federation import already_compared as already_compared
from helpers.private_settings import CLIP, LOT, clipped_gradient, exchange_of, private_settings, with_privacy
from helpers.recorded import recorded_of

compared_elsewhere = pytest.mark.usefixtures("already_compared")
"""On tests that do not look at what the comparison leads to; the others here go through it."""


def centralised(config: FederationConfig, model: nn.Module, parts: Mapping[str, PartyInputs], sigma: float) -> None:
    """One process: the three parties' seeded lots, records clipped one at a time, the parties' noises added up."""
    optim = config.optim
    step = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    seam.select(model)
    model.train()
    for round_no in range(1, config.train.rounds + 1):
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for each in parts.values():
            assert each.privacy is not None
            source = random_source(each.privacy.seed)
            count = len(each.train)
            lot = draw_lot(round_no, LotPlan.of(count, LOT), Units.of_records(count), source, 0)
            for row in lot.records.tolist():
                for name, gradient in clipped_gradient(model, each.train[row]["input_ids"]).items():
                    total[name] += gradient
            nothing = {name: torch.zeros_like(p) for name, p in total.items()}
            for name, noise in add_noise(nothing, sigma * CLIP, source, f"noise|{round_no}|0").items():
                total[name] += noise
        for name, param in model.named_parameters():
            param.grad = total[name] / (LOT * len(parts))
        step.step()


def run(
    config: FederationConfig, folder: Path, *, sigma: float | None, **options: object
) -> tuple[InProcessFederation, dict[str, PartyInputs], nn.Module]:
    one = full_models()[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, folder)
    parts = with_privacy(parts, folder, sigma=sigma, **options)  # type: ignore[arg-type]
    federation, _ = run_in_process(config, list(parts.values()), folder / "coordinator")
    return federation, parts, one


@compared_elsewhere
@pytest.mark.parametrize(("sigma", "tolerance"), [(1e-7, 1e-5), (0.8, 1e-4)])
def test_three_private_parties_equal_centralised_clipped_sgd_with_the_same_summed_noise(
    tmp_path: Path, sigma: float, tolerance: float
):
    """The tolerance with noise covers its calibration, which pays for rounding of the sum (a factor below 1.0002)."""
    config = private_settings(train__rounds=20 if sigma < 0.1 else 4, optim__eps=1e-3)
    federation, parts, model = run(config, tmp_path, sigma=sigma)
    centralised(config, model, parts, sigma)
    assert_same(federation, model, tolerance)


def ledgers_in(root: Path) -> list[Path]:
    """The folders of the datasets; the root also holds the key of their texts' hashes."""
    return [path for path in root.iterdir() if path.is_dir()]


def test_each_party_spends_by_its_own_ledger_what_the_accountant_says(tmp_path: Path):
    config = private_settings()
    _, parts, _ = run(config, tmp_path, sigma=None)
    for name in PARTIES:
        (ledger,) = ledgers_in(tmp_path / f"ledger-{name}")
        text = (ledger / "ledger.jsonl").read_text()
        assert text.count('"kind":"release"') == config.train.rounds
        count = len(parts[name].train)
        assert f'"units":{count}' in text


@compared_elsewhere
def test_a_party_whose_budget_is_spent_stops_contributing_and_the_others_go_on(tmp_path: Path):
    config = private_settings(train__rounds=4)
    one = full_models()[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path)
    parts = with_privacy(parts, tmp_path, sigma=1e-7)
    alder = parts["alder"].privacy
    assert alder is not None
    parts["alder"] = replace(parts["alder"], privacy=replace(alder, rounds=2))
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert all(result.finished and result.rounds == 4 for result in results.values())
    (ledger,) = ledgers_in(tmp_path / "ledger-alder")
    assert (ledger / "ledger.jsonl").read_text().count('"kind":"release"') == 2
    assert contributor_rounds(federation) == {"alder": 2, "birch": 4, "cedar": 4}


def contributor_rounds(federation: InProcessFederation) -> dict[str, int]:
    """The newest round of which some other host has each party's sums."""
    return {
        name: max(exchange_of(federation, host).host.received[name] for host in PARTIES if host != name)
        for name in PARTIES
    }


def test_an_unnoised_private_trunk_cannot_be_configured(tmp_path: Path):
    """With `trunk: private` the trunk's own step comes from the same noised release as everything that is pushed."""
    config = private_settings(trunk="private", train__rounds=2)
    models = full_models()
    parts = with_privacy(make_parts(config, models, tmp_path), tmp_path, sigma=None)
    federation, _ = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    for name in PARTIES:
        actor = federation.runs[name].actor
        trained = {key for key, p in actor.inputs.model.named_parameters() if p.requires_grad and not p.is_meta}
        (ledger,) = ledgers_in(tmp_path / f"ledger-{name}")
        assert trained
        for file in (ledger / "spool").rglob("release-*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert trained <= set(opened.keys())
                for key in trained:
                    assert opened.get_tensor(key).abs().sum() > 0, "every trunk parameter gets noise"


@compared_elsewhere
def test_a_party_that_starts_again_after_the_end_still_says_what_it_revealed(tmp_path: Path):
    config = private_settings(train__rounds=2)
    one = full_models()[PARTIES[0]]

    def again() -> InProcessFederation:
        parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path)
        parts = with_privacy(parts, tmp_path, sigma=None, seeded=False)
        return run_in_process(config, list(parts.values()), tmp_path / "coordinator")[0]

    first, second = again().ends, again().ends
    for name in PARTIES:
        before, after = first[name], second[name]
        assert isinstance(before, PartyResult)
        assert isinstance(after, PartyResult)
        assert before.privacy is not None
        assert before.privacy["rounds"] == 2
        assert before.privacy["isolation"] == "exact"  # what holds where others serve the weights
        assert after.privacy == before.privacy
        assert after.statement == before.statement


@compared_elsewhere
def test_what_leaves_an_owner_has_the_same_sizes_and_order_whatever_the_size_of_its_lot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An empty lot, one of one record, and a large one."""
    seen = []
    for size in (0, 1, 9):
        lot = np.arange(size)
        monkeypatch.setattr(open_run, "draw_lot", lambda round_no, *rest, lot=lot: Lot(round_no, lot, lot))
        config = private_settings(train__rounds=2)
        parts = make_parts(config, full_models(), tmp_path / str(size))
        seen.append(recorded_of(config, tmp_path / str(size), with_privacy(parts, tmp_path / str(size), sigma=None)))
    assert seen[0] == seen[1] == seen[2]
    assert sum(kind == "push-chunk" for events in seen[0].values() for _, kind, *_ in events) > 0
