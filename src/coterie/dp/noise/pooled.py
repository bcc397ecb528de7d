"""Noise of several parties in one sum: how much each adds, and how much others do not know.

Where the parties' pushes are masked, everything that others see of one party is a sum with all parties' noise. Each
can then add its whole noise, and be protected better than it promised; or only a share of it, so that all shares
together are the noise that was promised, against so many others as may pool what they know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PooledNoise:
    """Whose noise lies in everything that others see of a run.

    Attributes:
        parties: n, this one included; each adds the same.
        colluding: t, where each adds only its share: so many of the others may pool what they know, or lack their
            noise, or have it known to others. None: each adds its whole noise.
    """

    parties: int
    colluding: int | None = None

    @property
    def share(self) -> float:
        """What this party adds, over the promised noise: 1 / sqrt(n - t)."""
        return 1.0 if self.colluding is None else 1 / math.sqrt(self.parties - self.colluding)

    def unknown(self, others: int) -> float:
        """The noise that ``others`` who pool what they know do not know, over the promised noise.

        The sum of m discrete Gaussians of standard deviation s on one grid is accounted as one of s sqrt(m). It
        differs from that by at most 10 sum_{k < m} exp(-2 pi^2 s^2 k / (k + 1)) in the logarithm of every probability
        (arXiv:2102.06387, with s in grid steps): with s = 2^24 far less than any number a computer holds.
        """
        return math.sqrt(self.parties - others) * self.share

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
