"""Which part of a parameter belongs to which experts: for every number of ranks, and in which order of its values.

Shape letters: E experts, r rank of an adapter, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.models.lora import expert_wrappers
from coterie.models.seam import expert_layers
from coterie.models.shares import held_experts


@dataclass(frozen=True)
class Cut:
    """A parameter that holds something of every expert of a layer.

    Attributes:
        layer: index of the layer.
        view: shape of the whole parameter in which one dimension is the experts.
        axis: that dimension.
        flat: how many of ``view``'s dimensions each dimension of the parameter itself is made of.
    """

    layer: int
    view: tuple[int, ...]
    axis: int
    flat: tuple[int, ...]

    @property
    def experts(self) -> int:
        """E of the layer."""
        return self.view[self.axis]

    def held(self, rank: int, world: int) -> range:
        """The experts of a rank."""
        return held_experts(self.experts, rank, world)

    def shape(self, held: range | None = None) -> torch.Size:
        """Of the parameter with some experts only; None: of the whole one."""
        sizes = list(self._view(range(self.experts) if held is None else held))
        shape, start = [], 0
        for count in self.flat:
            shape.append(torch.Size(sizes[start : start + count]).numel())
            start += count
        return torch.Size(shape)

    def part(self, value: Tensor, held: range, of: range | None = None) -> Tensor:
        """What some experts have of a value.

        Args:
            value: of the parameter's shape with the experts ``of``, or that many values in a row.
            held: among ``of``.
            of: None: all experts.
        """
        of = range(self.experts) if of is None else of
        view = value.reshape(self._view(of)).narrow(self.axis, held.start - of.start, len(held))
        return view.reshape(self.shape(held))

    def put(self, value: Tensor, held: range, into: Tensor, of: range) -> None:
        """Write the part of some experts, as `part` gives it, into a contiguous value that has the experts ``of``."""
        place = into.view(self._view(of)).narrow(self.axis, held.start - of.start, len(held))
        place.copy_(value.reshape(self._view(held)))

    def places(self, held: range) -> range | Tensor:
        """Where in the whole parameter, flattened, the values of some experts lie; [values] ascending if a tensor."""
        if self.axis == 0:
            each = torch.Size(self.view[1:]).numel()
            return range(held.start * each, held.stop * each)
        return self.part(torch.arange(self.shape().numel()), held).reshape(-1)

    def _view(self, held: range) -> tuple[int, ...]:
        return (*self.view[: self.axis], len(held), *self.view[self.axis + 1 :])


def cuts_of(model: nn.Module) -> dict[str, Cut]:
    """How the parameters of a model's experts can be cut, adapters of experts included, by name.

    The same for a whole model and for one of which some experts are elsewhere.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = {id(layer.module): layer for layer in expert_layers(model)}
    cuts: dict[str, Cut] = {}
    for layer in layers.values():
        for parameter in (each for each in layer.parameters().values() if id(each) in names):
            view = (layer.num_experts, *parameter.shape[1:])
            cuts[names[id(parameter)]] = Cut(layer.index, view, 0, (1,) * len(view))
    for wrapper in expert_wrappers(model):
        of = layers[id(wrapper.get_base_layer())]
        for adapter in wrapper.lora_A:
            down, up = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
            rank = down.shape[0] // wrapper.num_experts
            # As `ExpertAdapter` reads them: A is [E * r, I], B is [O, r * E].
            cuts[names[id(down)]] = Cut(of.index, (of.num_experts, rank, down.shape[1]), 0, (2, 1))
            cuts[names[id(up)]] = Cut(of.index, (up.shape[0], rank, of.num_experts), 2, (1, 2))
    return cuts
