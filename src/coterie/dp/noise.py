"""Discrete Gaussian noise on a public grid: exact enough to account for, as fast as ordinary floating-point noise.

Noise drawn and added in floating point leaks: which doubles can come out depends on the secret (Mironov 2012;
arXiv:2107.10138; arXiv:2207.13793). So a clipped sum is first rounded to a grid whose step depends only on public
numbers, and integer noise is added on that grid (Canonne, Kamath and Steinke 2020). The result is then an integer
vector with the privacy of the discrete Gaussian; turning it into float32 afterwards is post-processing.

**The distribution.** N(z) proportional to exp(-z^2 / (2 G^2)) over the integers, G = `GRID_SIGMA`, about 2^21. One
sample is ``fine + COARSE * coarse`` with two draws from one table for standard deviation 2^11. Given their sum,
``fine`` runs over a coset of COARSE * Z with standard deviation 2 COARSE (to six digits), so the sum's probabilities
differ from the discrete Gaussian's by a factor within 1 +- 2 exp(-8 pi^2), about 1 +- 1e-34 (Peikert 2010; Micciancio
and Walter 2017). The table is an alias table with integer thresholds of 208 bits; a draw looks at 32 random bits and,
in one case of 65,536, a tie, at 192 more, so each entry's probability is right to 2^-208.
Values beyond 16 standard deviations of the table (mass 2^-185) are never drawn.

**What it costs in privacy.** At integer orders the Renyi divergences of the (subsampled) discrete and continuous
Gaussian with shifts on the grid are equal. And the discrete one is so close to the rounded continuous one (divergence
about 1e-28 a coordinate), a post-processing of what `coterie.dp.accounting` counts, that no composition notices.

**What rounding costs.** Two neighbouring sums differ by one record's contribution, norm at most C (1 + eta), before
rounding, and by at most one more step in each of d coordinates after it: sqrt(d) steps. `calibrate` pays for both.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext

import numpy as np
import torch
from torch import Tensor

from coterie.dp.noise_kernel import EXACT, Kernel, compile_kernel
from coterie.dp.randomness import Keystream, RandomSource
from coterie.errors import PrivacyError

TABLE_BITS = 16
TABLE_SIGMA = 2**11
COARSE = 2**10
GRID_SIGMA = TABLE_SIGMA * math.sqrt(1 + COARSE**2)
"""Standard deviation of the noise in grid steps."""

_PROBABILITY_BITS = 224
_COLUMN_BITS = _PROBABILITY_BITS - TABLE_BITS
_TIE_BITS = _COLUMN_BITS - 16
_TIE_WORDS = _TIE_BITS // 64
_CHUNK = 1 << 15
_TIES = 64
"""Random numbers for ties in a chunk. One is needed on average, and more than these with probability 1e-91."""

_MAX_GRID_SHARE = 0.1


class AliasTable:
    """Vose's alias method for the discrete Gaussian with `TABLE_SIGMA`, in exact integer arithmetic.

    Attributes:
        both: [65536, 2] uint16, a column's second value (with the same offset as the column number) and the upper 16
            bits of its threshold, side by side so that one look-up fetches both.
        low: [65536, 3] uint64, the remaining bits of every threshold, the highest first.
    """

    def __init__(self) -> None:
        columns = 1 << TABLE_BITS
        half = columns // 2
        weights = _half_gaussian_weights(half)
        total = sum(weights) + sum(weights[1:half])
        mass = [weights[abs(z)] * (1 << _PROBABILITY_BITS) // total for z in range(-half, half)]
        mass[half] += (1 << _PROBABILITY_BITS) - sum(mass)
        capacity = 1 << _COLUMN_BITS
        # A column that is never split points at itself, so its threshold (which would need a 17th bit) is moot.
        other, threshold = list(range(columns)), [capacity - 1] * columns
        small = [i for i, m in enumerate(mass) if m < capacity]
        large = [i for i, m in enumerate(mass) if m >= capacity]
        while small and large:
            low, high = small.pop(), large[-1]
            threshold[low], other[low] = mass[low], high
            mass[high] -= capacity - mass[low]
            if mass[high] < capacity:
                small.append(large.pop())
        self.both = np.array([[o, t >> _TIE_BITS] for o, t in zip(other, threshold, strict=True)], dtype=np.uint16)
        rest = b"".join((t & ((1 << _TIE_BITS) - 1)).to_bytes(_TIE_BITS // 8, "big") for t in threshold)
        self.low = np.frombuffer(rest, ">u8").reshape(columns, _TIE_WORDS).astype(np.uint64)

    def draw(self, column: np.ndarray, fraction: np.ndarray, out: np.ndarray, work: _Work) -> np.ndarray:
        """Fill ``out`` [n] int16 from 32 random bits a value.

        Args:
            column, fraction: [n] uint16 each, n at most the size of ``work``.
            out: [n] int16, the samples.
            work: buffers.

        Returns:
            The places that the bits do not decide, whose samples are still to come; see `own`.
        """
        count = out.shape[0]
        pair, below, mask = work.pair[:count], work.below[:count], work.mask[:count]
        np.take(self.both.view(np.uint32)[:, 0], column, out=pair.view(np.uint32)[:, 0], mode="clip")
        other, threshold = pair[:, 0], pair[:, 1]
        np.equal(fraction, threshold, out=below)
        ties = np.flatnonzero(below)
        np.less(fraction, threshold, out=below)
        # Select by masks: `where` would mispredict a branch in every other element.
        np.multiply(below, np.uint16(0xFFFF), out=mask, dtype=np.uint16)
        chosen = np.bitwise_xor(column, other, out=out.view(np.uint16))
        np.bitwise_and(chosen, mask, out=chosen)
        np.bitwise_xor(chosen, other, out=chosen)
        # Columns are values plus 2^15; flipping the top bit of the unsigned number takes that offset off.
        np.bitwise_xor(chosen, np.uint16(1 << (TABLE_BITS - 1)), out=chosen)
        return ties

    def own(self, column: np.ndarray, words: np.ndarray) -> np.ndarray:
        """[k] bool, whether ties [k] fall to their column rather than to its second value.

        Args:
            column: [k] column numbers.
            words: [k, 3] uint64 random bits, the highest first.
        """
        low = self.low[column]
        below = words[:, -1] < low[:, -1]
        for word in range(_TIE_WORDS - 2, -1, -1):
            below = (words[:, word] < low[:, word]) | ((words[:, word] == low[:, word]) & below)
        return below


class _Work:
    """Buffers of one chunk, reused so that the sampler allocates nothing."""

    def __init__(self) -> None:
        self.pair = np.empty((_CHUNK, 2), np.uint16)
        self.mask = np.empty(_CHUNK, np.uint16)
        self.below = np.empty(_CHUNK, np.bool_)
        self.draws = np.empty((2, _CHUNK), np.int16)
        self.noise = np.empty(_CHUNK, np.int32)
        self.value = np.empty(_CHUNK, np.float64)


def _half_gaussian_weights(half: int) -> list[int]:
    """exp(-z^2 / (2 TABLE_SIGMA^2)) for z = 0..half as fixed-point integers, relative error below 2^-200 at z = 0.

    Neighbouring weights differ by a factor that itself shrinks by a constant factor, so two exponentials suffice.
    """
    bits = 2 * _PROBABILITY_BITS + 64
    with localcontext() as context:
        context.prec = bits // 3 + 20
        variance = Decimal(TABLE_SIGMA**2)
        ratio = int((Decimal(-1) / (2 * variance)).exp() * Decimal(2) ** bits)
        shrink = int((Decimal(-1) / variance).exp() * Decimal(2) ** bits)
    weights = [1 << bits]
    for _ in range(half):
        weights.append((weights[-1] * ratio) >> bits)
        ratio = (ratio * shrink) >> bits
    return weights


@functools.cache
def alias_table() -> AliasTable:
    """The one table, built on first use (about 0.1 s)."""
    return AliasTable()


@functools.cache
def kernel() -> Kernel | None:
    """The compiled pass over `alias_table`, or None without numba."""
    return compile_kernel(alias_table().both, COARSE)


def discrete_gaussian(count: int, stream: Keystream) -> np.ndarray:
    """[count] int32 samples of the discrete Gaussian with standard deviation `GRID_SIGMA`."""
    out = np.empty(count, np.int32)
    work, table = _Work(), alias_table()
    for start in range(0, count, _CHUNK):
        out[start : start + _CHUNK] = _chunk(table, stream, work, min(_CHUNK, count - start))
    return out


def _bits(stream: Keystream, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random bits of a chunk, valid until the next read.

    Returns:
        [4, count] uint16, columns and fractions of the fine, then of the coarse draws; [_TIES, 3] uint64 for ties,
        which take theirs in the order of their places, fine before coarse.
    """
    ties = 8 * _TIES * _TIE_WORDS
    read = stream.read(ties + 8 * count)
    return read[ties:].view(np.uint16).reshape(4, count), read[:ties].view(np.uint64).reshape(_TIES, _TIE_WORDS)


