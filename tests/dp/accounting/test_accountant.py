"""Epsilon and noise against published values and against each other."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from dp_accounting import pld
from scipy.stats import norm

from coterie.dp.accounting.accountant import (
    Mechanism,
    check_joint,
    epsilon,
    joint_multiplier,
    joint_noise,
    noise_multiplier,
)
from coterie.dp.accounting.budget import Budget, PrivacyWarning, Spent
from coterie.dp.accounting.kept import kept
from coterie.dp.accounting.lots import LotPlan
from coterie.errors import BudgetError, PrivacyError

N = 67_349
RATE, ROUNDS = 1024 / N, round(20 * N / 1024)
BUDGET = Budget(8.0, 1 / N)


def test_invariant_9_published_noise_of_sst2_by_pld_and_rdp() -> None:
    assert noise_multiplier(BUDGET, RATE, ROUNDS) == pytest.approx(0.688, abs=5e-4)
    assert noise_multiplier(BUDGET, RATE, ROUNDS, accountant="rdp") == pytest.approx(0.720, abs=1e-3)


def test_calibration_and_its_inverse_agree_and_never_exceed_the_budget() -> None:
    for budget, rate, rounds in ((BUDGET, RATE, ROUNDS), (Budget(0.3, 1e-6), 0.01, 500), (Budget(2, 1e-5), 0.25, 30)):
        sigma = noise_multiplier(budget, rate, rounds)
        assert epsilon([(Mechanism(sigma, rate), rounds)], budget.delta) <= budget.epsilon
        assert epsilon([(Mechanism(sigma * 0.999, rate), rounds)], budget.delta) > budget.epsilon


def test_full_batch_gaussian_matches_the_analytic_formula() -> None:
    """Balle and Wang 2018, theorem 8: one Gaussian without sampling."""
    sigma = 1.3

    def analytic_delta(eps: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return phi(0.5 / sigma - eps * sigma) - math.exp(eps) * phi(-0.5 / sigma - eps * sigma)

    eps = epsilon([(Mechanism(sigma, 1.0), 1)], 1e-5)
    assert analytic_delta(eps) == pytest.approx(1e-5, rel=0.02)


def test_invariant_9_truncated_poisson_has_its_own_event_and_no_rdp() -> None:
    plan = LotPlan.of(1000, 100, "truncated_poisson", 110)
    poisson, truncated = LotPlan.of(1000, 100).mechanism(1.0), plan.mechanism(1.0)
    assert epsilon([(truncated, 50)], 1e-5) > epsilon([(poisson, 50)], 1e-5)
    with pytest.raises(PrivacyError, match="truncated Poisson sampling cannot be accounted by RDP"):
        epsilon([(truncated, 50)], 1e-5, "rdp")
    generous = LotPlan.of(1000, 100, "truncated_poisson", 200).mechanism(1.0)
    assert epsilon([(generous, 50)], 1e-5) == pytest.approx(epsilon([(poisson, 50)], 1e-5), rel=1e-3)


def test_invariant_9_agrees_with_dp_accounting_s_own_accountant() -> None:
    plans = [LotPlan.of(1000, 100).mechanism(1.0), LotPlan.of(1000, 100, "truncated_poisson", 120).mechanism(1.3)]
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    for mechanism, count in zip(plans, (40, 30), strict=True):
        accountant.compose(mechanism.event(), count)
    assert epsilon(list(zip(plans, (40, 30), strict=True)), 1e-5) == pytest.approx(
        accountant.get_epsilon(1e-5), rel=1e-9
    )


def test_several_mechanisms_compose_and_order_does_not_matter() -> None:
    a, b = Mechanism(1.0, 0.02), Mechanism(2.0, 0.1)
    both = epsilon([(a, 100), (b, 10)], 1e-5)
    assert both == epsilon([(b, 4), (a, 100), (b, 6)], 1e-5)
    assert max(epsilon([(a, 100)], 1e-5), epsilon([(b, 10)], 1e-5)) < both
    assert both < epsilon([(a, 100)], 1e-5) + epsilon([(b, 10)], 1e-5)
    assert epsilon([], 1e-5) == epsilon([(a, 0)], 1e-5) == 0
    assert epsilon([(a, 3), (Mechanism(0.0, 0.1), 1)], 1e-5) == math.inf


def test_invariant_9_parts_of_a_round_are_one_gaussian() -> None:
    norms = {"layer 0": 1.0, "layer 1": 0.3, "load": 0.1}
    stds = joint_noise(0.9, norms, {"layer 0": 5, "layer 1": 3, "load": 1})
    parts = {name: (norms[name], stds[name]) for name in norms}
    assert joint_multiplier(parts) == pytest.approx(0.9)
    check_joint(0.9, parts)
    assert joint_multiplier({"one": (1.0, 0.9)}) == pytest.approx(0.9)
    equal = joint_noise(1.0, {"a": 2.0, "b": 2.0})
    assert equal["a"] == equal["b"] == pytest.approx(2 * math.sqrt(2))
    assert joint_multiplier({"a": (1.0, 1.0), "b": (1.0, 0.0)}) == 0
    assert joint_multiplier({"a": (0.0, 0.0)}) == math.inf
    with pytest.raises(PrivacyError, match="have noise multiplier"):
        check_joint(0.9, {**parts, "another": (0.5, 0.45)})
    with pytest.raises(PrivacyError, match="one positive share each"):
        joint_noise(1.0, norms, {"layer 0": 1.0})


def test_joint_noise_is_the_noise_of_the_concatenated_vector() -> None:
    """Scaling every part to unit noise gives one vector; its sensitivity is what PLD sees."""
    stds = joint_noise(1.1, {"g": 1.0, "f": 0.2}, {"g": 9, "f": 1})
    sensitivity = math.hypot(1.0 / stds["g"], 0.2 / stds["f"])
    assert 1 / sensitivity == pytest.approx(1.1)


@pytest.mark.parametrize("value", [0.0, -1.0, 1001.0, 1e6, math.inf, math.nan])
def test_epsilon_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(BudgetError, match="`epsilon` is"):
        Budget(value, 1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(BudgetError, match="`delta` is"):
        Budget(1.0, value)


@pytest.mark.slow
def test_unreachable_epsilon_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"epsilon 1e-06 at delta 1e-12 cannot be reached in 1000 rounds"):
        noise_multiplier(Budget(1e-6, 1e-12), 0.5, 1000)


def test_delta_of_one_over_n_is_warned_about() -> None:
    with pytest.warns(PrivacyWarning, match="not below 1/N"):
        Budget(1.0, 1e-3).warn_for(1000)
    assert str(Spent(1.23456, 1e-5)) == "epsilon 1.235 at delta 1e-05"


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Balle and Wang 2018: the exact delta of one Gaussian with sensitivity 1, also far out in its tail."""
    first, second = norm.logcdf(0.5 / sigma - epsilon * sigma), epsilon + norm.logcdf(-0.5 / sigma - epsilon * sigma)
    return math.exp(first) * -math.expm1(second - first)


