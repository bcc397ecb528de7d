"""What one of several ranks of a private run holds: of parameters all that are its, of the optimiser's state a share.

Weights, and sums on their way, lie at every rank that holds a parameter; moments, and a master copy, at its owner
alone (`coterie.dp.ownership`). Counted is the rank with the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from coterie.config import LoraSpec
from coterie.dp.ownership import dealt
from coterie.models.lora import adapter_sizes
from coterie.models.seam import expert_layers
from coterie.training.planning.closed_form import FLOAT32

MOST = 64
"""Ranks that are looked at."""


@dataclass(frozen=True)
class Held:
    """Values that are trained: a whole model's, or its adapters'.

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
        weight, master = self.compute_bytes, FLOAT32 if self.compute_bytes < FLOAT32 else 0
        return (weight + FLOAT32) * self.kept(over) + (2 * FLOAT32 + master) * self.owned(world, over)

    def experts_at(self, over: int) -> dict[str, int]:
        """Values of each expert parameter at the rank with the most, where so many hold all together."""
        return {name: -(-number // over) * size // number for name, (size, number) in self.experts.items()}

    def kept(self, over: int = 1) -> int:
        """Values that the rank with the most holds."""
        return sum(self.rest.values()) + sum(self.experts_at(over).values())

    def owned(self, world: int, over: int = 1) -> int:
        """Of these, the ones that the rank with the most owns."""
        cut = self.experts_at(over)
        if over == 1:
            return _most({**self.rest, **cut}, world)
        return _most(self.rest, world) + _most(cut, world // over)

    def over_devices(self) -> tuple[int, ...]:
        """Of 1, 2, ... ranks with whole models."""
        return tuple(self.at_rank(world) for world in range(1, MOST + 1))

    def over_experts(self) -> tuple[int, ...]:
        """Of 1, 2, ... ranks that hold all experts together, as many as the layer with the fewest has experts."""
        return tuple(self.at_rank(world, world) for world in range(1, min(MOST, self.fewest_experts) + 1))


def held_of(model: nn.Module, compute_bytes: int) -> Held:
    """What ranks would hold of a model, which may be on the meta device."""
    experts = {
        f"{layer.name}.{name}": (param.numel(), layer.num_experts)
        for layer in expert_layers(model)
        for name, param in layer.parameters().items()
    }
    rest = {name: param.numel() for name, param in model.named_parameters() if name not in experts}
    return Held(rest, experts, compute_bytes)


def held_adapters(model: nn.Module, spec: LoraSpec) -> Held:
    """What ranks would hold of the adapters of a model, which may be on the meta device; see `adapter_sizes`."""
    sizes = adapter_sizes(model, spec)
    numbers = [
        layer.num_experts
        for layer in expert_layers(model)
        for name in layer.parameters()
        if name in spec.experts
        for _ in ("down", "up")
    ]
    experts = {f"expert factor {at:06d}": pair for at, pair in enumerate(zip(sizes.experts, numbers, strict=True))}
    return Held({f"factor {at:06d}": size for at, size in enumerate(sizes.modules)}, experts, FLOAT32)


def _most(sizes: Mapping[str, int], world: int) -> int:
    """Values of the owner with the most."""
    owned = [0] * world
    for name, owner in dealt(sizes, world).items():
        owned[owner] += sizes[name]
    return max(owned)
