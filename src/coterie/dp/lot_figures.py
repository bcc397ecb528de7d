"""What a lot looked like: for its owner alone, never released."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.dp.accounting.lots import Lot
from coterie.dp.per_sample.gradient_groups import Diagnostics


@dataclass(frozen=True)
class RoundFigures:
    """What a round looked like. For the owner's eyes: NOT private, and never to leave the party.

    Attributes:
        round: its number.
        drawn: records drawn into the lot; not the public `lot_size` that sums are divided by.
        loss: mean loss of the records that were finite; NaN where there is none, see `nothing_learnt`.
        clipped: share of units whose gradient was clipped.
        masked: records that were not finite and contributed zero.
    """

    round: int
    drawn: int
    loss: float
    clipped: float
    masked: int

    @property
    def nothing_learnt(self) -> str | None:
        """Why the round's gradient was noise alone, for the owner's eyes; None where it was not."""
        if self.drawn == 0:
            return "the lot was empty"
        if math.isnan(self.loss):
            return f"none of the lot's {self.drawn} records gave a finite loss and gradient"
        return None


class LotFigures:
    """Adds up what the physical batches of one lot looked like.

    Attributes:
        within: of each batch, [B, G]: half for a record whose gradient was within its group's threshold, minus half
            for one that was clipped; released only as a noised sum.
    """

    def __init__(self) -> None:
        self.within: list[Tensor] = []
        self._losses: list[float] = []
        self._masked = self._clipped = 0

    def add(self, diagnostics: Diagnostics) -> None:
        """Take in one batch; records that were masked count as such and nowhere else."""
        usable = ~diagnostics.masked
        self._losses += diagnostics.losses[usable].tolist()
        self.within.append(torch.where(usable, diagnostics.within.double() - 0.5, 0.0).T)
        self._clipped += int((usable & ~diagnostics.within.all(0)).sum())
        self._masked += int(diagnostics.masked.sum())

    def to_json(self) -> dict[str, Any]:
        """What figures of several ranks are made from."""
        count, loss = len(self._losses), math.fsum(self._losses)
        return {"count": count, "loss": loss, "clipped": self._clipped, "masked": self._masked}


def joined(lot: Lot, ranks: Sequence[Mapping[str, Any]]) -> RoundFigures:
    """The figures of a whole lot, from those of its parts."""
    count, clipped, masked = (sum(each[name] for each in ranks) for name in ("count", "clipped", "masked"))
    mean = math.fsum(each["loss"] for each in ranks) / count if count else math.nan
    return RoundFigures(lot.round, len(lot), mean, clipped / max(count, 1), masked)
