"""The sums that an adversary can open, and what the spectrum of one says about who is in it.

An expert's sum is ``sum_t x_t g_t^T`` over the tokens that chose the expert: its column space holds nothing but their
hidden vectors. With fewer tokens than the width that rules out almost every other vector; with more, directions in
which the sum is small are still directions that its tokens avoid. `Spectrum.outside` measures both, with noise as the
floor below which no direction counts.

Shape letters: I inputs, O outputs of a matrix; R rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_ROUNDING = 3e-6
"""Of sums in float32, over the largest singular value: what other orders of adding up change."""
_SMALLEST = 1e-12
"""Share outside that counts as none."""


class Spectrum:
    """The column space of one matrix ``S [I, O]``.

    Args:
        sum_IO: the opened sum.
        noise: standard deviation of what was added to each value.
        rounding: standard deviation of each value's rounding over the value.
    """

    def __init__(self, sum_IO: Tensor, noise: float = 0.0, rounding: float = 0.0) -> None:
        left, size, right = torch.linalg.svd(sum_IO.double(), full_matrices=False)
        largest = float(size[0])
        each = math.hypot(noise, rounding * float(sum_IO.double().square().mean().sqrt()))
        self.empty = largest == 0.0
        self.floor = max(each * (math.sqrt(sum_IO.shape[0]) + math.sqrt(sum_IO.shape[1])), _ROUNDING * largest)
        self._left, self._size, self._right = left, size, right
        self._kept = self.floor**2 / (size.square() + self.floor**2) if not self.empty else torch.ones_like(size)

    @property
    def rank(self) -> int:
        """Directions that stand out of the floor."""
        return 0 if self.empty else int((self._size > self.floor).sum())

    def outside(self, rows_RI: Tensor) -> Tensor:
        """[R] log share of each row's square that the sum does not explain: near 0 for others, far below for
        tokens of the sum."""
        rows = rows_RI.double()
        along = (rows @ self._left).square()
        whole = rows.square().sum(1).clamp_min(1e-300)
        rest = (whole - along.sum(1)).clamp_min(0.0) + along @ self._kept
        share_R: Tensor = (rest / whole).clamp_min(_SMALLEST).log()
        return share_R.float()

    def matched(self, rows_RI: Tensor, gradients_RO: Tensor) -> Tensor:
        """[R] how much of each outer product is in the sum: exactly 1 for each of the sum's own, while both their
        rows and their gradients are independent; on average rank over number of rows after that."""
        if self.empty:
            return torch.zeros(len(rows_RI))
        inverse = self._size / (self._size.square() + self.floor**2)
        left = (rows_RI.double() @ self._left) * inverse
        held_R: Tensor = (left * (gradients_RO.double() @ self._right.T)).sum(1)
        return held_R.float()


@dataclass(frozen=True)
class ExpertSum:
    """One expert's part of a push, [inputs, outputs] whatever the family's storage.

    Attributes:
        first_DG, second_FD: of the two projections.
        noise: see `Spectrum`.
        rounding: see `Spectrum`.
    """

    first_DG: Tensor
    second_FD: Tensor
    noise: float = 0.0
    rounding: float = 0.0

    @cached_property
    def first(self) -> Spectrum:
        return Spectrum(self.first_DG, self.noise, self.rounding)

    @cached_property
    def second(self) -> Spectrum:
        return Spectrum(self.second_FD, self.noise, self.rounding)


@dataclass(frozen=True)
class Opened:
    """The sums of one push that one adversary can open.

    Attributes:
        experts: by (layer, expert).
        trunk: by parameter name.
        noise: standard deviation of what was added to each value; 0 where nothing was.
    """

    experts: Mapping[tuple[int, int], ExpertSum]
    trunk: Mapping[str, Tensor] = field(default_factory=dict)
    noise: float = 0.0
