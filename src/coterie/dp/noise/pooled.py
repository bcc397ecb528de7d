"""Noise of several parties in one sum: how much each adds, and how much others do not know.

Where the parties' pushes are masked, everything that others see of one party is a sum with all parties' noise. Each
can then add its whole noise, and be protected better than it promised; or only a share of it, so that all shares
together are the noise that was promised, against so many others as may pool what they know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from coterie.errors import PrivacyError

CONTRIBUTORS = "contributors"
"""The pin of a release that names the parties whose noise lies in the sum that it goes into."""


def contributors_in(pins: Mapping[str, str]) -> tuple[str, ...]:
    """The parties that a release's pins name; none where it goes into no masked sum."""
    return tuple(pins[CONTRIBUTORS].split(",")) if CONTRIBUTORS in pins else ()


def fewest_parties(colluding: int | None) -> int:
    """How many have to contribute to a masked sum, so that more than those who may pool what they know do."""
    return 1 + (colluding or 1)


@dataclass(frozen=True)
class PooledNoise:
    """Whose noise lies in everything that others see of a run.

    Attributes:
        parties: n that contribute, this one included; each adds the same.
        colluding: t, where each adds only its share: so many of the others may pool what they know, or lack their
            noise, or have it known to others. None: each adds its whole noise.

    Raises:
        PrivacyError: so many may pool what they know that nobody's noise need be left.
    """

    parties: int
    colluding: int | None = None

    def __post_init__(self) -> None:
        if self.colluding is not None and self.colluding >= self.parties:
            raise PrivacyError(
                f"{self.parties} parties cannot share their noise where {self.colluding} may pool what they know.",
                code="dp-pooled",
                why="against so many others nobody's noise need be left",
                fix="agree on a smaller `colluding`, or on `noise: whole`",
            )

    def among(self, parties: int) -> PooledNoise:
        """The same promise in a round to which so many parties contribute."""
        return replace(self, parties=parties)

    @property
    def share(self) -> float:
        """What this party adds, over the promised noise: 1 / sqrt(n - t)."""
        return 1.0 if self.colluding is None else 1 / math.sqrt(self.parties - self.colluding)

    def unknown(self, others: int) -> float:
        """The noise that ``others`` who pool what they know do not know, over the promised noise.

        Some of them may have contributed nothing; that leaves no less.

        The sum of m discrete Gaussians of standard deviation s on one grid is accounted as one of s sqrt(m). It
        differs from that by at most 10 sum_{k < m} exp(-2 pi^2 s^2 k / (k + 1)) in the logarithm of every probability
        (arXiv:2102.06387, with s in grid steps): with s = 2^24 far less than any number a computer holds.
        """
        return math.sqrt(max(self.parties - others, 1)) * self.share

    @property
    def worth_saying(self) -> tuple[int, ...]:
        """Numbers of others whose pooled knowledge a statement speaks of beside the promise."""
        return (1,) if self.colluding is None else tuple(range(self.colluding + 1, self.parties))

    def to_json(self) -> dict[str, Any]:
        return {"parties": self.parties, "colluding": self.colluding}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any] | None) -> PooledNoise | None:
        """What `to_json` gave; None where a run's noise is its own."""
        return None if facts is None else cls(int(facts["parties"]), facts["colluding"])


def restriction(facts: Mapping[str, Any]) -> str:
    """Against whom alone a run's promise holds, by its ledger entry, in words; empty where it is everybody."""
    pooled = PooledNoise.from_json(facts.get("pooled"))
    if pooled is None or pooled.colluding is None:
        return ""
    return (
        f"with noise shared by {pooled.parties} parties: against any {pooled.colluding} of the {pooled.parties - 1} "
        "others together, not against all"
    )
