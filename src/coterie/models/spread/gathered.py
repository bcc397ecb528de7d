"""A spread model written as a whole one, a layer's experts at rank 0 at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from coterie.models.seam import ExpertLayer, expert_layers
from coterie.models.split.exporter import write_from_layers
from coterie.models.split.splitter import trunk_shapes
from coterie.models.spread.cuts import Cut
from coterie.models.spread.spread import Spread
from coterie.models.zoo.build import structure_of

_TRUNK = "trunk.part"
_NO_LAYER = -1


def write_gathered(out: Path, model: PreTrainedModel, spread: Spread) -> None:
    """Write a checkpoint that ``from_pretrained`` loads; at rank 0, while the others `give_experts`.

    Args:
        out: a folder that exists.
        model: spread, without adapters.
        spread: of it.

    Raises:
        ModelError: what was written does not read back.
        RankError: a rank is gone.
    """
    whole = structure_of(model.config, model.dtype)
    state = model.state_dict()
    trunk = {name: state[name].detach().cpu().contiguous() for name in trunk_shapes(whole)}
    layers = expert_layers(model)

    def layer(index: int) -> Mapping[str, Tensor]:
        spread.ranks.tell("the experts to give", lambda: index)
        return _gathered(spread, layers[index])

    save_file(trunk, out / _TRUNK)
    write_from_layers(out, whole, out / _TRUNK, layer)
    (out / _TRUNK).unlink()
    spread.ranks.tell("the experts to give", lambda: _NO_LAYER)
    if model.can_generate():
        model.generation_config.save_pretrained(out)


def give_experts(model: PreTrainedModel, spread: Spread) -> None:
    """Give rank 0 this rank's experts, layer by layer, as it asks for them; it asks those of its own group.

    Raises:
        CoterieError: what rank 0 failed with.
    """
    if spread.replicas.rank:
        return
    layers = expert_layers(model)
    while (index := spread.ranks.tell("the experts to give", lambda: _NO_LAYER)) != _NO_LAYER:
        _gathered(spread, layers[index])


def _gathered(spread: Spread, layer: ExpertLayer) -> dict[str, Tensor]:
    """The stacked parameters of a layer at rank 0, [E, ...]; nothing at the others."""
    ranks, found = spread.ranks, {}
    for name, own in layer.parameters().items():
        cut = Cut(layer.index, (layer.num_experts, *own.shape[1:]), 0, (1,) * own.ndim)
        counts = [len(cut.held(rank, ranks.world)) for rank in range(ranks.world)]
        nothing = [0] * ranks.world
        send = [len(own), *nothing[1:]]
        found[name] = ranks.exchange(own.detach(), send, counts if ranks.rank == 0 else nothing).cpu()
    return found
