"""What a privacy claim allows an attacker: the largest AUC and true-positive rate of any membership test.

Epsilon 8 does not make a membership test a coin flip, and is not meant to. A measured AUC says nothing until the one
that the claim allows stands beside it.

Every (epsilon, delta) that holds bounds a test's true positives at a rate f of false ones by two straight lines:
exp(epsilon) f + delta, and 1 - exp(-epsilon) (1 - delta - f). The run's mechanism has a delta for every epsilon, and
the lower envelope of all its lines is what the best test can reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as distribution

from coterie.dp.accounting.accountant import Mechanism, one_round

_EPSILONS = np.concatenate([np.linspace(0, 2, 401), np.linspace(2, 40, 761)[1:]])
_INTERVAL = 1e-3


@dataclass(frozen=True)
class Allowed:
    """The best membership test that a claim allows.

    Attributes:
        claims: pairs (epsilon, delta) that all hold.
    """

    claims: tuple[tuple[float, float], ...]

    def tpr(self, fpr: float) -> float:
        """The largest share of members found at a share of false alarms."""
        return float(self._curve(np.array([fpr]))[0])

    @property
    def auc(self) -> float:
        """The area under the curve, exact for its straight pieces."""
        corners = self._corners()
        return float(np.trapezoid(self._curve(corners), corners))

    def roc(self, points: int = 101) -> tuple[tuple[float, float], ...]:
        """(false positives, true positives) along the curve, more of them near 0."""
        at = np.concatenate([[0.0], np.logspace(-4, 0, points - 1)])
        return tuple(zip(at.tolist(), self._curve(at).tolist(), strict=True))

    def _lines(self) -> tuple[np.ndarray, np.ndarray]:
        """Slopes and values at 0 of everything above the curve, steepest first."""
        epsilon, delta = (np.array(part) for part in zip(*self.claims, strict=True))
        slope = np.concatenate([np.exp(epsilon), np.exp(-epsilon), [0.0]])
        start = np.concatenate([delta, 1 - np.exp(-epsilon) * (1 - delta), [1.0]])
        order = np.lexsort((start, -slope))
        return slope[order], start[order]

    def _curve(self, fpr: np.ndarray) -> np.ndarray:
        slope, start = self._lines()
        power: np.ndarray = np.clip((slope * fpr[:, None] + start).min(1), 0.0, 1.0)
        return power

    def _corners(self) -> np.ndarray:
        """Where the lower envelope of the lines bends, with 0 and 1."""
        slope, start = self._lines()
        kept: list[int] = []
        for line in range(len(slope)):
            if kept and slope[line] == slope[kept[-1]]:
                continue
            while len(kept) > 1 and _meet(slope, start, kept[-2], line) <= _meet(slope, start, kept[-2], kept[-1]):
                kept.pop()
            kept.append(line)
        meets = [_meet(slope, start, a, b) for a, b in pairwise(kept)]
        return np.unique(np.clip([0.0, *meets, 1.0], 0.0, 1.0))


def _meet(slope: np.ndarray, start: np.ndarray, a: int, b: int) -> float:
    return float((start[b] - start[a]) / (slope[a] - slope[b]))


def by_claim(epsilon: float, delta: float) -> Allowed:
    """What (epsilon, delta) alone allows, whatever the mechanism is."""
    return Allowed(((epsilon, delta) if math.isfinite(epsilon) else (0.0, 1.0),))


def by_mechanism(spent: Iterable[tuple[Mechanism, int]]) -> Allowed:
    """What the accountant's whole curve allows: far less than its one point (epsilon, delta).

    Args:
        spent: mechanisms, and how often each ran.
    """
    runs: Sequence[tuple[Mechanism, int]] = [each.for_one_unit(rounds) for each, rounds in spent if rounds]
    if any(mechanism.noise_multiplier <= 0 for mechanism, _ in runs):
        return Allowed(((0.0, 1.0),))
    total = distribution.identity(value_discretization_interval=_INTERVAL)
    for mechanism, count in runs:
        total = total.compose(one_round(mechanism, _INTERVAL).self_compose(count))
    deltas = np.asarray(total.get_delta_for_epsilon(_EPSILONS), dtype=np.float64)
    return Allowed(tuple(zip(_EPSILONS.tolist(), deltas.tolist(), strict=True)))
