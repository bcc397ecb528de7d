"""Which experts of a layer each of several ranks has, and what those have of stacked weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def held_experts(experts: int, rank: int, world: int) -> range:
    """The experts of a rank: contiguous ranges, as equal as can be."""
    return range(experts * rank // world, experts * (rank + 1) // world)


def rows_of(weights: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """Views of a rank's rows of stacked weights, [E, ...]."""
    held = {name: held_experts(tensor.shape[0], rank, world) for name, tensor in weights.items()}
    return {name: tensor[held[name].start : held[name].stop] for name, tensor in weights.items()}