def _chunk(table: AliasTable, stream: Keystream, work: _Work, count: int) -> np.ndarray:
    draws, noise = work.draws[:, :count], work.noise[:count]
    bits, spare = _bits(stream, count)
    ties = [table.draw(bits[0], bits[1], draws[0], work), table.draw(bits[2], bits[3], draws[1], work)]
    if ties[0].size or ties[1].size:
        which, places = np.repeat([0, 1], [ties[0].size, ties[1].size]), np.concatenate(ties)
        order = np.lexsort((which, places))
        which, places = which[order], places[order]
        if places.size > _TIES:
            raise _broken_stream()
        column = bits[2 * which, places]
        chosen = np.where(table.own(column, spare[: places.size]), column, table.both[column, 0])
        draws[which, places] = (chosen.astype(np.int32) - (1 << (TABLE_BITS - 1))).astype(np.int16)
    np.multiply(draws[1], np.int32(COARSE), out=noise, dtype=np.int32)
    np.add(noise, draws[0], out=noise)
    return noise


def _broken_stream() -> PrivacyError:
    return PrivacyError(
        "the random numbers for the noise are not random.",
        code="dp-noise",
        why=f"more than {_TIES} ties among {_CHUNK} draws happen to sound ones never",
        fix="look whether the `cryptography` package works on this machine",
    )


