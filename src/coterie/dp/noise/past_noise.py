"""Banded noise, round by round: what is mixed into a lot's sums before noise, and what is learnt from them after.

A round releases w = c_0 G + sum_k c_k (G_k - R_k) + noise, where G_k are the sums of k rounds ago and R_k what was
made public of them. R = w / c_0 is what is learnt from. That is the row c_0 G + sum_k c_k G_k + noise of
`coterie.dp.noise.bands`, less values that are public. The mixture is rounded to the grid as any other sum, and the
noise lies on the grid; what is divided by is public, and comes after.

G_k - R_k is the noise of round k: whoever had it could take it off. It stays in this process's memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import numpy as np

from coterie.dp.noise.bands import NoiseBands
from coterie.dp.noise.discrete_gaussian import Slabs


class PastNoise:
    """The noise of the last rounds, of the sums that one rank owns.

    Args:
        bands: how rounds hang together.

    Memory: 8 (b - 1) bytes for each value that the rank owns.
    """

    def __init__(self, bands: NoiseBands) -> None:
        self._main, *self._rest = bands.coefficients
        self._rows: deque[list[np.ndarray]] = deque(maxlen=len(self._rest))
        self._slot = -1

    def mix(self, slabs: Slabs, names: Collection[str], slot: int) -> list[np.ndarray]:
        """Put the mixture into the slabs in place of their sums; from here on they are noised as any others.

        Args:
            slabs: the sums of all ranks together.
            names: the rank's own.
            slot: how many releases the run had before. Where it does not follow the last one, nothing is mixed in.

        Returns:
            The sums, in steps of the grid, for `keep`.
        """
        if slot != self._slot + 1:
            self._rows.clear()
        sums = slabs.in_steps(names)
        mixed = [self._main * own for own in sums]
        for coefficient, row in zip(self._rest, self._rows, strict=False):
            for into, past in zip(mixed, row, strict=True):
                into += coefficient * past
        slabs.replace(names, mixed)
        return sums

    @property
    def main(self) -> float:
        """c_0: what noised mixtures are divided by."""
        return self._main

    def keep(self, sums: list[np.ndarray], slabs: Slabs, names: Collection[str], slot: int, divisor: float) -> None:
        """Remember a round that was released.

        Args:
            sums: what `mix` gave.
            slabs: noised since.
            names: the rank's own.
            slot: as given to `mix`.
            divisor: what the released sums were divided by beside `main`.
        """
        for own, released in zip(sums, slabs.released_steps(names, divisor), strict=True):
            own -= released
        self._rows.appendleft(sums)
        self._slot = slot
