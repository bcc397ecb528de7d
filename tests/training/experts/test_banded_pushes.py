"""Noise in bands in a federation: each party has bands of its own, and its pushes hold what is learnt from."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.dp.accounting.lots import LotPlan, Units, draw_lot
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.noise.discrete_gaussian import add_noise
from coterie.dp.noise.randomness import random_source
from coterie.models import seam
from coterie.training.party.agreed_limits import largest_noise, noised_limits
from coterie.training.party.in_process import run_in_process
from helpers.federations import PARTIES, assert_same, full_models, make_parts
from helpers.private_federation import already_compared as already_compared
from helpers.private_settings import CLIP, LOT, clipped_gradient, private_settings, with_privacy

BANDS, ROUNDS, SIGMA = 3, 4, 0.8
RULES = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": CLIP, "lot_size": LOT, "noise_bands": BANDS}
OPTIM = {"kind": "sgd", "lr": 0.1, "momentum": 0.5, "schedule": "constant"}


@pytest.mark.slow
@pytest.mark.usefixtures("already_compared")
def test_parties_in_bands_equal_one_process_that_adds_the_inverse_times_fresh_noise(tmp_path: Path) -> None:
    config = private_settings(privacy=RULES, optim=OPTIM, train__rounds=ROUNDS)
    model = full_models()[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(model) for name in PARTIES}, tmp_path)
    parts = with_privacy(parts, tmp_path, sigma=SIGMA)  # without word of momentum: coefficients for none
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert all(result.finished for result in results.values())
    of = NoiseBands.of(BANDS, ROUNDS)
    assert of is not None
    inverse = np.linalg.inv(sum(value * np.eye(ROUNDS, k=-k) for k, value in enumerate(of.coefficients)))
    step = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    seam.select(model)
    model.train()
    fresh: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in parts}
    for turn in range(ROUNDS):
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for party, each in parts.items():
            assert each.privacy is not None
            source, count = random_source(each.privacy.seed), len(each.train)
            lot = draw_lot(turn + 1, LotPlan.of(count, LOT, bands=BANDS), Units.of_records(count), source, 0, turn)
            for row in lot.records.tolist():
                for name, gradient in clipped_gradient(model, each.train[row]["input_ids"]).items():
                    total[name] += gradient
            zeros = {name: torch.zeros_like(value) for name, value in total.items()}
            fresh[party].append(add_noise(zeros, SIGMA * CLIP, source, f"noise|{turn + 1}|0"))
            for before, noise in enumerate(fresh[party]):
                for name, value in noise.items():
                    total[name] += float(inverse[turn, before]) * value
        for name, param in model.named_parameters():
            param.grad = total[name] / (LOT * len(parts))
        step.step()
    assert_same(federation, model, 3e-4)


def test_hosts_take_the_larger_noise_of_single_pushes_in_bands() -> None:
    model = full_models()[PARTIES[0]]
    banded = private_settings(privacy=RULES, optim=OPTIM, train__rounds=50)
    plain = private_settings(privacy={**RULES, "noise_bands": 1}, optim=OPTIM, train__rounds=50)
    limits = [noised_limits(each, each.privacy, model)("w") for each in (banded, plain)]  # type: ignore[arg-type]
    of = NoiseBands.of(BANDS, 50, 0.5)
    assert of is not None
    more = 1.05 * CLIP * 16 * largest_noise(plain) * (of.step_noise(50) - 1)
    assert limits[0] - limits[1] == pytest.approx(more)
    assert more > 0
