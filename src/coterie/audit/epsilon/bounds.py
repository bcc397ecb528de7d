"""What right guesses about canaries prove: lower bounds on epsilon from one run.

Each of m canaries went in by its own fair, secret coin; the auditor then guesses for some of them how it fell. A
private run leaves these guesses little better than the coins, so many right ones contradict a claim.

Two laws of how many can be right. The (epsilon, delta) law (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846) holds
for every mechanism with that claim. The Gaussian law (Mahloujifar, Melis, Chaudhuri 2024, arXiv:2410.22235) holds for
those whose whole trade-off curve is that of one Gaussian, and contradicts far sooner. With few canaries both are
blind to large epsilons however good the guesses are, so beside every bound stands its ceiling.

Shape letters: M canaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import dp_accounting
import numpy as np
from scipy import optimize, special, stats
from torch import Tensor

COUNTS = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
"""How many guesses are made, as shares of the canaries: surest first. Each is a look, and is corrected for."""

_LARGEST = 1e6


def chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The largest probability of at least so many right guesses under the (epsilon, delta) law.

    Args:
        canaries: m, coins tossed.
        guesses: how many of them were guessed about.
        right: of these.
        epsilon: of the claim, neighbours differing in one canary.
        delta: of the claim.
    """
    share = float(special.expit(epsilon))
    reached = float(stats.binom.sf(right - 1, guesses, share))
    if delta == 0:
        return reached
    short = np.arange(1, right + 1)
    near = (stats.binom.sf(right - 1 - short, guesses, share) - reached) / short
    return min(1.0, reached + 2 * canaries * delta * max(float(near.max(initial=0.0)), 0.0))


def epsilon_lower(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest epsilon that the guesses contradict under the (epsilon, delta) law; 0 if none.

    Args:
        canaries: m, coins tossed.
        guesses: how many of them were guessed about.
        right: of these.
        delta: of the claim.
        error: probability with which the bound may be wrong.
    """
    return _largest(lambda epsilon: chance(canaries, guesses, right, epsilon, delta) < error)


def mu_lower(canaries: int, guesses: int, right: int, error: float) -> float:
    """The largest mu, sensitivity over noise of one Gaussian, that the guesses contradict; 0 if none.

    Args:
        canaries: m, coins tossed.
        guesses: how many of them were guessed about.
        right: of these.
        error: probability with which the bound may be wrong.
    """
    return _largest(lambda mu: _contradicts(mu, canaries, guesses, right, error))


def epsilon_of(mu: float, delta: float) -> float:
    """Epsilon of one Gaussian of sensitivity mu and noise 1."""
    return float(dp_accounting.get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0


def _contradicts(mu: float, canaries: int, guesses: int, right: int, error: float) -> bool:
    """Whether a mu-Gaussian mechanism has so many right guesses with a probability below ``error``.

    ``wrong`` and ``good`` are the masses of a wrong and of a right guess among outcomes with at least i right. The
    trade-off curve bounds the one by the other, from i = right down to 0 (the paper's recursion).
    """
    good, wrong = error * right / canaries, error * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        more = max(wrong, float(special.ndtr(special.ndtri(min(good, 1.0)) - mu)))
        if more == wrong:
            break
        good += i / (guesses - i) * (more - wrong)
        wrong = more
    return good + wrong > guesses / canaries


def _largest(contradicted: Callable[[float], bool]) -> float:
    """Where a claim stops being contradicted, to a part in a million, rounded down."""
    if not contradicted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while contradicted(high):
        low, high = high, 2 * high
        if high > _LARGEST:
            return low
    edge = optimize.bisect(lambda value: -1.0 if contradicted(value) else 1.0, low, high, xtol=1e-6)
    return max(0.0, float(edge) - 1e-6)


@dataclass(frozen=True)
class Bounds:
    """What one set of scores proves.

    Attributes:
        epsilon: by the (epsilon, delta) law.
        mu: by the Gaussian law; see `epsilon_of`.
        guesses, right: behind the larger of the two.
    """

    epsilon: float
    mu: float
    guesses: int
    right: int

    def gaussian(self, delta: float) -> float:
        """Epsilon by the Gaussian law."""
        return epsilon_of(self.mu, delta)


def guess_counts(canaries: int) -> list[int]:
    """Numbers of guesses that are tried, each even and at least 2."""
    return sorted({max(2, 2 * round(share * canaries / 2)) for share in COUNTS if canaries >= 2})


def bounds(scores_M: Tensor, included_M: Tensor, delta: float, error: float) -> Bounds:
    """The best bounds over all numbers of guesses, corrected for their number.

    Half of the guesses say "in", for the highest scores, and half "out", for the lowest.

    Args:
        scores_M: larger means "is in"; anything that does not depend on the coins but through what was released.
        included_M: bool, how the coins fell.
        delta: of the claim.
        error: probability with which any of the bounds may be wrong.
    """
    order = scores_M.argsort(descending=True)
    inside = included_M[order].tolist()
    counts = guess_counts(len(inside))
    found = []
    for guesses in counts:
        half = guesses // 2
        found.append((guesses, sum(inside[:half]) + half - sum(inside[len(inside) - half :])))
    return _best(len(inside), found, delta, error / len(counts))


def ceilings(canaries: int, delta: float, error: float) -> Bounds:
    """What `bounds` would prove if every guess were right."""
    counts = guess_counts(canaries)
    return _best(canaries, [(guesses, guesses) for guesses in counts], delta, error / len(counts))


def _best(canaries: int, found: Sequence[tuple[int, int]], delta: float, error: float) -> Bounds:
    epsilons = [epsilon_lower(canaries, guesses, right, delta, error) for guesses, right in found]
    mus = [mu_lower(canaries, guesses, right, error) for guesses, right in found]
    surest = max(range(len(found)), key=lambda i: (mus[i], epsilons[i], found[i][1] / found[i][0]))
    return Bounds(max(epsilons), max(mus), *found[surest])
