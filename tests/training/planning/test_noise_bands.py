"""Which number of bands leaves the least noise in the weights, from public numbers alone."""

from __future__ import annotations

import numpy as np
import pytest

from coterie.dp.accounting.budget import Budget
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.plan import PrivacyPlan
from coterie.training.planning import noise_bands
from coterie.training.planning.noise_bands import advice, bands_choices

UNITS, ROUNDS, LOT = 5000, 60, 256


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_bands, "BANDS", (1, 8))


@pytest.mark.parametrize(("epsilon", "low", "high"), [(8.0, 0.68, 0.77), (1.0, 1.15, 1.3)])
def test_bands_pay_at_a_large_budget_and_cost_at_a_small_one(epsilon: float, low: float, high: float) -> None:
    """The noise in the weights once more, from the matrices written out."""
    plan = PrivacyPlan(Budget(epsilon, 1e-5), ROUNDS, LOT)
    alone, banded = bands_choices(plan, UNITS, 0.0)
    assert (alone.bands, alone.weights_noise, alone.step_noise) == (1, 1.0, alone.noise_multiplier)
    of = NoiseBands.of(8, ROUNDS)
    assert of is not None
    c = sum(value * np.eye(ROUNDS, k=-k) for k, value in enumerate(of.coefficients))
    sums = np.tril(np.ones((ROUNDS, ROUNDS)))
    ratio = np.linalg.norm(sums @ np.linalg.inv(c)) / np.linalg.norm(sums)
    expected = ratio * banded.noise_multiplier / alone.noise_multiplier
    assert banded.weights_noise == pytest.approx(expected, rel=1e-9)
    assert low < banded.weights_noise < high
    assert ("noise_bands: 8" in advice([alone, banded])) is (epsilon == 8.0)


def test_what_excludes_bands_is_not_offered_them() -> None:
    budget = Budget(8.0, 1e-5)
    assert not bands_choices(PrivacyPlan(budget, ROUNDS, LOT, sampler="truncated_poisson", max_lot=400), UNITS, 0.0)
    assert not bands_choices(PrivacyPlan(budget, ROUNDS, LOT, adaptive_quantile=0.5), UNITS, 0.0)
    assert not bands_choices(PrivacyPlan(budget, 7, LOT), UNITS, 0.0), "a run shorter than its bands"
    assert not bands_choices(PrivacyPlan(budget, ROUNDS, LOT), 8 * LOT - 1, 0.0), "a block smaller than its lot"
