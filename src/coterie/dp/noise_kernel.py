"""The noise sampler as one compiled pass over the values; `coterie.dp.noise` has the same in numpy, and more slowly.

numba is optional (``pip install coterie[fast]``). Both ways read the same bits of the same stream and give the same
float32 numbers, which a test holds them to.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

Kernel = Callable[..., tuple[bool, int]]
"""See `compile_kernel`."""

EXACT = 2.0**52
"""Grid numbers below this are exact in a double, noise included."""

_BLOCK = 1024
"""Values that are looked through again where there is a tie among them."""


def compile_kernel(both: np.ndarray, coarse: int) -> Kernel | None:
    """Compile ``target = unit * (round(value / step) + noise)``; None without numba.

    Args:
        both: [65536, 2] uint16, see `coterie.dp.noise.AliasTable`.
        coarse: what the coarse draw is multiplied with.

    Returns:
        ``kernel(column, fraction, column, fraction, spare, low, value, target, step, unit)``: [n] uint16 of the fine,
        then of the coarse draws; [k, 3] uint64 random words for ties; the table's [65536, 3] uint64; value and target
        [n] float32, which may be the same; the steps of the grid that is rounded to and of the one that is written.
        It returns whether all values are finite with grid numbers that are exact in a double, and how many words it
        used; beyond k, the target means nothing.
    """
    if find_spec("numba") is None:
        return None
    import numba

    jit: Any = numba.njit(nogil=True)
    # Constants of the compiled code: only of these the compiler knows that no store changes them, and it vectorises.
    table = np.ascontiguousarray(both).view(np.uint32)[:, 0].copy()
    lower, upper = np.uint32(0xFFFF), np.uint32(16)
    factor, offset = np.int32(coarse), np.int32(32768 * (1 + coarse))

    def decided(
        columns: np.ndarray, fractions: np.ndarray, columns2: np.ndarray, fractions2: np.ndarray,
        value: np.ndarray, target: np.ndarray, step: float, unit: float,
    ) -> tuple[Any, Any]:  # fmt: skip
        """As if ties fell to the second value; how many there are, and how many values are unsound."""
        inverse = 1.0 / step
        ties = unsound = np.int32(0)
        for i in range(value.shape[0]):
            first, second = np.uint32(columns[i]), np.uint32(columns2[i])
            fraction, fraction2 = np.uint32(fractions[i]), np.uint32(fractions2[i])
            pair, pair2 = table[first], table[second]
            threshold, threshold2 = pair >> upper, pair2 >> upper
            fine = np.int32(first if fraction < threshold else pair & lower)
            big = np.int32(second if fraction2 < threshold2 else pair2 & lower)
            ties += np.int32((fraction == threshold) | (fraction2 == threshold2))
            number = np.rint(np.float64(value[i]) * inverse)
            unsound += np.int32(not (abs(number) < EXACT))  # NaN too
            target[i] = np.float32((number + np.float64(fine + factor * big - offset)) * unit)
        return ties, unsound

    def drawn(column: int, fraction: int, spare: np.ndarray, low: np.ndarray, used: int) -> tuple[Any, Any]:
        """One draw, and how many words of ``spare`` are used after it."""
        pair = table[column]
        other, threshold = np.int32(pair & lower), pair >> upper
        if fraction != threshold or used >= spare.shape[0]:
            return (np.int32(column) if fraction < threshold else other), used + (fraction == threshold)
        for word in range(spare.shape[1]):
            if spare[used, word] != low[column, word]:
                return (np.int32(column) if spare[used, word] < low[column, word] else other), used + 1
        return other, used + 1

    compiled_decided, compiled_drawn = jit(decided), jit(drawn)

    def whole(
        columns: np.ndarray, fractions: np.ndarray, columns2: np.ndarray, fractions2: np.ndarray,
        spare: np.ndarray, low: np.ndarray, value: np.ndarray, target: np.ndarray, step: float, unit: float,
    ) -> tuple[bool, int]:  # fmt: skip
        used = 0
        # Not straight into the target, which may be the value: a loop that writes what it reads stays scalar.
        aside = np.empty(_BLOCK, np.float32)
        for start in range(0, value.shape[0], _BLOCK):
            stop = min(start + _BLOCK, value.shape[0])
            ties, unsound = compiled_decided(
                columns[start:stop], fractions[start:stop], columns2[start:stop], fractions2[start:stop],
                value[start:stop], aside[: stop - start], step, unit,
            )  # fmt: skip
            if unsound:
                return False, used
            for i in range(start, stop if ties else start):
                before = used
                fine, used = compiled_drawn(columns[i], fractions[i], spare, low, used)
                big, used = compiled_drawn(columns2[i], fractions2[i], spare, low, used)
                if used > before:
                    number = np.rint(np.float64(value[i]) * (1.0 / step))
                    aside[i - start] = np.float32((number + np.float64(fine + factor * big - offset)) * unit)
            target[start:stop] = aside[: stop - start]
        return True, used

    compiled: Kernel = jit(whole)
    return compiled