def calibrate(noise_multiplier: float, bound: float, num_values: int) -> float:
    """Standard deviation of the noise that gives ``noise_multiplier`` for what is really added up and rounded.

    Solves ``std = noise_multiplier * (bound + sqrt(num_values) * step)`` with ``step = std / GRID_SIGMA``: what one
    unit moves the clipped sum by, and what rounding to the grid adds to that.

    Args:
        noise_multiplier: sigma that the accountant was given.
        bound: largest contribution of one unit, floating-point slack included: C (1 + eta).
        num_values: d, numbers released together under this bound.

    Raises:
        PrivacyError: so many values that the grid would be too coarse (about 4e10 / sigma^2).
    """
    rounding = noise_multiplier * math.sqrt(num_values) * (1 + 2**-10) / GRID_SIGMA
    if rounding > _MAX_GRID_SHARE:
        raise PrivacyError(
            f"{num_values} values at noise multiplier {noise_multiplier:.3g} are too many for the noise grid.",
            code="dp-grid",
            why=f"rounding to the grid would take {rounding:.0%} of the noise",
            fix="train fewer parameters, for example with LoRA",
        )
    return noise_multiplier * bound / (1 - rounding)


def add_noise(
    sums: Mapping[str, Tensor],
    std: float | Mapping[str, float],
    source: RandomSource,
    purpose: str = "noise",
    in_place: bool = False,
    divisor: float = 1.0,
) -> dict[str, Tensor]:
    """Each clipped sum rounded to the grid, plus discrete Gaussian noise of standard deviation ``std``.

    Args:
        sums: float tensors by name, any device and shape.
        std: noise standard deviation, one for all or one per name, in the unit of the sums; see `calibrate`.
        source: a private run passes `SystemRandom`.
        purpose: names the streams of a seeded source; must differ from round to round.
        in_place: write the result over sums that are contiguous float32 on the CPU, which saves their size in
            memory; after an error they are spoilt. Otherwise they are not changed.
        divisor: a public number that the noised sum is divided by, in the same pass.

    Returns:
        float32 CPU tensors of the same names and shapes.

    Raises:
        PrivacyError: a sum is not finite or std is not positive (code dp-noise).

    Cost: with numba 2.9 ns of a thread for a value, without 15 (100 million: 0.3 s, 1.5 s), buffers of 1 MB a thread.
    """
    out: dict[str, Tensor] = {}
    jobs = []
    for number, name in enumerate(sorted(sums)):
        scale = std if isinstance(std, int | float) else std[name]
        if not (scale > 0 and math.isfinite(scale)):
            raise PrivacyError(
                f"the noise of `{name}` has standard deviation {scale}.",
                code="dp-noise",
                why="without noise what is released is not private",
                fix="every trainable parameter needs a positive clip norm and noise multiplier",
            )
        plain = sums[name].detach().to("cpu", torch.float32).contiguous()
        owned = in_place or plain.data_ptr() != sums[name].data_ptr()
        out[name] = plain if owned else torch.empty_like(plain)
        value, target = plain.view(-1).numpy(), out[name].view(-1).numpy()
        for start in range(0, value.shape[0], _SLAB):
            stream = source.stream(f"{purpose}|{number}|{start}")
            jobs.append(
                (name, value[start : start + _SLAB], target[start : start + _SLAB], scale / GRID_SIGMA, stream)
            )
    total = sum(job[1].shape[0] for job in jobs)
    compiled = kernel() if total >= _WORTH_COMPILING else None

    def run(job: tuple[str, np.ndarray, np.ndarray, float, Keystream]) -> None:
        name, value, target, step, stream = job
        steps = step, step / divisor
        sound = (
            _in_numpy(value, target, *steps, stream)
            if compiled is None
            else _fused(compiled, value, target, *steps, stream)
        )
        if not sound:
            raise PrivacyError(
                f"the clipped sum of `{name}` is not finite or far above its clip norm.",
                code="dp-noise",
                why="noise cannot hide a value without bound",
                fix="this is a fault of the clipping; report it with the model's family",
            )

    if total <= _SLAB:
        for job in jobs:
            run(job)
    else:
        with ThreadPoolExecutor(_threads()) as pool:
            list(pool.map(run, jobs))
    return out


