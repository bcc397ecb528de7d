"""Privacy loss distributions against dp-accounting's own constructors, which invert each loss by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as distribution

from coterie.dp.accounting.loss_distributions import gaussian, mixture

DELTAS = (1e-2, 1e-5, 1e-9)


def assert_same_losses(
    ours: distribution.PrivacyLossDistribution, theirs: distribution.PrivacyLossDistribution, rounds: int
) -> None:
    orders = np.array([-2.0, -0.3, 0.0, 0.3, 1.0, 4.0])
    assert ours.get_delta_for_epsilon(orders) == pytest.approx(theirs.get_delta_for_epsilon(orders), rel=1e-10)
    composed, expected = (each.self_compose(rounds) for each in (ours, theirs))
    for delta in DELTAS:
        epsilon = expected.get_epsilon_for_delta(delta)
        assert composed.get_epsilon_for_delta(delta) == pytest.approx(epsilon, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("noise_multiplier", [0.45, 1.0, 20.0])
@pytest.mark.parametrize("rate", [1e-3, 0.094, 0.5, 0.999, 1.0])
def test_a_gaussian_on_a_sample(noise_multiplier: float, rate: float) -> None:
    theirs = distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=rate, value_discretization_interval=1e-2
    )
    assert_same_losses(gaussian(noise_multiplier, rate, 1e-2), theirs, 3)


def test_a_loss_right_at_the_end_of_what_sampling_leaves() -> None:
    """A point of the grid is a last bit below -log(1 - q), and its inverse the logarithm of less than nothing."""
    rate = 0.7848984515501918
    interval = math.nextafter(-math.log1p(-rate), 0.0) / 8
    theirs = distribution.from_gaussian_mechanism(1.0, sampling_prob=rate, value_discretization_interval=interval)
    assert_same_losses(gaussian(1.0, rate, interval), theirs, 1)


@pytest.mark.parametrize(("noise_multiplier", "rate", "size"), [(0.6, 0.02, 2), (1.0, 0.2, 4), (3.0, 1.0, 2)])
def test_a_mean_that_moves_by_chance(noise_multiplier: float, rate: float, size: int) -> None:
    moves = [float(k) for k in range(size + 1)]
    joining = [math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(size + 1)]
    theirs = distribution.from_mixture_gaussian_mechanism(
        noise_multiplier, moves, joining, value_discretization_interval=1e-2
    )
    assert_same_losses(mixture(noise_multiplier, moves, joining, 1e-2), theirs, 3)
