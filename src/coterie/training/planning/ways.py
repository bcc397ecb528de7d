"""Which way of using devices suits a run: one device, records over several, or experts over several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

Way = Literal["one device", "records over devices", "experts over devices", "none"]


@dataclass(frozen=True)
class Chosen:
    """What suits a run of one party.

    Attributes:
        way: the first of them whose devices hold the state and the activations.
        ranks: the fewest that the way needs.
        rank_bytes: what one of them holds.
        device_bytes: what a device has.
    """

    way: Way
    ranks: int
    rank_bytes: int
    device_bytes: int

    def words(self) -> str:
        """One sentence for `coterie plan`, without the amounts."""
        if self.way == "one device":
            return (
                "one device holds it. With `devices: N` each of N holds all of it and computes its share of every "
                "lot: N times as fast where a round is long beside adding up its sums"
            )
        if self.way == "records over devices":
            return (
                f"one device does not hold it. `devices: {self.ranks}` is the fewest: each holds the model and its "
                "sums, and its share of what the optimiser keeps"
            )
        if self.way == "experts over devices":
            return (
                f"one device does not hold it. `experts_over: "
                f"{self.ranks}` is the fewest: each holds its own experts of every layer and the rest of the model"
            )
        return (
            "no number of devices holds it: what is no expert is whole at each. Train adapters, or share the "
            "model with other parties"
        )


def choose(devices: Sequence[int], experts_over: Sequence[int], device_bytes: int, activations: int = 0) -> Chosen:
    """Choose the way that needs the fewest devices; of two records over them, since then no tokens travel.

    Args:
        devices: bytes of state at each of 1, 2, ... ranks with whole models.
        experts_over: the same of ranks that hold all experts together.
        device_bytes: what a device has.
        activations: come on top at each rank.
    """
    ways: tuple[tuple[Way, Sequence[int]], ...] = (
        ("records over devices", devices), ("experts over devices", experts_over),
    )  # fmt: skip
    for ranks in range(1, max(len(devices), len(experts_over)) + 1):
        for way, at_rank in ways:
            if ranks <= len(at_rank) and at_rank[ranks - 1] + activations <= device_bytes:
                return Chosen(
                    way if ranks > 1 else "one device", ranks, at_rank[ranks - 1] + activations, device_bytes
                )
    least = min((at_rank[-1], len(at_rank)) for _, at_rank in ways)
    return Chosen("none", least[1], least[0] + activations, device_bytes)


def memory_here() -> int:
    """Bytes that a device of this machine has: the first GPU's, else the machine's own, which its ranks share."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total)
