"""Groups and replaced contributions, against brute force over the densities and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.accounting.groups import LARGEST_GROUP, Share, _general, group_epsilon, joint_epsilon
from coterie.dp.accounting.lots import LotPlan


def test_group_privacy_grows_with_the_group() -> None:
    spent = [(Mechanism(3.0, 0.01), 500)]
    one = epsilon(spent, 1e-5)
    assert group_epsilon(spent, 1e-5, 1) == one
    two, four = group_epsilon(spent, 1e-5, 2), group_epsilon(spent, 1e-5, 4)
    assert 1.9 * one < two < four < math.inf
    assert four < _general(spent, 1e-5, 4)
    assert group_epsilon([], 1e-5, 4) == 0
    assert group_epsilon([(Mechanism(0.0, 0.1), 1)], 1e-5, 2) == math.inf


def test_group_of_k_without_sampling_is_one_unit_with_k_times_the_sensitivity() -> None:
    assert group_epsilon([(Mechanism(4.0, 1.0), 10)], 1e-5, 4) == pytest.approx(
        epsilon([(Mechanism(1.0, 1.0), 10)], 1e-5), rel=5e-3
    )


def test_group_privacy_of_truncated_sampling_uses_the_general_bound() -> None:
    spent = [(LotPlan.of(1000, 20, "truncated_poisson", 60).mechanism(3.0), 50)]
    assert 2 * epsilon(spent, 1e-5) < group_epsilon(spent, 1e-5, 2) < math.inf
    assert group_epsilon([(LotPlan.of(100, 50, "truncated_poisson", 70).mechanism(0.3), 500)], 1e-5, 64) == math.inf


def replaced_delta(x: float, mechanism: Mechanism, size: int) -> float:
    """One round in which ``size`` contributions of +1 become -1: integrated over the densities."""
    sigma, rate = mechanism.noise_multiplier, mechanism.sampling_rate
    z = np.linspace(-size - 14 * sigma, size + 14 * sigma, 200_001)
    weights = binom.pmf(np.arange(size + 1), size, rate)
    before, after = (
        sum(weight * norm.pdf(z, sign * k, sigma) for k, weight in enumerate(weights)) for sign in (1, -1)
    )
    return float(np.trapezoid(np.maximum(before - math.exp(x) * after, 0), z))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(("sigma", "rate"), [(0.6, 0.1), (1.0, 0.02), (2.0, 0.5), (5.0, 0.3)])
def test_a_replaced_contribution_never_costs_more_than_is_counted(sigma: float, rate: float, size: int) -> None:
    mechanism = Mechanism(sigma, rate)
    for delta in (1e-2, 1e-4, 1e-6):
        ours = joint_epsilon([Share(mechanism, 1, size, replaced=True)], delta)
        assert replaced_delta(ours, mechanism, size) <= delta * 1.001


def test_replacing_on_every_round_is_a_gaussian_of_twice_the_sensitivity() -> None:
    replaced = joint_epsilon([Share(Mechanism(4.0, 1.0), 10, 2, replaced=True)], 1e-5)
    assert replaced == pytest.approx(epsilon([(Mechanism(1.0, 1.0), 10)], 1e-5), rel=5e-3)


def test_replacing_counts_as_a_group_of_two_at_least() -> None:
    for mechanism, rounds in ((Mechanism(0.7, 0.05), 50), (Mechanism(4.0, 0.05), 50), (Mechanism(1.0, 0.5), 2)):
        shares = [Share(mechanism, rounds, 1, replaced=True)]
        assert group_epsilon([(mechanism, rounds)], 1e-5, 2) <= joint_epsilon(shares, 1e-5) < math.inf


def test_shares_of_several_kinds_add_up_and_no_share_is_forgotten() -> None:
    plain = Share(Mechanism(3.0, 0.05), 40)
    group, replaced = Share(Mechanism(3.0, 0.05), 40, 3), Share(Mechanism(3.0, 0.05), 40, 1, replaced=True)
    all_of_them = joint_epsilon([plain, group, replaced], 1e-5)
    for pair in ([plain, group], [plain, replaced], [group, replaced]):
        assert joint_epsilon(pair, 1e-5) < all_of_them
    nothing = Share(Mechanism(0.0, 1.0), 0, math.inf)
    assert joint_epsilon([plain, nothing], 1e-5) == epsilon([(plain.mechanism, 40)], 1e-5)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("delta", [1e-9, 1e-12])
def test_groups_at_a_tiny_delta_stay_above_the_gaussian_that_they_are(delta: float, replaced: bool) -> None:
    size, sigma, rounds = 3, 9.0, 9
    ours = joint_epsilon([Share(Mechanism(sigma, 1.0), rounds, size, replaced)], delta)
    move = size * (2 if replaced else 1) * math.sqrt(rounds) / sigma
    exact = norm.cdf(move / 2 - ours / move) - math.exp(ours) * norm.cdf(-move / 2 - ours / move)
    assert exact <= delta
    assert ours < math.inf


def test_what_cannot_be_bounded_is_unbounded() -> None:
    mechanism = Mechanism(1.0, 0.1)
    assert joint_epsilon([Share(mechanism, 1, math.inf)], 1e-5) == math.inf
    assert joint_epsilon([Share(mechanism, 1, LARGEST_GROUP + 1)], 1e-5) == math.inf
    assert joint_epsilon([Share(Mechanism(0.0, 0.1), 1, 1, replaced=True)], 1e-5) == math.inf
    assert joint_epsilon([Share(Mechanism(0.01, 0.1), 1, 1, replaced=True)], 1e-5) == math.inf


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.5, 0.12, 0.079, 0.06, 0.042])
def test_replaced_contributions_under_little_noise_have_a_bound_or_none_and_never_a_smaller_one(
    sigma: float, rate: float
) -> None:
    mechanism = Mechanism(sigma, rate)
    assert joint_epsilon([Share(mechanism, 3, 1, True)], 1e-5) >= epsilon([(mechanism, 3)], 1e-5)
