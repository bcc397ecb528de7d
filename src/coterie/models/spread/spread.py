"""A model whose experts are spread over ranks: each holds a range of every layer's, as plain parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from coterie.errors import ModelError
from coterie.models import seam
from coterie.models.lora import expert_wrappers
from coterie.models.seam import ExpertLayer, ExpertsCall, ExpertsImplementation, LocalExperts
from coterie.models.shares import held_experts
from coterie.models.spread.cuts import Cut, cuts_of
from coterie.models.spread.travel import Trip, there_and_back
from coterie.ranks.ranks import Alone, Ranks

_RANKS = "coterie_ranks"
MakeTrip = Callable[[ExpertLayer, Tensor, Tensor], Trip]
"""Begins the way of a layer's rows, from the experts that tokens chose, [N, K], and a number for each token, [N]."""


@dataclass(frozen=True)
class Spread:
    """Where the experts of a model are, as one rank sees it.

    Attributes:
        ranks: that hold all experts together, once.
        replicas: that hold the same experts as this one, in other groups; one where all ranks are one group.
        gathered: in private training a layer's weights come to every rank, instead of rows to experts.
        cuts: how parameters are cut, by name.
    """

    ranks: Ranks
    replicas: Ranks
    gathered: bool
    cuts: dict[str, Cut]

    def held(self, cut: Cut) -> range:
        """The experts of a cut parameter that this rank holds."""
        return cut.held(self.ranks.rank, self.ranks.world)

    def bounds(self, experts: int) -> list[int]:
        """Where each rank's experts of a layer begin, and where the last one's end."""
        world = self.ranks.world
        return [*(held_experts(experts, rank, world).start for rank in range(world)), experts]

    def trip(self, layer: ExpertLayer, ids_NK: Tensor, record_N: Tensor) -> Trip:
        """The way of a layer's rows to all ranks; every rank takes part."""
        return Trip.begin(self.ranks, self.bounds(layer.num_experts), ids_NK, record_N)

    def trip_at_home(self, layer: ExpertLayer, ids_NK: Tensor, record_N: Tensor) -> Trip:
        """The way of the rows that chose this rank's own experts; nothing is exchanged, the others add zero."""
        first, last = self.bounds(layer.num_experts)[self.ranks.rank :][:2]
        return Trip.begin(Alone(), [first, last], ids_NK, record_N)

    def size(self, name: str, own: Tensor) -> int:
        """How many values a parameter has at all ranks together."""
        return own.numel() if name not in self.cuts else torch.Size(self.cuts[name].view).numel()


class SpreadExperts:
    """Computes the layers of a spread model for evaluation, generation and plain training.

    Every rank runs the model as often as the others, and its backward too.

    Args:
        trip: begins the way of a layer's rows.
        own: computes this rank's own experts; None: with the weights in the module.
    """

    def __init__(self, trip: MakeTrip, own: ExpertsImplementation | None = None) -> None:
        self._trip, self._own = trip, own or LocalExperts()

    def __call__(self, call: ExpertsCall) -> Tensor:
        hidden_ND = call.hidden_ND
        nobody_N = torch.zeros(hidden_ND.shape[0], dtype=torch.int64, device=hidden_ND.device)
        trip = self._trip(call.layer, call.expert_ids_NK, nobody_N)
        anchor = torch.zeros((), device=hidden_ND.device, requires_grad=torch.is_grad_enabled())
        return there_and_back(anchor, call, trip, self._own)


