"""The noise sampler as one compiled pass; `coterie.dp.noise.discrete_gaussian` has the same in numpy, slower.

numba is optional (``pip install coterie[fast]``). Both ways read the same bits of the same stream and give the same
float32 numbers, which a test holds them to.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

Kernel = Callable[..., int]
"""See `compile_kernel`."""

EXACT = 2.0**50
"""Grid numbers below this are exact in a double, noise and its halves included."""

_BLOCK = 512
"""Values that are looked through again where the bits do not decide some of them."""


def compile_kernel(packed: np.ndarray, fraction_bits: int) -> Kernel | None:
    """Compile ``target = unit * (round(value / step) + noise)``; None without numba.

    Args:
        packed: uint32, see `coterie.dp.noise.discrete_gaussian.AliasTable`; its last column stands for what is drawn
            otherwise.
        fraction_bits: how many bits of a word are compared with a threshold.

    Returns:
        ``kernel(words, fine, value, target, step, unit, start, places, open_words, open_values, found)``: [n] uint32
        and [n] uint16 random bits; value [n], and target [n] float32 or int64, which may be the same; the steps of
        the grid that is rounded to and of the one that is written; [k] int32, [k] uint32 and [k] float32 that take,
        from entry ``found`` on, what these bits do not decide: places, plus ``start``, words and values. Their
        targets mean nothing. It returns the new ``found``, or -1 where a value is not finite, its grid number is not
        exact in a double, or more than k are open.
    """
    if find_spec("numba") is None:
        return None
    import numba

    jit: Any = numba.njit(nogil=True)
    # Constants of the compiled code: only of these the compiler knows that no store changes them, and it vectorises.
    table = np.ascontiguousarray(packed)
    # numba widens integers in every operation; narrowed again each time, they stay eight to a vector.
    u, i4 = np.uint32, np.int32
    shift, mask, last = u(fraction_bits), u((1 << fraction_bits) - 1), u(packed.shape[0] - 1)

    def drawn(words: np.ndarray, fine: np.ndarray, doubled: np.ndarray, is_open: np.ndarray) -> Any:
        """Twice the noise, as if ties fell to the second value; how many are open."""
        count = i4(0)
        for i in range(words.shape[0]):
            word, low = words[i], u(fine[i])
            column, fraction = u(word >> shift), u(word & mask)
            pair = table[column]
            threshold = u(pair & mask)
            bucket = column if fraction < threshold else u(pair >> shift)
            size = i4(u(bucket << u(16)) | u(low & u(0xFFFE)) | u(1))
            doubled[i] = -size if low & u(1) else size
            undecided = (fraction == threshold) | (bucket == last)
            is_open[i] = undecided
            count = i4(count + i4(undecided))
        return count

    def added(doubled: np.ndarray, value: np.ndarray, target: np.ndarray, step: float, unit: float) -> Any:
        """How many values are unsound."""
        inverse = 1.0 / step
        unsound = i4(0)
        for i in range(value.shape[0]):
            number = np.rint(np.float64(value[i]) * inverse)
            unsound = i4(unsound + i4(not (abs(number) < EXACT)))  # NaN too
            target[i] = (number + 0.5 * np.float64(doubled[i])) * unit
        return unsound

    compiled_drawn, compiled_added = jit(drawn), jit(added)

    def whole(  # noqa: PLR0913 - compiled code takes numbers and arrays, no objects
        words: np.ndarray, fine: np.ndarray, value: np.ndarray, target: np.ndarray, step: float, unit: float,
        start: int, places: np.ndarray, open_words: np.ndarray, open_values: np.ndarray, found: int,
    ) -> int:  # fmt: skip
        # Not straight into the target, which may be the value: a loop that writes what it reads stays scalar.
        aside, doubled = np.empty(_BLOCK, target.dtype), np.empty(_BLOCK, np.int32)
        is_open = np.zeros(_BLOCK, np.bool_)
        eight_open = is_open.view(np.uint64)
        for begin in range(0, value.shape[0], _BLOCK):
            end = min(begin + _BLOCK, value.shape[0])
            size = end - begin
            is_open[size:] = False
            count = compiled_drawn(words[begin:end], fine[begin:end], doubled[:size], is_open[:size])
            if compiled_added(doubled[:size], value[begin:end], aside[:size], step, unit):
                return -1
            if found + count > places.shape[0]:
                return -1
            for group in range(eight_open.shape[0] if count else 0):
                if eight_open[group]:
                    for i in range(8 * group, 8 * group + 8):
                        if is_open[i]:
                            places[found], open_words[found] = start + begin + i, words[begin + i]
                            open_values[found] = value[begin + i]
                            found += 1
            target[begin:end] = aside[:size]
        return found

    compiled: Kernel = jit(whole)
    return compiled
