"""Parties that die in the middle of a round."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.training.data.packing import Batch, Sequences


class Killed(BaseException):
    """The end of a process that nobody expected."""


class Deadly(Sequences):
    """Text whose reading in a certain round kills the process."""

    last = 2

    def batch(self, rows: Sequence[int]) -> Batch:
        if self.last == 0:
            raise Killed
        object.__setattr__(self, "last", self.last - 1)
        return super().batch(rows)
