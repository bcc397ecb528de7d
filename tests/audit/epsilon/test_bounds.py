"""One-run bounds, against published formulas, another implementation and each other."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from coterie.audit.epsilon import bounds

# jax-privacy 2.0.0 from PyPI (with jax 0.10.2): `CanaryScoreAuditor.epsilon_one_run` and `epsilon_one_run_fdp` with
# an explicit threshold, which leaves the given numbers of canaries, guesses and right guesses.
OTHERS = [
    (200, 200, 190, 1e-5, 0.05, 2.397025625948457, 4.997088533656113),
    (100, 40, 36, 1e-5, 0.05, 1.2976556223807538, 2.5061806715357666),
    (1000, 500, 330, 1e-6, 0.001, 0.36993695510020635, 0.5711387962663468),
    (2000, 2000, 1999, 1e-5, 0.05 / 12, 5.378995631761197, 8.930859114974012),
    (500, 100, 100, 1e-3, 0.01, 0.0, 3.5004946352424473),
    (50, 50, 40, 1e-5, 0.05, 0.7738005292397897, 1.8180850997555715),
]


@pytest.mark.parametrize(("canaries", "guesses", "right", "delta", "error", "by_claim", "by_gaussian"), OTHERS)
def test_bounds_are_those_of_another_implementation(
    canaries: int, guesses: int, right: int, delta: float, error: float, by_claim: float, by_gaussian: float
) -> None:
    assert bounds.epsilon_lower(canaries, guesses, right, delta, error) == pytest.approx(by_claim, rel=1e-4)
    mu = bounds.mu_lower(canaries, guesses, right, error)
    assert bounds.epsilon_of(mu, delta) == pytest.approx(by_gaussian, rel=1e-4)


@pytest.mark.parametrize(("guesses", "right", "epsilon", "delta"), [(40, 31, 0.7, 1e-4), (100, 100, 3.0, 1e-5)])
def test_the_chance_of_right_guesses_is_the_papers_sum(
    guesses: int, right: int, epsilon: float, delta: float
) -> None:
    # Steinke, Nasr, Jagielski 2023, theorem 5.2, summed in 50 digits.
    with mpmath.workdps(50):
        share = mpmath.e**epsilon / (1 + mpmath.e**epsilon)
        mass = [mpmath.binomial(guesses, k) * share**k * (1 - share) ** (guesses - k) for k in range(guesses + 1)]
        tail = mpmath.fsum(mass[right:])
        near = max(mpmath.fsum(mass[max(0, right - i) : right]) / i for i in range(1, guesses + 1))
        expected = float(tail + 2 * 150 * mpmath.mpf(delta) * near)
    assert bounds.chance(150, guesses, right, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("canaries", "by_claim", "by_gaussian"), [(100, 2.9, 5.4), (200, 3.6, 6.4), (500, 4.5, 7.8), (1000, 5.1, 8.8)]
)
def test_few_canaries_cannot_contradict_large_claims(canaries: int, by_claim: float, by_gaussian: float) -> None:
    most = bounds.ceilings(canaries, 1e-5, 0.05)
    assert most.epsilon == pytest.approx(by_claim, abs=0.06)
    assert most.gaussian(1e-5) == pytest.approx(by_gaussian, abs=0.06)


def test_a_gaussian_of_one_canary_is_its_own_law() -> None:
    # One coin, one guess: the chance of a right guess is at most Phi(mu / 2).
    for mu in (0.5, 1.0, 2.0):
        chance = 0.5 * (1 + math.erf(mu / 2 / math.sqrt(2)))
        assert bounds.mu_lower(1, 1, 1, chance * 1.001) == pytest.approx(mu, abs=0.02)
        assert bounds.mu_lower(1, 1, 1, chance * 0.999) <= mu


def test_guessing_by_the_coins_reaches_the_ceiling() -> None:
    inside = torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.5
    inside[:100], inside[100:] = True, False
    assert bounds.bounds(inside.double(), inside, 1e-5, 0.05) == bounds.ceilings(200, 1e-5, 0.05)


def test_guesses_that_know_nothing_prove_nothing_more_often_than_allowed() -> None:
    generator = torch.Generator().manual_seed(3)
    wrong = 0
    for _ in range(100):
        inside = torch.rand(60, generator=generator) < 0.5
        found = bounds.bounds(torch.rand(60, generator=generator), inside, 1e-5, 0.05)
        wrong += found.mu > 0 or found.epsilon > 0
    assert wrong <= 11  # 5 expected at most; more than 11 once in 200 times


def test_a_tight_gaussian_attack_stays_below_its_own_mu() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        inside = torch.rand(200, generator=generator) < 0.5
        scores = inside.double() + torch.randn(200, generator=generator, dtype=torch.float64) / 0.8
        assert bounds.bounds(scores, inside, 1e-5, 0.001).mu < 0.8


def test_scores_upside_down_prove_nothing() -> None:
    inside = torch.arange(100) % 2 == 0
    assert bounds.bounds(-inside.double(), inside, 1e-5, 0.05).mu == 0.0


def test_canaries_that_are_all_in_are_guessed_right_by_half_and_prove_nothing() -> None:
    found = bounds.bounds(torch.arange(60.0), torch.ones(60, dtype=torch.bool), 1e-5, 0.05)
    assert (found.epsilon, found.mu) == (0.0, 0.0)
    assert found.right * 2 == found.guesses
