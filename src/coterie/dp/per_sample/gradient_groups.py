"""Gradient groups: which parameters are clipped together, at which threshold, and by which factors.

Shape letters: B records of a physical batch, G gradient groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.dp.clipping import Clipping, bounded_factors, checked_thresholds
from coterie.dp.per_sample.gram import SqNorms
from coterie.dp.per_sample.scaling import SMALLEST, UNSEEN


@dataclass(frozen=True)
class Diagnostics:
    """What one physical batch looked like. For the owner's eyes only: none of it is private.

    Attributes:
        losses: [B] float32.
        norms: [B] float64, norm of each record's whole gradient.
        group_norms: [G, B] float64.
        within: [G, B] bool, norm at or below the group's threshold; released only as a noised, centred sum.
        masked: [B] bool, records that were not finite, or beyond 2^126 thresholds, and contribute zero.
    """

    losses: Tensor
    norms: Tensor
    group_norms: Tensor
    within: Tensor
    masked: Tensor

    def first(self, records: int) -> Diagnostics:
        """Those of the first records: later rows only filled up the batch."""
        return self.part(slice(0, records))

    def part(self, columns: slice) -> Diagnostics:
        """Those of some records."""
        return Diagnostics(
            self.losses[columns],
            self.norms[columns],
            self.group_norms[:, columns],
            self.within[:, columns],
            self.masked[columns],
        )


class GradientGroups:
    """The groups of a clipping policy.

    Args:
        parameters: names of all that is trained.
        clipping: assigns groups and thresholds, and turns norms into factors.

    Attributes:
        names: the groups, in the order of ``thresholds``.
        thresholds: [G] float64 clip norms; adaptive clipping replaces them between rounds.
    """

    def __init__(self, parameters: Iterable[str], clipping: Clipping) -> None:
        self._clipping = clipping
        self._group_of = {name: clipping.group_of(name) for name in parameters}
        self.names = list(dict.fromkeys(self._group_of.values()))
        self.thresholds = clipping.thresholds(list(self.names))

    @property
    def thresholds(self) -> Tensor:
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds_G: Tensor) -> None:
        self._thresholds = checked_thresholds(thresholds_G, len(self.names))

    def of(self, name: str) -> str:
        """The group of a parameter, as the policy said when the groups were made."""
        return self._group_of[name]

    def index(self, name: str) -> int:
        """The place of a parameter's group in ``thresholds``."""
        return self.names.index(self._group_of[name])

    def bound(self) -> float:
        """The norm that no record's clipped gradient exceeds, rounding aside."""
        return float(self.thresholds.square().sum().sqrt())

    def factors(
        self, squares: SqNorms, losses: Tensor, counted_B: Tensor | None = None, ranks: int = 1
    ) -> tuple[Tensor, Diagnostics]:
        """[G, B] float64 factors: zero for records that are not finite, and for rows that do not count.

        Args:
            squares: of the parts of all parameters in each group.
            losses: [B].
            counted_B: rows that are records; None: all.
            ranks: at how many of them a parameter has parts, each of which may have lost something to underflow.
        """
        upper = (squares.upper + UNSEEN * len(self._group_of) * ranks).sqrt()
        finite = (SMALLEST * upper <= self.thresholds[:, None]).all(0) & torch.isfinite(losses.cpu())
        norms = squares.value.sqrt()
        factors = bounded_factors(self._clipping, torch.where(finite, upper, 1.0), self.thresholds)
        factors = torch.where(finite, factors, 0.0)
        if counted_B is not None:
            factors[:, ~counted_B] = 0.0
        within = (norms <= self.thresholds[:, None]) & finite
        total = squares.value.sum(0).sqrt()
        return factors, Diagnostics(losses.cpu(), total, norms, within, ~finite)
