"""Whole weights of a spread model's layers, one layer at a time: gathered before it computes, let go of afterwards.

Where rows do not travel to experts, experts come to the rows: every rank computes its own records by itself, and what
it computes for a layer's experts goes to the ranks that hold them. All ranks of a group run the same passes: each
gathering, and each sum, is one that all of them take part in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coterie.errors import RankError
from coterie.models.lora import expert_wrappers
from coterie.models.seam import expert_layers
from coterie.models.spread.spread import Spread
from coterie.models.streaming.cache import LayerWeights


class WholeLayers:
    """A `WeightSource` over the ranks of a group that keeps one layer whole; see the module text.

    Adapters of experts are whole for the length of a pass: all of them together are small beside one layer.

    Args:
        model: spread.
        spread: of it.

    Attributes:
        shapes: of the trained parameters that hold something of every expert, whole, by name.
        lent_shapes: of those among them that `layer` lends.
    """

    def __init__(self, model: nn.Module, spread: Spread) -> None:
        self._spread, self._ranks = spread, spread.ranks
        self._layers = expert_layers(model)
        self._numbers = {name: number for number, name in enumerate(spread.cuts)}
        self._index, self._weights = -1, dict[str, Tensor]()
        lent = {f"{layer.name}.{name}" for layer in self._layers for name in layer.parameters()}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.shapes = {name: cut.shape() for name, cut in spread.cuts.items() if name in trained}
        self.lent_shapes = {name: shape for name, shape in self.shapes.items() if name in lent}
        modules = dict(model.named_modules())
        places = {name: name.rpartition(".") for name in spread.cuts if name not in lent}
        self._adapters = {name: (modules[path], last) for name, (path, _, last) in places.items()}
        self._wrappers = expert_wrappers(model)

    @contextmanager
    def layer(self, index: int) -> Iterator[LayerWeights]:
        """Lend layer ``index``, from all ranks of the group unless it was the last one that was lent.

        Raises:
            RankError: another rank does something else.
        """
        if index != self._index:
            self._drop()  # before the next one is there
            self._in_step(index, 0)
            layer = self._layers[index]
            self._weights = {
                name: self._whole(f"{layer.name}.{name}", own) for name, own in layer.parameters().items()
            }
            self._index = index
        yield self._weights

    @contextmanager
    def one_pass(self) -> Iterator[dict[str, nn.Parameter]]:
        """Inside, adapters of experts are whole; gives the trained ones by name. Afterwards nothing is kept.

        Weights may be others in the next pass.
        """
        experts = {id(layer.module): layer.num_experts for layer in self._layers}
        held = [(wrapper, wrapper.num_experts) for wrapper in self._wrappers]
        own: dict[str, nn.Parameter] = {}
        whole: dict[str, nn.Parameter] = {}
        try:
            for name, (module, last) in self._adapters.items():
                own[name] = getattr(module, last)
                self._in_step(self._numbers[name], 1)
                whole[name] = nn.Parameter(self._whole(name, own[name]), own[name].requires_grad)
                setattr(module, last, whole[name])
            for wrapper in self._wrappers:
                wrapper.num_experts = experts[id(wrapper.get_base_layer())]
            yield {name: parameter for name, parameter in whole.items() if name in self.shapes}
        finally:
            for wrapper, count in held:
                wrapper.num_experts = count
            for name, parameter in own.items():
                module, last = self._adapters[name]
                setattr(module, last, parameter)
            self._drop()

    def summed(self, name: str, whole: Tensor) -> Tensor:
        """What the ranks of the group have of this rank's part of a parameter, added up in float32.

        Args:
            name: of the parameter.
            whole: float32, of its whole shape; it is overwritten.

        Raises:
            RankError: another rank does something else.
        """
        cut, ranks = self._spread.cuts[name], self._ranks
        self._in_step(self._numbers[name], 2)
        parts = (cut.part(whole, cut.held(rank, ranks.world)).contiguous() for rank in range(ranks.world))
        for owner, part in enumerate(parts):
            ranks.add_up([part], owner)
            if owner == ranks.rank:
                own = part
        return own

    def _whole(self, name: str, own: Tensor) -> Tensor:
        """A parameter put together; ranks have as many experts each, or one more."""
        cut, ranks = self._spread.cuts[name], self._ranks
        held = [cut.held(rank, ranks.world) for rank in range(ranks.world)]
        sizes = [cut.shape(each).numel() for each in held]
        sent = own.detach().new_empty(max(sizes))
        sent[: own.numel()] = own.detach().reshape(-1)
        sent[own.numel() :] = 0
        whole = own.detach().new_empty(cut.shape())
        for found, each, size in zip(ranks.gather(sent), held, sizes, strict=True):
            cut.put(found[:size], each, whole, range(cut.experts))
        return whole

    def _drop(self) -> None:
        self._index, self._weights = -1, {}

    def _in_step(self, *what: int) -> None:
        """Make sure that all ranks come for the same: other layers of the same shape would go unnoticed.

        Raises:
            RankError: they do not.
        """
        ranks = self._ranks
        if ranks.world == 1:
            return
        for rank, other in enumerate(ranks.gather(torch.tensor(what))):
            if tuple(other.tolist()) != what:
                raise RankError(
                    f"rank {rank} of a group is at another layer than rank {ranks.rank}.",
                    code="ranks-out-of-step",
                    where="layers that are gathered from ranks",
                    why="a layer's weights, or its sums, would be put together with another one's",
                    fix="run the same model at every rank, as often and in the same order",
                )
