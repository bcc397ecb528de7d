"""Discrete Gaussian noise on a public grid: exact enough to account for, as fast as ordinary floating-point noise.

Noise drawn and added in floating point leaks: which doubles can come out depends on the secret (Mironov 2012;
arXiv:2107.10138; arXiv:2207.13793). So a clipped sum is first rounded to a grid whose step depends only on public
numbers, and noise on that grid is added (Canonne, Kamath and Steinke 2020). The result is then a vector on a grid
with the privacy of the discrete Gaussian; turning it into float32 afterwards is post-processing.

**The distribution.** N(x) proportional to exp(-x^2 / (2 G^2)) over the numbers halfway between integers,
x = +-(m + 1/2), with G = `GRID_SIGMA`, 2^24. Half a step away from the integers, so that a sign and a size m >= 0 can
be drawn apart. The sizes fall into 8192 buckets of 2^15, a 512th of G each.

**The sampler.** Within a bucket sizes are nearly equally likely. So the distribution is taken apart into two: one
that is constant in every bucket, at the probability of the bucket's last size, and the rest, 0.08 % of the mass. One
look into an alias table with 32 random bits draws the bucket, or says that this value belongs to the rest; 16 more
are the sign and the place in the bucket. For the rest, a second table draws the bucket, and a place in it is
accepted with probability (P(m) - P(last)) / (P(first) - P(last)), half of the time: in double precision, and where
that does not decide, with 256 bits against a hundred digits. The tables' thresholds are integers of 211 bits, of
which a draw looks at 19 and, in one case of 2^19, a tie, at 192 more. So probabilities are right to 2^-200. Sizes
beyond 15.99 G (mass 2^-184) are never drawn.

**What it costs in privacy.** At integer orders the Renyi divergences of the (subsampled) discrete and continuous
Gaussian with shifts by whole steps are equal. And the discrete one is so close to the rounded continuous one
(divergence below 1e-28 a coordinate), a post-processing of what `coterie.dp.accounting.accountant` counts, that no
composition notices.

**What rounding costs.** Two neighbouring sums differ by one record's contribution, norm at most C (1 + eta), before
rounding, and by at most one more step in each of d coordinates after it: sqrt(d) steps. `calibrate` pays for both.
Sums that are integers on the grid already (`coterie.dp.isolation.grid_sums`) are not rounded, and cost nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal, localcontext
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coterie.dp.noise.noise_kernel import EXACT, Kernel, compile_kernel
from coterie.dp.noise.randomness import Keystream, RandomSource
from coterie.dp.threads import run_in_threads
from coterie.errors import PrivacyError
from coterie.models.spread.holdings import HeldPart

COLUMN_BITS = 13
BUCKET = 1 << 15
GRID_SIGMA = 2.0**24
"""Standard deviation of the noise in grid steps."""

LARGEST_NOISE = float(1 << (COLUMN_BITS + 15))
"""No sample is larger in size, in grid steps: 16 standard deviations."""

_COLUMNS = 1 << COLUMN_BITS
_REST = _COLUMNS - 1
"""The column that stands for a draw from the rest; no bucket has its number."""

_FRACTION_BITS = 32 - COLUMN_BITS
_FRACTION = (1 << _FRACTION_BITS) - 1
_TIE_WORDS = 3
_TIE_BITS = 64 * _TIE_WORDS
_THRESHOLD_BITS = _FRACTION_BITS + _TIE_BITS
_PROBABILITY_BITS = COLUMN_BITS + _THRESHOLD_BITS

_VALUE_BYTES = 6
_CHUNK = 1 << 16
_SLAB = 1 << 20
_MOST_OPEN = _SLAB // 256
"""Values of a slab that are drawn from the rest or tie: 820 are expected, and this many never seen."""

_UNSURE = 2.0**-40
"""Far more than the rounding of an acceptance probability in double precision, a few units of 2^-53."""

_TWO_PI = (
    "6.28318530717958647692528676655900576839433879875021164194988918461563281257241799725606965068423413596"
    "429617302656461329418768921910116446345071881625696223490056820540387704221111928924589790986076392"
)

_MAX_GRID_SHARE = 0.1


class AliasTable:
    """Vose's alias method in exact integer arithmetic.

    Args:
        mass: [8192] integers, probabilities times 2^224, which they add up to.

    Attributes:
        packed: [8192] uint32, a column's second value in the upper 13 bits, the upper 19 bits of its threshold in the
            others, so that one look-up fetches both.
        low: [8192, 3] uint64, the remaining bits of every threshold, the highest first.
    """

    def __init__(self, mass: list[int]) -> None:
        mass = list(mass)
        capacity = 1 << _THRESHOLD_BITS
        # A column that is never split points at itself, so its threshold (which would need one more bit) is moot.
        other, threshold = list(range(_COLUMNS)), [capacity - 1] * _COLUMNS
        small = [i for i, m in enumerate(mass) if m < capacity]
        large = [i for i, m in enumerate(mass) if m >= capacity]
        while small and large:
            low, high = small.pop(), large[-1]
            threshold[low], other[low] = mass[low], high
            mass[high] -= capacity - mass[low]
            if mass[high] < capacity:
                small.append(large.pop())
        self.packed = np.array(
            [(o << _FRACTION_BITS) | (t >> _TIE_BITS) for o, t in zip(other, threshold, strict=True)], np.uint32
        )
        rest = b"".join((t & ((1 << _TIE_BITS) - 1)).to_bytes(_TIE_BITS // 8, "big") for t in threshold)
        self.low = np.frombuffer(rest, ">u8").reshape(_COLUMNS, _TIE_WORDS).astype(np.uint64)

    def first(self, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What 32 bits say: the drawn columns [n] uint32, and [n] bool where they do not decide."""
        column, fraction = word >> np.uint32(_FRACTION_BITS), word & np.uint32(_FRACTION)
        pair = np.take(self.packed, column)
        threshold = pair & np.uint32(_FRACTION)
        # Select by masks: `where` would mispredict a branch in every other element.
        mask = np.negative((fraction < threshold).astype(np.uint32))
        second = pair >> np.uint32(_FRACTION_BITS)
        return ((column ^ second) & mask) ^ second, fraction == threshold

    def draw(self, word: np.ndarray, stream: Keystream) -> np.ndarray:
        """[n] drawn columns; ties take 192 bits more of the stream, in their order."""
        drawn, tie = self.first(word)
        places = np.flatnonzero(tie)
        if places.size:
            words = stream.uint64(places.size * _TIE_WORDS).reshape(-1, _TIE_WORDS)
            column = word[places] >> np.uint32(_FRACTION_BITS)
            own = self.own(column, words)
            drawn[places] = np.where(own, column, self.packed[column] >> np.uint32(_FRACTION_BITS))
        return drawn

    def own(self, column: np.ndarray, words: np.ndarray) -> np.ndarray:
        """[k] bool, whether ties [k] fall to their column rather than to its second value.

        Args:
            column: [k] column numbers.
            words: [k, 3] uint64 random bits, the highest first.
        """
        low = self.low[column]
        below: np.ndarray = words[:, -1] < low[:, -1]
        for word in range(_TIE_WORDS - 2, -1, -1):
            below = (words[:, word] < low[:, word]) | ((words[:, word] == low[:, word]) & below)
        return below


