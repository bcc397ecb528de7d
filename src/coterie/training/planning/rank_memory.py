"""What one of several ranks of a private run holds: of parameters all that are its, of the optimiser's state a share.

Weights, and sums on their way, lie at every rank that holds a parameter; moments, and a master copy, at its owner
alone (`coterie.dp.ownership`). Counted is the rank with the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coterie.dp.ownership import dealt
from coterie.training.planning.closed_form import FLOAT32

MOST = 64
"""Ranks that are looked at."""


@dataclass(frozen=True)
class Held:
    """A model that is trained as a whole.

    Attributes:
        rest: values of each parameter that is no expert's, by name.
        experts: values and number of experts of each stacked expert parameter, by name.
        compute_bytes: of one weight.
    """

    rest: Mapping[str, int]
    experts: Mapping[str, tuple[int, int]]
    compute_bytes: int

    @property
    def fewest_experts(self) -> int:
        """Of a layer; 1 where there are none."""
        return min((number for _, number in self.experts.values()), default=1)

    def at_rank(self, world: int, over: int = 1) -> int:
        """Bytes at the rank with the most.

        Args:
            world: ranks that share the run.
            over: of these that hold all experts together; 1: each holds all.
        """
        cut = {name: -(-number // over) * size // number for name, (size, number) in self.experts.items()}
        kept = sum(self.rest.values()) + sum(cut.values())
        if over == 1:
            owned = _most({**self.rest, **cut}, world)
        else:
            owned = _most(self.rest, world) + _most(cut, world // over)
        weight, master = self.compute_bytes, FLOAT32 if self.compute_bytes < FLOAT32 else 0
        return (weight + FLOAT32) * kept + (2 * FLOAT32 + master) * owned

    def over_devices(self) -> tuple[int, ...]:
        """Of 1, 2, ... ranks with whole models."""
        return tuple(self.at_rank(world) for world in range(1, MOST + 1))

    def over_experts(self) -> tuple[int, ...]:
        """Of 1, 2, ... ranks that hold all experts together, as many as the layer with the fewest has experts."""
        return tuple(self.at_rank(world, world) for world in range(1, min(MOST, self.fewest_experts) + 1))


def _most(sizes: Mapping[str, int], world: int) -> int:
    """Values of the owner with the most."""
    owned = [0] * world
    for name, owner in dealt(sizes, world).items():
        owned[owner] += sizes[name]
    return max(owned)
