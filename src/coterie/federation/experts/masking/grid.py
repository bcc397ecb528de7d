"""The integers that are masked: what one step is worth, how large they may be, how many bytes one takes.

Everything here follows from public numbers, and every party puts the digest of it into the agreement on keys: parties
with another step or another width share no key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.errors import ConfigError, RoundError

MOST_BYTES = 7
"""Of an integer on the wire; sums in the signed 64 bits of a tensor never wrap then."""

_LARGEST_FLOAT = float(torch.finfo(torch.float32).max)
_FEWEST = 64
"""Values of a tensor that show whether masks are left in it; of fewer, chance could look so."""

_BEYOND = 2.0**62
"""No integer of a grid is so large; and a conversion to 64 bits is defined up to here."""


@dataclass(frozen=True)
class GridScale:
    """The grid of some tensors.

    Attributes:
        step: what the integer 1 is worth.
        largest: size of an integer that no honest push of one party exceeds.
    """

    step: float
    largest: int


@dataclass(frozen=True)
class MaskGrid:
    """The grid that all parties' pushes lie on.

    Attributes:
        parties: how many add up.
        rest: of all tensors that are not named.
        named: of those that are.
        secret: noise comes from secret randomness; parties with a seed only add up among themselves.

    Raises:
        ConfigError: integers so large that their sum takes more than `MOST_BYTES`.
    """

    parties: int
    rest: GridScale
    named: Mapping[str, GridScale] = field(default_factory=dict)
    secret: bool = True

    def __post_init__(self) -> None:
        if self.width > MOST_BYTES:
            raise ConfigError(
                f"A masked sum would take {self.width} bytes a value; {MOST_BYTES} are possible.",
                code="mask-too-wide",
                why="lot size over noise, or the largest push over its step, is too much for the grid",
                fix="choose a smaller `privacy.lot_size`, or without privacy a smaller `push_limit`",
            )

    @property
    def width(self) -> int:
        """Bytes of an integer on the wire: the sum of all parties' largest fits, with its sign."""
        largest = max(scale.largest for scale in (self.rest, *self.named.values()))
        return -(-(1 + (self.parties * largest).bit_length()) // 8)

    def scale(self, name: str) -> GridScale:
        return self.named.get(name, self.rest)

    def digest(self) -> str:
        """Hex SHA-256; the same at parties that can add up."""
        content = {name: (step, largest) for name, step, largest in self._scales()}
        return hashlib.sha256(json.dumps([self.parties, content, self.secret], sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """With every step exact."""
        return {"parties": self.parties, "scales": self._scales(), "secret": self.secret}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> MaskGrid:
        """What `to_json` gave.

        Raises:
            ValueError, TypeError, KeyError, OverflowError: it is something else.
            ConfigError: see `MaskGrid`.
        """
        scales, parties = {}, saved["parties"]
        for name, step, largest in saved["scales"]:
            if not isinstance(name, str) or type(largest) is not int or type(parties) is not int:
                raise TypeError("a name or number that is none")
            scales[name] = GridScale(float.fromhex(step), largest)
        for scale in scales.values():
            if not (scale.largest > 0 and 0 < scale.step * scale.largest * parties < _LARGEST_FLOAT):
                raise ValueError("a step or a largest integer that no sum has")
        return cls(parties, scales.pop(""), scales, bool(saved["secret"]))

    def _scales(self) -> list[list[Any]]:
        return [[name, each.step.hex(), each.largest] for name, each in {"": self.rest, **self.named}.items()]

    def check_own(self, name: str, integers: Tensor, where: str) -> None:
        """What no honest push holds does not leave.

        Raises:
            RoundError: ``run-diverged``.
        """
        if _size(integers) > self.scale(name).largest:
            raise RoundError(
                f"training has diverged: this party's sums of {name} are beyond what was agreed.",
                code="run-diverged",
                where=where,
                why="masked with the others' they would ruin what all share, and nobody could tell whose they were",
                fix="go on from the newest checkpoint with a lower `optim.lr` or more warm-up; without privacy, "
                "agree on a larger `push_limit` where the model honestly has such sums",
            )

    def values(self, name: str, total: Tensor, where: str) -> Tensor:
        """The sum of all parties, int64, as float32 numbers.

        Raises:
            RoundError: ``sum-wild``: no honest parties' sum is so large.
        """
        scale = self.scale(name)
        size = _size(total)
        if size > self.parties * scale.largest or (size > self._quarter and self._looks_random(total)):
            raise RoundError(
                f"the sum of all parties' masked pushes of {name} is nothing that honest ones add up to.",
                code="sum-wild",
                where=where,
                why="a party pushed something else than it masked, or far too large values; masks hide which one",
                fix="nothing was applied; all parties check their machines, and that they run the same version",
            )
        return total.to(torch.float64).mul_(scale.step).to(torch.float32)

    @property
    def _quarter(self) -> int:
        """Of the largest integer that the bytes hold."""
        return 1 << (8 * self.width - 3)

    def _looks_random(self, total: Tensor) -> bool:
        """Whether masks are left in a sum: of random integers three in four lie beyond a quarter of what the bytes
        hold, and of parties' sums hardly one, whatever bound was agreed."""
        if total.numel() < _FEWEST:
            return False
        beyond = (total.abs() > self._quarter).sum()
        return 2 * int(beyond) > total.numel()

    def round(self, name: str, values: Tensor) -> Tensor:
        """Floating-point values, without noise, as integers of the grid, int64; what is no number, or far beyond it,
        as one that `check_own` refuses."""
        steps = torch.round(values.detach().to("cpu", torch.float64) / self.scale(name).step)
        return steps.nan_to_num(nan=_BEYOND).clamp(-_BEYOND, _BEYOND).to(torch.int64)


def _size(integers: Tensor) -> int:
    if integers.numel() == 0:
        return 0
    low, high = torch.aminmax(integers)
    return max(-int(low), int(high))


def narrow(integers: np.ndarray, width: int) -> np.ndarray:
    """The lowest ``width`` bytes of [V] 64-bit integers, little-endian: [V * width] uint8."""
    wide = np.ascontiguousarray(integers).astype("<u8", copy=False)
    packed, start = np.empty(wide.shape[0] * width, np.uint8), 0
    for size in (4, 2, 1):  # at once as many as a machine word has; numpy takes a byte at a time otherwise
        if width & size:
            word = np.dtype(f"<u{size}")
            pieces = wide.view(word)[start // size :: 8 // size].copy()  # contiguous, they are written faster
            np.ndarray(wide.shape, word, packed, offset=start, strides=(width,))[...] = pieces
            start += size
    return packed


def overlapping(packed: np.ndarray, width: int) -> np.ndarray:
    """[V] uint64 to be read, whose lowest ``width`` bytes are integers that `narrow` gave: a view, not a copy.

    The upper bytes are those of the integers that follow, and mean nothing modulo 2^(8 width).

    Args:
        packed: uint8 [V * width + 8 - width], contiguous; the last 8 - width bytes may be anything.
        width: bytes of one integer.
    """
    return np.ndarray(((packed.shape[0] - 8) // width + 1,), "<u8", packed, strides=(width,))


def widen(packed: np.ndarray, width: int) -> np.ndarray:
    """[V] uint64 of what `narrow` gave; the upper bytes are zero."""
    padded = np.zeros(packed.shape[0] + 8 - width, np.uint8)
    padded[: packed.shape[0]] = packed
    return overlapping(padded, width) & np.uint64((1 << 8 * width) - 1)


def signed(wrapped: np.ndarray, width: int) -> np.ndarray:
    """[V] int64: numbers modulo 2^(8 width) as those from -2^(8 width - 1) on."""
    unused = np.uint64(64 - 8 * width)
    shifted: np.ndarray = (wrapped << unused).view(np.int64) >> np.int64(unused)
    return shifted


def grids_digest(grids: Iterable[MaskGrid]) -> str:
    """One digest for the grids of every number of parties that may contribute."""
    return hashlib.sha256("|".join(["grids", *(grid.digest() for grid in grids)]).encode()).hexdigest()
