"""Statistics of noise and lots, each with the probability that an honest run gives such a value by chance.

Shape letters: N values, R rounds, U units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import fft, stats
from torch import Tensor

MOST_VALUES = 1 << 22
"""Values of a round that correlations and shapes are looked at; standard deviations take all."""


class Seen(NamedTuple):
    """What one check saw.

    Attributes:
        value: the figure.
        error: its standard error.
        chance: two-sided probability of a value as far off, if all is as stated.
    """

    value: float
    error: float
    chance: float


def spread(residuals: Sequence[Mapping[str, Tensor]]) -> Seen:
    """Standard deviation over the stated one, over all values of all rounds."""
    count = sum(value.numel() for each in residuals for value in each.values())
    squares = math.fsum(_squares(value) for each in residuals for value in each.values())
    return Seen(math.sqrt(squares / count), math.sqrt(0.5 / count), _two_sided(squares, count))


def worst_spread(residuals: Sequence[Mapping[str, Tensor]]) -> Seen:
    """The same of the one tensor that is furthest off: a part of the release without its noise is seen here."""
    found = []
    for name in residuals[0]:
        count = sum(each[name].numel() for each in residuals)
        squares = math.fsum(_squares(each[name]) for each in residuals)
        found.append(Seen(math.sqrt(squares / count), math.sqrt(0.5 / count), _two_sided(squares, count)))
    worst = min(found, key=lambda seen: (seen.chance, -abs(seen.value - 1) / seen.error))
    return worst._replace(chance=min(1.0, worst.chance * len(found)))


def shape(residuals: Sequence[Mapping[str, Tensor]]) -> Seen:
    """Largest distance between the values' distribution and the standard Gaussian's (Kolmogorov and Smirnov)."""
    values = np.concatenate([_flat(each) for each in residuals])[: 2 * MOST_VALUES]
    found = stats.kstest(values, "norm", method="asymp")
    return Seen(float(found.statistic), 1 / math.sqrt(len(values)), float(found.pvalue))


def within_rounds(residuals: Sequence[Mapping[str, Tensor]]) -> Seen:
    """The largest correlation of a round's noise with itself, any number of values later."""
    spectra = [_spectrum(each) for each in residuals]
    found = [_correlations(a, a, residuals[0])[1:] for a in spectra]
    return _largest(found, residuals[0])


def between_rounds(residuals: Sequence[Mapping[str, Tensor]]) -> Seen:
    """The largest correlation between the noise of two rounds, at the same or any other place."""
    spectra = [_spectrum(each) for each in residuals]
    pairs = [(a, b) for i, a in enumerate(spectra) for b in spectra[:i]]
    return _largest([_correlations(a, b, residuals[0]) for a, b in pairs], residuals[0])


def inclusion(included_RU: np.ndarray, rate: float, limit: int | None = None) -> list[tuple[str, Seen]]:
    """How often units join lots: on average, each by itself, and how lots vary in size.

    Args:
        included_RU: bool, which units were in which lot.
        rate: q.
        limit: largest lot; None: none.
    """
    rounds, units = included_RU.shape
    sizes = included_RU.sum(1)
    if rate >= 1 and limit is None:
        whole = bool(included_RU.all())
        return [("rate", Seen(float(included_RU.mean()), 0.0, 1.0 if whole else 0.0))]
    mean, variance = _size_law(units, rate, limit)
    off = (sizes.sum() - rounds * mean) / math.sqrt(rounds * variance)
    found = [("rate", Seen(float(sizes.mean() / units), math.sqrt(variance / rounds) / units, 2 * _tail(abs(off))))]
    if rounds > 1:
        freedom, peaked = rounds - 1, (1 - 6 * rate * (1 - rate)) / (rate * (1 - rate))
        scaled = float(((sizes - sizes.mean()) ** 2).sum() / variance)
        spread_of = freedom * (2 + peaked / units * freedom / rounds)
        found.append(("sizes", _moments(scaled, freedom, spread_of)))
        share = mean / units
        counts = included_RU.sum(0)
        each = float(((counts - rounds * share) ** 2).sum() / (rounds * share * (1 - share)))
        found.append(("units", _moments(each, units, units * (2 + peaked / rounds))))
    return found


def _size_law(units: int, rate: float, limit: int | None) -> tuple[float, float]:
    """Mean and variance of a lot's size."""
    if limit is None:
        return units * rate, units * rate * (1 - rate)
    size = np.arange(units + 1)
    mass = stats.binom.pmf(size, units, rate)
    cut = np.minimum(size, limit)
    mean = float((mass * cut).sum())
    return mean, float((mass * (cut - mean) ** 2).sum())


def _moments(total: float, mean: float, variance: float) -> Seen:
    """A sum of squares over its mean, by the gamma law of the same mean and variance."""
    law = stats.gamma(mean**2 / variance, scale=variance / mean)
    chance = min(1.0, 2 * min(float(law.cdf(total)), float(law.sf(total))))
    return Seen(total / mean, math.sqrt(variance) / mean, chance)


def _squares(value: Tensor) -> float:
    return float(value.double().square().sum())


def _flat(noise: Mapping[str, Tensor]) -> np.ndarray:
    parts = torch.cat([noise[name].reshape(-1).double() for name in sorted(noise)])
    return parts[:MOST_VALUES].numpy()


def _spectrum(noise: Mapping[str, Tensor]) -> tuple[np.ndarray, float]:
    """Of a round's values with as many zeros behind them as a quick transform takes, and their sum of squares."""
    values = _flat(noise)
    return fft.rfft(values, _padded(len(values))), float(np.dot(values, values))


def _padded(count: int) -> int:
    """A length at which values that are shifted out do not come in again."""
    return int(fft.next_fast_len(2 * count, real=True))


def _correlations(a: tuple[np.ndarray, float], b: tuple[np.ndarray, float], like: Mapping[str, Tensor]) -> np.ndarray:
    """Inner products of one round with the other shifted around by 0, 1, 2..., as standard normals."""
    count = _count(like)
    padded = _padded(count)
    products = fft.irfft(a[0] * np.conj(b[0]), padded)
    around = products[:count]
    around[1:] += products[padded - count + 1 :]
    lengths = math.sqrt(a[1] * b[1])
    return around * (math.sqrt(count) / lengths) if lengths > 0 else np.full(count, np.inf)


def _largest(normals: Sequence[np.ndarray], like: Mapping[str, Tensor]) -> Seen:
    """The largest of many nearly independent standard normals, as a correlation."""
    furthest = max(float(np.abs(each).max(initial=0.0)) for each in normals)
    looks = sum(len(each) for each in normals)
    count = _count(like)
    return Seen(furthest / math.sqrt(count), 1 / math.sqrt(count), min(1.0, looks * 2 * _tail(furthest)))


def _count(noise: Mapping[str, Tensor]) -> int:
    return min(MOST_VALUES, sum(value.numel() for value in noise.values()))


def _tail(normal: float) -> float:
    return float(stats.norm.sf(normal))


def _two_sided(squares: float, freedom: int) -> float:
    """Of a sum of squares of standard normals."""
    return min(1.0, 2 * min(float(stats.chi2.cdf(squares, freedom)), float(stats.chi2.sf(squares, freedom))))
