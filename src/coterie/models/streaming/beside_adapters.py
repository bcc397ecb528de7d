"""A whole model with adapters of experts: its frozen weights and the factors are multiplied one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from coterie.models.lora import expert_adapters, factors_stay_apart
from coterie.models.seam import computed_by, expert_layers
from coterie.models.streaming.cache import LayerWeights
from coterie.models.streaming.streamer import Lent, StreamedExperts


class _OwnWeights:
    """Lends what the model's own modules hold."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer.module for layer in expert_layers(model)]
        self._names = [layer.layout.parameter_names for layer in expert_layers(model)]

    @contextmanager
    def layer(self, index: int) -> Iterator[LayerWeights]:
        held = {name: getattr(self._layers[index], name).detach() for name in self._names[index]}
        yield Lent(held, next(iter(held.values())).dtype, own=True)


class _Frozen:
    """Gradients of weights that nobody trains."""

    def add(self, layer: int, gradients: LayerWeights) -> None:
        raise AssertionError(f"layer {layer} has no adapter, and its weights are frozen")


@contextmanager
def without_merging(model: nn.Module) -> Iterator[None]:
    """Inside, ``W + B A`` of no expert exists, in forward or backward; a model without such adapters is left alone.

    Raises:
        ModelError: the adapters are merged into the weights.
    """
    adapters = expert_adapters(model)
    if not adapters:
        yield
        return
    with factors_stay_apart(model), computed_by(model, StreamedExperts(_OwnWeights(model), _Frozen(), adapters)):
        yield
