"""What a claim allows, against closed forms and figures of an earlier trial."""

from __future__ import annotations

import math
from itertools import pairwise

import dp_accounting
import pytest
from scipy import stats

from coterie.audit.epsilon.allowed import by_claim, by_mechanism
from coterie.dp.accounting.accountant import Mechanism


def test_no_loss_allows_a_coin_flip() -> None:
    nothing = by_claim(0.0, 0.0)
    assert nothing.auc == pytest.approx(0.5)
    assert nothing.tpr(0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 4.0])
def test_a_pure_claim_allows_the_area_of_randomised_response(epsilon: float) -> None:
    # Its curve bends once, at false positives of 1 / (1 + e^eps).
    bend = 1 / (1 + math.exp(epsilon))
    assert by_claim(epsilon, 0.0).auc == pytest.approx(1 - bend, rel=1e-12)
    assert by_claim(epsilon, 0.0).tpr(bend / 2) == pytest.approx(math.exp(epsilon) * bend / 2)


def test_delta_raises_the_whole_curve() -> None:
    assert by_claim(0.0, 0.2).tpr(0.0) == pytest.approx(0.2)
    assert by_claim(0.0, 0.2).auc == pytest.approx(1 - 0.8**2 / 2)


@pytest.mark.parametrize(("rounds", "noise"), [(1, 2.0), (4, 3.0), (1, 0.7)])
def test_rounds_on_all_records_allow_what_one_gaussian_does(rounds: int, noise: float) -> None:
    mu = math.sqrt(rounds) / noise
    found = by_mechanism([(Mechanism(noise, 1.0), rounds)])
    assert found.auc == pytest.approx(stats.norm.cdf(mu / math.sqrt(2)), abs=3e-4)
    for fpr in (0.001, 0.01, 0.3):
        assert found.tpr(fpr) == pytest.approx(stats.norm.cdf(stats.norm.ppf(fpr) + mu), rel=2e-3)


@pytest.mark.parametrize(("noise", "auc", "tpr"), [(0.7125, 0.741, 0.116), (1.203, 0.634, 0.040)])
def test_sampled_lots_allow_what_was_measured_before_by_other_code(noise: float, auc: float, tpr: float) -> None:
    found = by_mechanism([(Mechanism(noise, 256 / 1583), 10)])
    assert found.auc == pytest.approx(auc, abs=6e-4)
    assert found.tpr(0.01) == pytest.approx(tpr, abs=6e-4)


def test_the_mechanism_allows_less_than_its_one_point_of_the_curve() -> None:
    noise = dp_accounting.get_sigma_gaussian(8.0, 1e-5)
    assert by_mechanism([(Mechanism(noise, 1.0), 1)]).auc < 0.96 < 0.999 < by_claim(8.0, 1e-5).auc


def test_without_noise_everything_is_allowed() -> None:
    found = by_mechanism([(Mechanism(0.0, 0.5), 1)])
    assert (found.auc, found.tpr(0.0)) == (1.0, 1.0)
    assert by_claim(math.inf, 0.0).auc == 1.0


def test_the_curve_rises_and_ends_at_one() -> None:
    curve = by_mechanism([(Mechanism(1.0, 0.2), 5)]).roc()
    assert curve[0][0] == 0.0
    assert curve[-1] == (1.0, 1.0)
    assert all(a[0] < b[0] and a[1] <= b[1] and b[1] >= b[0] for a, b in pairwise(curve))