def spread_experts(model: nn.Module, ranks: Ranks, over: int | None = None, *, gathered: bool = False) -> Spread:
    """Keep this rank's experts of every layer, and let tokens travel to those of the others in its group.

    Or let whole layers travel to the tokens, in private training: elsewhere tokens travel all the same.

    Adapters are attached before and an optimizer is made after it, since parameters are replaced. What holds no
    expert stays whole at every rank.

    Args:
        model: whole, the same at all ranks; it is changed.
        ranks: may be one process alone; all of them call this.
        over: ranks of a group, which hold every expert once; neighbours are a group. None: all ranks are one.
        gathered: in private training gather each layer's weights at every rank while it is computed, instead.

    Raises:
        ModelError: no experts that coterie can reach, fewer of them than ranks, or a norm behind each expert.
        RankError: the ranks cannot be split into groups of that size.
    """
    layers = seam.select(model)
    size = ranks.world if over is None else over
    check_over(layers, size)
    group, replicas = (ranks, Alone()) if size == ranks.world else ranks.split(size)
    spread = Spread(group, replicas, gathered, cuts_of(model))
    modules = dict(model.named_modules())
    for full_name, cut in spread.cuts.items():
        path, _, name = full_name.rpartition(".")
        whole: Tensor = getattr(modules[path], name)
        own = cut.part(whole.detach(), spread.held(cut)).clone(memory_format=torch.contiguous_format)
        setattr(modules[path], name, nn.Parameter(own, whole.requires_grad))
    for wrapper in expert_wrappers(model):
        bounds = spread.bounds(wrapper.num_experts)
        wrapper.num_experts = bounds[group.rank + 1] - bounds[group.rank]
    for layer in layers:
        setattr(layer.module, "num_experts", layer.num_experts)  # noqa: B010 - not every family names it
        setattr(layer.module, _RANKS, (group, replicas, gathered))
        seam.computes_itself(layer.module, SpreadExperts(spread.trip))
    seam.select(model)
    _refuse_to_save(model)
    return spread


@contextmanager
def at_home(model: nn.Module) -> Iterator[None]:
    """Inside, a spread model computes with the experts here alone, and no rank has to take part; a whole one as ever.

    For what looks at a model's operations, not at its output. Where weights are lent, whoever lends them says who
    computes.
    """
    spread = spread_of(model)
    lent = any(own.is_meta for layer in seam.expert_layers(model) for own in layer.parameters().values())
    with nullcontext() if spread is None or lent else seam.computed_by(model, SpreadExperts(spread.trip_at_home)):
        yield


def spread_of(model: nn.Module) -> Spread | None:
    """How a model is spread; None for a whole one."""
    found = (getattr(layer.module, _RANKS, None) for layer in seam.expert_layers(model))
    ranks: tuple[Ranks, Ranks, bool] | None = next((each for each in found if each is not None), None)
    return None if ranks is None else Spread(*ranks, cuts_of(model))


def check_over(layers: Iterable[ExpertLayer], size: int) -> None:
    """Make sure that experts can be spread over a group of ranks; weights may be elsewhere.

    Raises:
        ModelError: fewer experts than ranks in a layer, or a norm behind each expert.
    """
    for layer in layers:
        _check(layer, size)


def _check(layer: ExpertLayer, size: int) -> None:
    if layer.num_experts < size:
        raise ModelError(
            f"{layer.name} has {layer.num_experts} experts, and there are {size} ranks to hold them.",
            code="spread-few-experts",
            why="every rank holds experts of every layer",
            fix=f"spread them over at most {layer.num_experts} ranks",
        )
    if layer.layout.has_post_expert_norm:
        raise ModelError(
            f"{layer.name} puts a norm behind each expert.",
            code="spread-norm",
            why="its weight is no expert's, so its gradient would have to be put together from all ranks",
            fix="train this family with whole models at each rank (devices alone)",
        )


def _refuse_to_save(model: nn.Module) -> None:
    """transformers would save the experts that are here, and number them anew."""

    def save_pretrained(*arguments: Any, **options: Any) -> NoReturn:
        raise ModelError(
            "this process holds a part of the model's experts only.",
            code="spread-save",
            why="what is saved would load without an error, with experts missing",
            fix="save it with coterie.models.split.saved.save_model, while the other ranks give their experts",
        )

    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            setattr(module, "save_pretrained", save_pretrained)  # noqa: B010 - a method, for this object alone
