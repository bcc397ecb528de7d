"""Noise that takes back part of earlier rounds' noise: banded matrix factorisation (BandMF, arXiv:2306.08153).

The clipped sums G of all rounds, one a row, are released as C G + Z: Z is fresh noise, C a lower triangular matrix of
a few diagonals whose columns have norm 1. What is learnt from is C^-1 (C G + Z) = G + C^-1 Z, in which a round's
noise takes back part of the noise of rounds before it. So steps are noisier, and what they add up to is less so.

**What one unit moves.** Units are dealt into as many blocks as there are diagonals, by their numbers alone, and
blocks take turns: one release each. A unit that joins a lot moves the rows that its column reaches, by one column,
so by norm 1 times the clip norm at most. Its block's next turn is after these rows. So its turns are a composition of
sampled Gaussians, as many as its block has turns, and within a turn it joins with the rate of the block: as many
times the lot's share of all units as there are blocks.

**Where it starts anew.** Past sums live in one process's memory. A process that goes on with a run has none, and
starts a new C at the turn that is due: rows of the old one are left, columns that reached beyond are cut short, and a
unit's turns are as many as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.signal import lfilter

from coterie.dp.numbers import checked_number
from coterie.errors import PrivacyError

_ROUNDING = 1e-12
"""Columns are made shorter than one by this share, so that rounding does not make one longer."""

_DIGITS = 3
"""Of the coefficients over the first: what rounding costs in noise is of second order, a millionth."""

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class NoiseBands:
    """How rounds' noise hangs together, in public numbers.

    Attributes:
        coefficients: the diagonals of C, from the main one down; as many as there are blocks of units.

    Raises:
        PrivacyError: a column would be longer than one, or the main diagonal is not positive.
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        norm = math.fsum(each**2 for each in self.coefficients)
        if not (norm <= 1 and self.coefficients[0] > 0 and len(self.coefficients) > 1):
            raise PrivacyError(
                f"bands of noise have a column of squared norm {norm:.6g}.",
                code="dp-bands-norm",
                why="a unit would move what is released by more than the noise is calibrated to",
                fix="let `noise_bands` choose the coefficients",
            )

    @classmethod
    def of(cls, bands: int, rounds: int, momentum: float = 0.0) -> NoiseBands | None:
        """The coefficients that leave the least noise in the weights, on average over a run's rounds.

        Args:
            bands: diagonals, blocks; 1: independent noise.
            rounds: of the run.
            momentum: with which the optimizer adds up rounds.

        Returns:
            None for one band.

        Raises:
            BudgetError: no number of bands from 1 to 64.
        """
        bands = checked_number("noise_bands", bands)
        return None if bands == 1 else cls(_least_noise(bands, max(rounds, bands), momentum))

    @property
    def count(self) -> int:
        """b: how many rounds a column reaches, and in how many blocks units are."""
        return len(self.coefficients)

    def run_noise(self, rounds: int, momentum: float = 0.0) -> float:
        """Root mean square, over a run's rounds, of the noise in what was added up so far, for noise of one a row."""
        return run_noise(self.coefficients, rounds, momentum)

    def step_noise(self, rounds: int) -> float:
        """Largest standard deviation of the noise in one round's sum, for noise of one a row."""
        return math.sqrt(float(np.square(_response(self.coefficients, rounds)).sum()))

    def to_json(self) -> list[float]:
        return list(self.coefficients)

    @classmethod
    def from_json(cls, values: Any) -> NoiseBands | None:
        """What `to_json` gave; None where rounds' noise is independent."""
        return None if values is None else cls(tuple(float(value) for value in values))


def bands_of(facts: Mapping[str, Any]) -> NoiseBands | None:
    """Of a run, by its ledger entry."""
    return NoiseBands.from_json(facts.get("bands"))


def block_of(units: int, bands: int) -> np.ndarray:
    """[units] int64, the block of each unit, by its number alone.

    A fixed mixing of the number (SplitMix64), so that no order of records puts kinds of them into one block. What is
    in other units changes nothing, nor does a unit that leaves its number empty. Cut out of a file it moves all units
    behind it to other numbers, and so to other blocks: of such files nothing is proven.
    """
    with np.errstate(over="ignore"):
        mixed = (np.arange(units, dtype=np.uint64) + np.uint64(1)) * np.uint64(_MIX[0])
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MIX[1])
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MIX[2])
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(bands)).astype(np.int64)


def run_noise(coefficients: tuple[float, ...], rounds: int, momentum: float = 0.0) -> float:
    """See `NoiseBands.run_noise`; for coefficients (1,): of independent noise.

    Round t adds up momentum's share of all rounds before it, so its error is row t of A C^-1 Z with A of the running
    sums; rows differ by where they end, and entry k of a row stands in all rounds but k.
    """
    response = _response(coefficients, rounds)
    added = lfilter([1.0], np.convolve([1.0, -1.0], [1.0, -momentum]), response)
    return math.sqrt(float((np.arange(rounds, 0, -1) / rounds * added**2).sum()))


def _response(coefficients: tuple[float, ...], rounds: int) -> np.ndarray:
    """The first column of C^-1."""
    first = np.zeros(rounds)
    first[0] = 1.0
    response: np.ndarray = lfilter([1.0], np.array(coefficients), first)
    return response


def _square_root(bands: int, momentum: float) -> np.ndarray:
    """The first entries of the square root of running sums (arXiv:2405.13763), from which the search starts."""
    plain = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, bands))])
    return np.convolve(plain, plain * momentum ** np.arange(bands))[:bands]


@lru_cache(64)
def _least_noise(bands: int, rounds: int, momentum: float) -> tuple[float, ...]:
    """Rounded, because a run that goes on elsewhere is held to them to the last bit, and where a search ends
    differs by the processor: here by 1e-7 at most."""
    impulse, weights = np.eye(1, rounds)[0], np.arange(rounds, 0, -1) / rounds
    course = np.convolve([1.0, -1.0], [1.0, -momentum])

    def noise(rest: np.ndarray) -> tuple[float, np.ndarray]:
        """Logarithm of `run_noise` times the column's norm, and its gradient."""
        column = np.concatenate([[1.0], rest])
        length = float(np.square(column).sum())
        with np.errstate(over="ignore", invalid="ignore"):
            added = lfilter([1.0], np.convolve(course, column), impulse)
            squares = float((weights * np.square(added)).sum())
        if not math.isfinite(squares):
            return 1e9, np.zeros_like(rest)
        moved = lfilter([1.0], column, added)  # by a coefficient, as many rounds later as it is below the diagonal
        slope = np.correlate(weights * added, moved, "full")[rounds - 1 : rounds - 1 + bands]
        return math.log(squares * length) / 2, (column / length - slope / squares)[1:]

    options = {"ftol": 0.0, "gtol": 1e-10, "maxiter": 1000, "maxcor": 30}
    found = minimize(noise, _square_root(bands, momentum)[1:], jac=True, method="L-BFGS-B", options=options)
    column = [1.0, *(round(each, _DIGITS) for each in found.x.tolist())]
    norm = math.sqrt(math.fsum(each**2 for each in column)) * (1 + _ROUNDING)
    return tuple(round(each / norm, 13) * (1 - _ROUNDING) for each in column)
