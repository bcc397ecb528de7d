"""Which way of using devices suits a run: one device, records over several, or experts over several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

Way = Literal["one device", "experts over devices", "none"]


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
        if self.way == "experts over devices":
            return (
                f"one device does not hold it. `experts_over: "
                f"{self.ranks}` is the fewest: each holds its own experts of every layer and the rest of the model"
            )
        return (
            "no number of devices holds it: what is no expert is whole at each. Train adapters, or share the "
            "model with other parties"
        )


def choose(
    state_bytes: int, expert_share: float, experts: Sequence[int], device_bytes: int, activations: int = 0
) -> Chosen:
    """Choose among the ways.

    Args:
        state_bytes: of all parameters: weights, gradients, optimiser.
        expert_share: of it, what experts take.
        experts: of each layer; none: a model without experts.
        device_bytes: what a device has.
        activations: come on top at each rank.
    """

    def of_rank(ranks: int) -> int:
        return round(state_bytes * (1 - expert_share + expert_share / ranks)) + activations

    if of_rank(1) <= device_bytes:
        return Chosen("one device", 1, of_rank(1), device_bytes)
    most = min(experts, default=1)
    for ranks in range(2, most + 1):
        if of_rank(ranks) <= device_bytes:
            return Chosen("experts over devices", ranks, of_rank(ranks), device_bytes)
    return Chosen("none", most, of_rank(most), device_bytes)


def memory_here() -> int:
    """Bytes that a device of this machine has: the first GPU's, else the machine's own, which its ranks share."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total)
