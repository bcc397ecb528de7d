"""The noise sampler as one compiled pass over the values; `coterie.dp.noise` has the same in numpy, and more slowly.

numba is optional (``pip install coterie[fast]``). Both ways read the same bits of the same stream and give the same
float32 numbers, which a test holds them to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, int, np.ndarray], int]
"""``kernel(bits, table, value, target, step, coarse, ties)``, see `_add`."""


@functools.cache
def kernel() -> Kernel | None:
    """The compiled pass, or None without numba. Compiling takes seconds once; the result is cached on disk."""
    if find_spec("numba") is None:
        return None
    import numba

    try:
        return numba.njit(nogil=True, cache=True)(_add)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return numba.njit(nogil=True)(_add)


def _add(
    bits: np.ndarray,
    table: np.ndarray,
    value: np.ndarray,
    target: np.ndarray,
    step: float,
    coarse: int,
    ties: np.ndarray,
) -> int:
    """``target = step * (round(value / step) + noise)``, except where the random bits do not decide.

    Args:
        bits: [4, n] uint16: column and fraction of the fine draw, then of the coarse one.
        table: [65536] uint32, each column's other value in the low half and its threshold in the high half.
        value: [n] float32.
        target: [n] float32, may be ``value``; untouched at ties.
        step: of the grid.
        coarse: what the coarse draw is multiplied with.
        ties: [n] int64, receives the places where a fraction equals its threshold.

    Returns:
        How many ties there are, or -1 if a value is not finite or its grid number not exact in a double.
    """
    low = np.uint32(0xFFFF)
    offset = np.int32(32768 * (1 + coarse))
    count = 0
    sound = True
    for i in range(value.shape[0]):
        first, second = np.uint32(bits[0, i]), np.uint32(bits[2, i])
        first_pair, second_pair = table[first], table[second]
        first_fraction, second_fraction = np.uint32(bits[1, i]), np.uint32(bits[3, i])
        first_threshold, second_threshold = first_pair >> np.uint32(16), second_pair >> np.uint32(16)
        number = np.rint(np.float64(value[i]) / step)
        sound &= abs(number) < 4503599627370496.0  # 2^52; false for NaN
        if first_fraction == first_threshold or second_fraction == second_threshold:
            ties[count] = i
            count += 1
            continue
        fine = np.int32(first if first_fraction < first_threshold else first_pair & low)
        big = np.int32(second if second_fraction < second_threshold else second_pair & low)
        noise = fine + np.int32(coarse) * big - offset
        target[i] = np.float32((number + np.float64(noise)) * step)
    return count if sound else -1