def _weights_at(place: Decimal) -> list[int]:
    """exp(-(BUCKET b + place)^2 / (2 G^2)) for every bucket b as fixed-point integers, relative error below 2^-250.

    Neighbouring weights differ by a factor that itself shrinks by a constant factor, so three exponentials suffice.
    """
    bits = 2 * _PROBABILITY_BITS + 64
    with localcontext() as context:
        context.prec = bits // 3 + 20
        double_variance, width = 2 * Decimal(GRID_SIGMA) ** 2, Decimal(BUCKET)
        exponents = -(place**2), -(2 * width * place + width**2), -2 * width**2
        weight, ratio, shrink = (int((e / double_variance).exp() * Decimal(2) ** bits) for e in exponents)
    weights = []
    for _ in range(_COLUMNS):
        weights.append(weight)
        weight = (weight * ratio) >> bits
        ratio = (ratio * shrink) >> bits
    return weights


@functools.cache
def alias_tables() -> tuple[AliasTable, AliasTable]:
    """The tables of the buckets and of the rest, built on first use (about 0.1 s)."""
    first, last = _weights_at(Decimal("0.5")), _weights_at(Decimal(BUCKET) - Decimal("0.5"))
    bits = 2 * _PROBABILITY_BITS + 64
    with localcontext() as context:
        context.prec = bits // 3 + 20
        # All weights of half-integers, of both signs, add up to G sqrt(2 pi), to a part in exp(2 pi^2 G^2).
        total = int(Decimal(GRID_SIGMA) * Decimal(_TWO_PI).sqrt() / 2 * Decimal(2) ** bits)
    buckets = [BUCKET * (weight << _PROBABILITY_BITS) // total for weight in last[:_REST]]
    rest = [a - b for a, b in zip(first[:_REST], last[:_REST], strict=True)]
    mass = sum(rest)
    of_rest = [(weight << _PROBABILITY_BITS) // mass for weight in rest]
    whole = 1 << _PROBABILITY_BITS
    of_rest[0] += whole - sum(of_rest)
    return AliasTable([*buckets, whole - sum(buckets)]), AliasTable([*of_rest, 0])


@functools.cache
def kernel() -> Kernel | None:
    """The compiled pass over the table of the buckets, or None without numba."""
    return compile_kernel(alias_tables()[0].packed, _FRACTION_BITS)


def _doubled(bucket: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """[n] int32, twice the noise: the lowest of 16 bits is the sign, the others the place in the bucket."""
    size = (bucket << np.uint32(16)) | (fine & np.uint16(0xFFFE)) | np.uint32(1)
    sign = np.negative((fine & np.uint16(1)).astype(np.int32))
    doubled: np.ndarray = (size.view(np.int32) ^ sign) - sign
    return doubled


def _settled(word: np.ndarray, stream: Keystream) -> np.ndarray:
    """[k] int32, twice the noise of values whose first bits did not decide; further bits come from the stream."""
    bucket = alias_tables()[0].draw(word, stream)
    fine = stream.read(2 * word.shape[0]).view(np.uint16).copy()
    doubled = _doubled(bucket, fine)
    of_rest = np.flatnonzero(bucket == _REST)
    filled = 0
    while filled < of_rest.shape[0]:
        more = _tries_of_rest(2 * (of_rest.shape[0] - filled) + 32, stream)[: of_rest.shape[0] - filled]
        doubled[of_rest[filled : filled + more.shape[0]]] = more
        filled += more.shape[0]
    return doubled


def _tries_of_rest(count: int, stream: Keystream) -> np.ndarray:
    """Twice the noise of those of ``count`` tries at the rest that are accepted."""
    words = stream.uint64(2 * count).reshape(count, 2)
    bucket = alias_tables()[1].draw((words[:, 0] >> np.uint64(32)).astype(np.uint32), stream)
    fine = (words[:, 0] & np.uint64(0xFFFF)).astype(np.uint16)
    place = (fine >> np.uint16(1)).astype(np.float64)
    # Rounding of the second word to a double, of the quotient and its parts: a few units of 2^-53.
    excess = np.expm1(_energies(bucket, place)) / _most_excess()[bucket] - words[:, 1] * 2.0**-64
    accepted = excess > 0
    for i in np.flatnonzero(np.abs(excess) < _UNSURE):
        accepted[i] = _accepted_exactly(int(bucket[i]), int(place[i]), int(words[i, 1]), stream)
    taken: np.ndarray = _doubled(bucket, fine)[accepted]
    return taken


def _energies(bucket: np.ndarray, place: np.ndarray | float) -> np.ndarray:
    """log(P(m) / P(last)), m at ``place`` of its bucket: exact, the numbers are integers below 2^53."""
    energies: np.ndarray = (BUCKET - 1 - place) * (2.0 * BUCKET * bucket + place + BUCKET) / (2 * GRID_SIGMA**2)
    return energies


@functools.cache
def _most_excess() -> np.ndarray:
    """[8192] float64, P(first) / P(last) - 1 of every bucket."""
    most: np.ndarray = np.expm1(_energies(np.arange(_COLUMNS), 0.0))
    return most


def _accepted_exactly(bucket: int, place: int, word: int, stream: Keystream) -> bool:
    """`_tries_of_rest` for one try, with 192 bits more and a hundred digits."""
    with localcontext() as context:
        context.prec = 100
        bits = (word << _TIE_BITS) + stream.integer(_TIE_BITS)
        energy, whole = (
            Decimal((BUCKET - 1 - at) * (2 * BUCKET * bucket + at + BUCKET)) / (2 * Decimal(GRID_SIGMA) ** 2)
            for at in (place, 0)
        )
        return bool(Decimal(bits) / 2 ** (64 + _TIE_BITS) < (energy.exp() - 1) / (whole.exp() - 1))


def discrete_gaussian(count: int, stream: Keystream) -> np.ndarray:
    """[count] float64 samples with standard deviation `GRID_SIGMA`, halfway between integers."""
    target = np.zeros(count, np.float64)
    for start in range(0, count, _SLAB):
        _pass(target[start : start + _SLAB], target[start : start + _SLAB], 1.0, 1.0, stream, None)
    return target


def _bits(stream: Keystream, count: int) -> tuple[np.ndarray, np.ndarray]:
    """[count] uint32 and [count] uint16 random bits, valid until the next read."""
    read = stream.read(_VALUE_BYTES * count)
    return read[: 4 * count].view(np.uint32), read[4 * count :].view(np.uint16)


def _broken_stream() -> PrivacyError:
    return PrivacyError(
        "the random numbers for the noise are not random.",
        code="dp-noise",
        why=f"that more than {_MOST_OPEN} of {_SLAB} draws need more bits happens to sound ones never",
        fix="look whether the `cryptography` package works on this machine",
    )


def calibrate(noise_multiplier: float, bound: float, num_values: int) -> float:
    """Standard deviation of the noise that gives ``noise_multiplier`` for what is really added up and rounded.

    Solves ``std = noise_multiplier * (bound + sqrt(num_values) * step)`` with ``step = std / GRID_SIGMA``: what one
    unit moves the clipped sum by, and what rounding to the grid adds to that.

    Args:
        noise_multiplier: sigma that the accountant was given.
        bound: largest contribution of one unit, floating-point slack included: C (1 + eta).
        num_values: d, numbers released together under this bound; 0 for sums that are integers on the grid.

    Raises:
        PrivacyError: so many values that the grid would be too coarse (about 3e12 / sigma^2).
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
    as_integers: bool = False,
) -> dict[str, Tensor]:
    """Each clipped sum rounded to the grid, plus discrete Gaussian noise of standard deviation ``std``.

    Args:
        sums: tensors by name, any device and shape: floating point, or int64 in steps of ``std`` over `GRID_SIGMA`.
        std: noise standard deviation, one for all or one per name, in the unit of the sums; see `calibrate`.
        source: a private run passes `SystemRandom`.
        purpose: names the streams of a seeded source; must differ from round to round.
        in_place: write the result over sums that are contiguous float32 on the CPU, which saves their size in
            memory; after an error they are spoilt. Otherwise they are not changed.
        divisor: a public number that the noised sum is divided by, in the same pass.
        as_integers: leave the result on the grid, exact, in place of rounding it to float32; ``divisor`` is not used.

    Returns:
        float32 CPU tensors of the same names and shapes; with ``as_integers`` int64 ones in half steps of the grid,
        ``std / GRID_SIGMA / 2`` each, as the noise lies between whole ones.

    Raises:
        PrivacyError: a sum is not finite or std is not positive (code dp-noise).

    Cost of a value: with numba 2.3 ns on one thread and 1.6 on two, without 10 on either; buffers of 1 MB a thread.
    """
    slabs = Slabs(sums, std, in_place=in_place, as_integers=as_integers)
    slabs.add_noise(sums, source, purpose, divisor)
    return slabs.noised


class Slabs:
    """A lot's sums, cut into pieces that each get noise from a stream of its own, numbered.

    Which value lies in which slab follows from names, sizes and standard deviations alone. So ranks can share the
    sums out, and with a seeded source the noise is that of one process. Where a slab has values of several ranks,
    each draws its stream and takes the noise of its own values: every value has one rank that noises it.

    Args:
        sums, std, in_place, as_integers: as for `add_noise`.
        held: the sums of which ``sums`` has a part, by name.

    Attributes:
        noised: where noised sums go, float32 or int64 on the CPU, by name.

    Raises:
        PrivacyError: std is not positive (code dp-noise).
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        std: float | Mapping[str, float],
        held: Mapping[str, HeldPart] = MappingProxyType({}),
        *,
        in_place: bool = False,
        as_integers: bool = False,
    ) -> None:
        self._as_integers, self._held = as_integers, held
        written = torch.int64 if as_integers else torch.float32
        self.noised: dict[str, Tensor] = {}
        slices: list[_Slice] = []
        for name in sorted(sums):
            scale = std if isinstance(std, int | float) else std[name]
            if not (scale > 0 and math.isfinite(scale)):
                raise PrivacyError(
                    f"the noise of `{name}` has standard deviation {scale}.",
                    code="dp-noise",
                    why="without noise what is released is not private",
                    fix="every trainable parameter needs a positive clip norm and noise multiplier",
                )
            counted = sums[name].dtype == torch.int64
            plain = sums[name].detach().to("cpu", torch.int64 if counted else torch.float32).contiguous()
            owned = not counted and not as_integers and (in_place or plain.data_ptr() != sums[name].data_ptr())
            self.noised[name] = plain if owned else torch.empty_like(plain, dtype=written)
            value, target = plain.view(-1).numpy(), self.noised[name].view(-1).numpy()
            step = scale / GRID_SIGMA
            unit = 1.0 if counted else step
            part = held.get(name)
            for start in range(0, value.shape[0] if part is None else part.total, _SLAB):
                stop = min(start + _SLAB, value.shape[0] if part is None else part.total)
                places, own = (None, slice(start, stop)) if part is None else _within(part.places, start, stop)
                slices.append(_Slice(name, value[own], target[own], unit, step, stop - start, places))
        self._slabs = _slabs(slices)
        self._values = sum(each.size for each in slices)

    def sums(self, names: Iterable[str]) -> list[Tensor]:
        """Some sums before noise, as views, one for each piece."""
        return [torch.from_numpy(each.value) for each in self._pieces(names)]

    def in_steps(self, names: Iterable[str]) -> list[np.ndarray]:
        """Some sums before noise, as float64 copies in steps of the grid, one for each piece."""
        return [each.value.astype(np.float64) / each.step for each in self._pieces(names)]

    def replace(self, names: Iterable[str], steps: list[np.ndarray]) -> None:
        """Others in place of some sums: float64, in steps of the grid, in the order of `in_steps`.

        The rest may not be noised any more.
        """
        values, replaced = iter(steps), set(names)
        for slab in self._slabs:
            for place, each in enumerate(slab):
                value = next(values) if each.name in replaced and each.value.shape[0] else each.value
                slab[place] = each._replace(value=value, step=1.0)

    def released_steps(self, names: Iterable[str], divisor: float) -> list[np.ndarray]:
        """What stands in the targets of some sums, times what it was divided by, as `in_steps`."""
        return [each.target.astype(np.float64) * (divisor / each.unit) for each in self._pieces(names)]

    def targets(self, names: Iterable[str]) -> list[Tensor]:
        """Where some noised sums go, as views, in the same pieces as `sums`."""
        return [torch.from_numpy(each.target) for each in self._pieces(names)]

    def parts(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What a rank that owns some sums puts on disk, by the names that these have there."""
        return {self._held[name].key if name in self._held else name: self.noised[name] for name in names}

    def add_noise(self, names: Iterable[str], source: RandomSource, purpose: str, divisor: float = 1.0) -> None:
        """Round and noise some sums.

        See `add_noise` for the arguments and what is raised.
        """
        compiled, noised = kernel() if self._values >= _WORTH_COMPILING else None, set(names)
        jobs = []
        for number, slab in enumerate(self._slabs):
            own = [_placed(each, each.name in noised) for each in slab]
            if any(each.value.shape[0] for each in own):
                jobs.append((own, source.stream(f"{purpose}|{number}")))
        over = None if self._as_integers else divisor
        run_in_threads(lambda job: _noise_slab(job[0], over, job[1], compiled), jobs)

    def let_go(self, names: Iterable[str]) -> None:
        """Forget some sums, and where their noised ones go: another rank has the one and will have the other."""
        gone = set(names)
        self._slabs = [
            [each.without_values() if each.name in gone else each for each in slab] for slab in self._slabs
        ]
        for name in gone:
            del self.noised[name]

    def keep_noised(self, names: Iterable[str]) -> None:
        """Let go of everything but some noised sums; those that others own are not a number until they are set."""
        self._slabs = [[each._replace(value=each.target) for each in slab] for slab in self._slabs]
        for name in self.noised.keys() - set(names):
            self.noised[name].fill_(-(2**62) if self._as_integers else math.nan)

    def _pieces(self, names: Iterable[str]) -> Iterator[_Slice]:
        chosen = set(names)
        return (each for slab in self._slabs for each in slab if each.name in chosen and each.value.shape[0])


class _Slice(NamedTuple):
    """Values of one sum, at most `_SLAB`, and where their noised ones go.

    ``unit`` is the step of the grid, ``step`` the same in the unit of the values: 1 where these are integers.
    ``size`` is how many values there are at all ranks, and ``places`` where among them these are; None: here are all.
    """

    name: str
    value: np.ndarray
    target: np.ndarray
    step: float
    unit: float
    size: int
    places: slice | np.ndarray | None

    def without_values(self) -> _Slice:
        """The same, of whose values none are here; nothing holds on to those that were."""
        value, target = (np.empty(0, each.dtype) for each in (self.value, self.target))
        return self._replace(value=value, target=target, places=slice(0, 0))


def _within(places: range | Tensor, start: int, stop: int) -> tuple[slice | np.ndarray, slice]:
    """The held ones of the values from ``start`` to ``stop``: their places there, their numbers among all held."""
    if isinstance(places, range):
        first, last = max(places.start, start), min(places.stop, stop)
        last = max(first, last)
        return slice(first - start, last - start), slice(first - places.start, last - places.start)
    numbers = np.searchsorted(places.numpy(), [start, stop]).tolist()
    return places.numpy()[slice(*numbers)] - start, slice(*numbers)


def _placed(each: _Slice, noised: bool) -> _Slice:
    """What of a slice is noised here, with its places: all that is here, or nothing."""
    if noised:
        return each if each.places is not None else each._replace(places=slice(0, each.size))
    nothing = slice(0, 0)
    return each._replace(value=each.value[nothing], target=each.target[nothing], places=nothing)


def _slabs(slices: list[_Slice]) -> list[list[_Slice]]:
    """Pieces that are drawn together: with the same step, and at most `_SLAB` values."""
    slabs: list[list[_Slice]] = []
    last: dict[tuple[float, float], list[_Slice]] = {}
    for each in slices:
        slab = last.get((each.step, each.unit))
        if slab is None or sum(other.size for other in slab) + each.size > _SLAB:
            slab = last[each.step, each.unit] = []
            slabs.append(slab)
        slab.append(each)
    return slabs


def _noise_slab(slab: list[_Slice], divisor: float | None, stream: Keystream, compiled: Kernel | None) -> None:
    """Noise values that are drawn together; without a divisor, write them as whole numbers of half steps."""
    step = slab[0].step
    unit = 2.0 if divisor is None else slab[0].unit / divisor
    value = next(each.value for each in slab if each.value.shape[0])
    target = slab[0].target
    whole = len(slab) == 1 and value.shape[0] == slab[0].size
    if not whole:
        value = np.zeros(sum(each.size for each in slab), value.dtype)
        target = np.empty(value.shape[0], target.dtype)
        for each, part in zip(slab, _split(value, slab), strict=True):
            part[each.places] = each.value
    if not _pass(value, target, step, unit, stream, compiled):
        name = next(each.name for each in slab if not _sound(each.value, step))
        raise PrivacyError(
            f"the clipped sum of `{name}` is not finite or far above its clip norm.",
            code="dp-noise",
            why="noise cannot hide a value without bound",
            fix="this is a fault of the clipping; report it with the model's family",
        )
    if not whole:
        for each, part in zip(slab, _split(target, slab), strict=True):
            each.target[:] = part[each.places]


def _split(values: np.ndarray, slab: list[_Slice]) -> list[np.ndarray]:
    """The pieces of a slab, as views."""
    return np.split(values, np.cumsum([each.size for each in slab])[:-1])


def _sound(value: np.ndarray, step: float) -> bool:
    return bool((np.abs(np.rint(value * np.float64(1.0 / step))) < EXACT).all())


_WORTH_COMPILING = 1 << 22
"""Values from which on compiling (2 s, once in a process) is worth it: it has paid after about fifty rounds."""


def _pass(
    value: np.ndarray, target: np.ndarray, step: float, unit: float, stream: Keystream, compiled: Kernel | None
) -> bool:
    """``target = unit * (round(value / step) + noise)`` for a slab. False if a value is not finite or too large."""
    places = np.empty(_MOST_OPEN, np.int32)
    words, kept = np.empty(_MOST_OPEN, np.uint32), np.empty(_MOST_OPEN, value.dtype)
    found = 0
    for start in range(0, value.shape[0], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        word, fine = _bits(stream, value[chunk].shape[0])
        parts = word, fine, value[chunk], target[chunk], step, unit, start, places, words, kept, found
        found = _in_numpy(*parts) if compiled is None else compiled(*parts)
        if found < 0:
            if _sound(value[chunk], step):
                raise _broken_stream()
            return False
    if found:
        places, doubled = places[:found], _settled(words[:found], stream)
        number = np.rint(kept[:found] * np.float64(1.0 / step))
        target[places] = (number + 0.5 * doubled) * unit
    return True


def _in_numpy(  # noqa: PLR0913 - numbers and arrays, as the compiled pass takes them
    word: np.ndarray, fine: np.ndarray, value: np.ndarray, target: np.ndarray, step: float, unit: float, start: int,
    places: np.ndarray, words: np.ndarray, kept: np.ndarray, found: int,
) -> int:  # fmt: skip
    """What the compiled pass does."""
    bucket, is_open = alias_tables()[0].first(word)
    is_open |= bucket == _REST
    undecided = np.flatnonzero(is_open)
    stop = found + undecided.shape[0]
    number = np.rint(value * np.float64(1.0 / step))
    if not np.abs(number).max() < EXACT or stop > places.shape[0]:  # NaN too
        return -1
    places[found:stop], words[found:stop], kept[found:stop] = start + undecided, word[undecided], value[undecided]
    target[:] = (number + 0.5 * _doubled(bucket, fine)) * unit
    return stop