_SLAB = 1 << 20
_WORTH_COMPILING = 1 << 22
"""Values from which on compiling (2.6 s, once in a process) is worth it: it has paid after about fifty rounds."""


def _threads() -> int:
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1, 16))


def _in_numpy(value: np.ndarray, target: np.ndarray, step: float, unit: float, stream: Keystream) -> bool:
    """target = unit * (round(value / step) + noise), in doubles. False if a value is not finite or too large."""
    table, work = alias_table(), _Work()
    for start in range(0, value.shape[0], _CHUNK):
        count = min(_CHUNK, value.shape[0] - start)
        grid = work.value[:count]
        np.multiply(value[start : start + count], 1.0 / step, out=grid, dtype=np.float64)
        np.rint(grid, out=grid)
        if not np.abs(grid).max() < EXACT:  # NaN too
            return False
        grid += _chunk(table, stream, work, count)
        np.multiply(grid, unit, out=target[start : start + count], casting="same_kind")
    return True


def _fused(
    compiled: Kernel, value: np.ndarray, target: np.ndarray, step: float, unit: float, stream: Keystream
) -> bool:
    """The same numbers in one compiled pass."""
    low = alias_table().low
    for start in range(0, value.shape[0], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        (column, fraction, column2, fraction2), spare = _bits(stream, value[chunk].shape[0])
        sound, used = compiled(
            column, fraction, column2, fraction2, spare, low, value[chunk], target[chunk], step, unit
        )
        if used > _TIES:
            raise _broken_stream()
        if not sound:
            return False
    return True