@pytest.mark.parametrize("delta", [1e-9, 1e-10, 9e-11, 1e-13, 1e-16, 1e-30, 1e-100])
@pytest.mark.parametrize(("sigma", "rounds"), [(1.0, 1), (12.0, 100), (0.6, 3)])
def test_epsilon_is_an_upper_bound_at_every_delta(delta: float, sigma: float, rounds: int) -> None:
    ours = epsilon([(Mechanism(sigma, 1.0), rounds)], delta)
    whole = sigma / math.sqrt(rounds)  # rounds on all records are one Gaussian
    assert gaussian_delta(ours, whole) <= delta * (1 + 1e-6)
    assert gaussian_delta(ours * 0.93, whole) > delta, "the bound is far from tight"


@pytest.mark.parametrize(("target", "delta"), [(8.0, 1e-16), (0.01, 1e-12), (1000.0, 1e-14), (2.0, 1e-40)])
def test_noise_for_a_tiny_delta_is_what_its_epsilon_needs(target: float, delta: float) -> None:
    sigma = noise_multiplier(Budget(target, delta), 1.0, 10)
    assert gaussian_delta(target, sigma / math.sqrt(10)) <= delta
    assert gaussian_delta(target, 0.9 * sigma / math.sqrt(10)) > delta


def test_truncated_sampling_is_refused_below_the_floor_and_unbounded_there() -> None:
    mechanism = LotPlan.of(1000, 20, "truncated_poisson", 60).mechanism(3.0)
    with pytest.raises(BudgetError, match="truncated Poisson sampling can be accounted down to 1e-10") as caught:
        noise_multiplier(Budget(8.0, 1e-11), 0.02, 50, "truncated_poisson", 1000, 60)
    assert caught.value.code == "dp-delta"
    assert epsilon([(mechanism, 50)], 1e-11) == math.inf
    assert epsilon([(mechanism, 50)], 1e-9) < math.inf


def test_a_million_rounds_on_all_units_are_the_one_gaussian_that_they_are() -> None:
    sigma = noise_multiplier(Budget(8.0, 1e-5), 1.0, 1_000_000)
    assert gaussian_delta(8.0, sigma / 1000) <= 1e-5 < gaussian_delta(8.0, sigma / 1000 * (1 - 1e-3))


def test_many_sampled_rounds_cost_no_more_than_renyi_says() -> None:
    many = [(Mechanism(2.0, 0.001), 150_000)]
    fewer = [(Mechanism(2.0, 0.001), 100_000)]
    assert epsilon(fewer, 1e-5) < epsilon(many, 1e-5) <= epsilon(many, 1e-5, "rdp")
    assert epsilon(many, 1e-5) > 1.2 * epsilon(fewer, 1e-5)  # about the square root of 1.5


def test_noise_of_a_huge_epsilon_is_within_it_and_close() -> None:
    sigma = noise_multiplier(Budget(1000.0, 1e-5), 1.0, 3)
    assert gaussian_delta(1000.0, sigma / math.sqrt(3)) <= 1e-5
    assert gaussian_delta(1000.0, sigma / math.sqrt(3) * 0.99) > 1e-5


def test_threads_that_ask_for_the_same_at_once_let_one_of_them_compute_it() -> None:
    computed: list[int] = []
    together = threading.Barrier(3)

    @kept(4)
    def figure(number: int) -> int:
        computed.append(number)
        time.sleep(0.05)
        return 2 * number

    def asked(_: int) -> int:
        together.wait()
        return figure(7)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(asked, range(3))) == [14, 14, 14]
    assert computed == [7]
