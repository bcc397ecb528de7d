"""Scales of the drawings: values to places, and the values at which an axis is marked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` onto places from ``start`` to ``end`` of the drawing.

    Attributes:
        log: equal factors take equal room; ``low`` is above 0.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Place of a value; a value outside the scale is put at its end."""
        inside = min(max(value, self.low), self.high)
        low, high = self._bent(self.low), self._bent(self.high)
        return self.start + (self._bent(inside) - low) / (high - low) * (self.end - self.start)

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the scale, in increasing order."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers]
        wanted = (self.high - self.low) / about
        unit = 10.0 ** math.floor(math.log10(wanted))
        step = next(unit * size for size in _STEPS if unit * size >= wanted * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def span(values: Iterable[float], *, margin: float = 0.06) -> tuple[float, float]:
    """Low and high end of a linear axis over some values; never the same.

    Args:
        values: those that are not finite do not count.
        margin: free room at either end, as a share.
    """
    found = [value for value in values if math.isfinite(value)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    room = (high - low or abs(high) or 1.0) * margin
    return low - room, high + room


def shown(value: float) -> str:
    """A tick's value, as short as it can be: ``0.001``, ``2.5``, ``10k``, ``3M``."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):g}{unit}"
    return f"{value:.10g}" if size >= 1e-4 or not size else f"{value:.0e}"
