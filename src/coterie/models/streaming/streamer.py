"""Experts brought to the device one layer at a time.

At most two layers' experts are on the device at any moment, the one that computes and the one that comes next, and
gradients of at most one. The forward needs a layer once and the backward needs it once more; both read the cache,
so nothing here ever waits for the network.

Shape letters as in `coterie.models.seam`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from coterie.models import expert_math
from coterie.models.autograd import applied
from coterie.models.grouped import GroupedLinear
from coterie.models.lora import ExpertAdapter
from coterie.models.seam import ExpertLayer, ExpertsCall, Linear, RoutedRows, bias_rows, expert_rows
from coterie.models.streaming.cache import Digests, LayerWeights
from coterie.models.streaming.heap import give_back_at_a_peak, give_back_freed

Adapters = Mapping[tuple[nn.Module, str], list[ExpertAdapter]]
"""Low-rank updates by (experts module, parameter name); see `coterie.models.lora.expert_adapters`."""


class WeightSource(Protocol):
    """Lends the weights of one layer to the device, for the length of a ``with`` block."""

    def layer(self, index: int) -> AbstractContextManager[LayerWeights]: ...


class LayerReader(Protocol):
    """Where a streamer reads layers from: a `WeightCache`, or one that is still being filled."""

    num_layers: int

    def get(self, layer: int) -> LayerWeights: ...

    def digests(self) -> dict[int, Digests]:
        """Digests of every layer's shares; waits for layers that are still to come."""
        ...


class ExpertGradients(Protocol):
    """Takes one layer's summed expert gradients off the device."""

    def add(self, layer: int, gradients: LayerWeights) -> None: ...


class Lent(Mapping[str, Tensor]):
    """A layer on the device in the number format it arrived in; a tensor is converted when it is asked for.

    So two layers in bfloat16 and one matrix in float32 are on the device, instead of two layers in float32. On a
    processor they are the cache's own, and what is asked for is a copy.

    Args:
        stored: tensors on the device.
        dtype: what is computed in.
        own: nobody else has them.
    """

    def __init__(self, stored: LayerWeights, dtype: torch.dtype, *, own: bool) -> None:
        self._stored, self.dtype, self._own = stored, dtype, own

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].to(self.dtype, copy=not self._own)

    def as_stored(self, name: str) -> Tensor:
        """A matrix of every expert as it lies here, to be multiplied with `grouped_mm`: never written to."""
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def nbytes(self) -> int:
        """What the layer takes on the device."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until what that stream was given before is done."""
        for tensor in self._stored.values():
            tensor.record_stream(stream)


def as_stored(weights: LayerWeights, name: str) -> Tensor:
    """A matrix of every expert of a layer that is lent or is the module's own, as it lies there: never written to."""
    return weights.as_stored(name) if isinstance(weights, Lent) else weights[name]


class LayerStreamer:
    """A `WeightSource` over layers off the device that keeps at most two layers on the device.

    While layer i is lent, its neighbour in the direction of travel (up in the forward, down in the backward) is
    copied by a side thread, on CUDA along a side stream. Layers lie there in the narrower of the cache's number
    format and the one that is computed in.

    Args:
        cache: the layers off the device.
        device: where experts are computed.
        dtype: what they are computed in.

    Attributes:
        peak_layers: most layers that were on the device at once; never above 2.
        peak_bytes: most bytes of expert weights that were on the device at once.
        waited: by layer, the seconds that computing stood still for it the first time since `watch`, and for all
            layers together ever after under the key -1.
    """

    def __init__(self, cache: LayerReader, device: torch.device, dtype: torch.dtype) -> None:
        self._cache = cache
        self._device = device
        self._dtype = dtype
        self._slots: dict[int, Future[Lent]] = {}
        self._last = -1
        self._step = 1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="coterie-prefetch")
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.peak_layers = 0
        self.peak_bytes = 0
        self.waited: dict[int, float] = {}

    def watch(self) -> None:
        """Begin to count waiting anew."""
        self.waited = {}

    @contextmanager
    def layer(self, index: int) -> Iterator[LayerWeights]:
        """Lend layer ``index``. The tensors must not be kept after the block."""
        began = time.monotonic()
        give_back_at_a_peak()
        self._turn_towards(index)
        following = index + self._step
        # A layer may be lent several times in a row; what was prefetched meanwhile stays.
        for other in [slot for slot in self._slots if slot not in (index, following)]:
            self._drop(other)
        self._start(index)
        weights = self._slots[index].result()
        self._count_wait(index, time.monotonic() - began)
        self._wait_for_copy(weights)
        if 0 <= following < self._cache.num_layers:
            self._start(following)
        self._note_peak(weights)
        yield weights

    def digests(self) -> dict[int, Digests]:
        """Digests of every layer's shares off the device; waits until all are there."""
        return self._cache.digests()

    def drop_all(self) -> None:
        """Free every layer on the device (at the end of a lot, or when the cache gets new bytes)."""
        for index in list(self._slots):
            self._drop(index)
        give_back_freed()

    def close(self) -> None:
        """Free the device and end the side thread."""
        self.drop_all()
        self._pool.shutdown(wait=True)

    def _turn_towards(self, index: int) -> None:
        if index != self._last:
            self._step = 1 if index > self._last else -1
        if index == self._cache.num_layers - 1:
            self._step = -1
        if index == 0:
            self._step = 1
        self._last = index

    def _start(self, index: int) -> None:
        if index not in self._slots:
            self._slots[index] = self._pool.submit(self._load, index)

    def _drop(self, index: int) -> None:
        future = self._slots.pop(index)
        if not future.cancel():
            future.exception()

    def _load(self, index: int) -> Lent:
        weights = self._cache.get(index)
        if self._side is None:
            own = self._device.type != "cpu"
            return Lent({name: self._moved(tensor) for name, tensor in weights.items()}, self._dtype, own=own)
        with torch.cuda.stream(self._side):
            return Lent({name: self._moved(tensor) for name, tensor in weights.items()}, self._dtype, own=True)

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device, in the narrower format. A wider one is narrowed before it travels."""
        narrow = self._dtype if self._dtype.itemsize < tensor.dtype.itemsize else tensor.dtype
        return tensor.to(narrow).to(self._device, non_blocking=self._side is not None)

    def _wait_for_copy(self, weights: Lent) -> None:
        if self._side is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._side)
        weights.record_stream(current)

    def _count_wait(self, index: int, seconds: float) -> None:
        key = index if index not in self.waited else -1
        self.waited[key] = self.waited.get(key, 0.0) + seconds

    def _note_peak(self, weights: Lent) -> None:
        self.peak_layers = max(self.peak_layers, len(self._slots))
        self.peak_bytes = max(self.peak_bytes, weights.nbytes * len(self._slots))


class HostGradients:
    """A `ExpertGradients` that sums in float32 in host memory.

    Attributes:
        sums: layer to parameter name to [E, ...] float32.
    """

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, Tensor]] = {}

    def add(self, layer: int, gradients: LayerWeights) -> None:
        into = self.sums.setdefault(layer, {})
        for name, gradient in gradients.items():
            if name in into:
                into[name] += gradient.to("cpu", torch.float32)
            else:
                into[name] = gradient.to("cpu", torch.float32, copy=True)


class StreamedExperts:
    """Computes experts whose weights are lent by a `WeightSource`; their gradients go to a `ExpertGradients`.

    Args:
        source: lends weights.
        sink: takes gradients.
        adapters: low-rank updates; autograd trains them, and the weights below are then frozen.

    Guarantee: forward and every gradient equal training with the weights in the module.
    """

    def __init__(self, source: WeightSource, sink: ExpertGradients, adapters: Adapters | None = None) -> None:
        self._source = source
        self._sink = sink
        self._adapters = adapters or {}

    def __call__(self, call: ExpertsCall) -> Tensor:
        layer = call.layer
        rows = RoutedRows.of(call.expert_ids_NK, layer.num_experts)
        if not torch.is_grad_enabled():
            return self._inference(call, rows)
        x_RD = call.hidden_ND[rows.token_R]
        factors = self._factors(layer)
        if factors:
            flat = [factor for low in factors for factor in (low.down_ErI, low.up_EOr)]
            out_RD = applied(_AdaptedRows, x_RD, rows.ends_E, layer, self._source, factors, *flat)
        else:
            # The anchor makes autograd visit the backward even where the rows themselves need no gradient.
            anchor = torch.zeros((), requires_grad=True)
            out_RD = applied(_StreamedRows, x_RD, rows.ends_E, anchor, layer, self._source, self._sink)
        if layer.layout.has_post_expert_norm:
            out_RD = layer.module.post_expert_norm(out_RD)  # type: ignore[operator]
        return rows.combine(out_RD, call.routing_weights_NK, call.hidden_ND.dtype)

    def _factors(self, layer: ExpertLayer) -> list[_LentFactors]:
        return [
            _LentFactors(name, adapter.scaling, adapter.down_ErI, adapter.up_EOr)
            for name in (layer.layout.up_name, "down_proj")
            for adapter in self._adapters.get((layer.module, name), ())
        ]

    @torch.no_grad()
    def _inference(self, call: ExpertsCall, rows: RoutedRows) -> Tensor:
        layer = call.layer
        with self._source.layer(layer.index) as weights:
            linear = _adapted_linear(layer, weights, self._factors(layer))
            out_RD = expert_rows(layer, call.hidden_ND[rows.token_R], rows.ends_E, linear)
        return rows.combine(out_RD, call.routing_weights_NK, call.hidden_ND.dtype)


class _LentFactors(NamedTuple):
    """One adapter of one expert matrix."""

    name: str
    scaling: float
    down_ErI: Tensor
    up_EOr: Tensor


def _adapted_linear(layer: ExpertLayer, weights: LayerWeights, factors: Sequence[_LentFactors]) -> Linear:
    """A lent matrix and its adapters, one after the other: ``W + B A`` never exists. Gradients reach the factors."""

    def linear(name: str, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        weight, bias = as_stored(weights, name), weights.get(f"{name}_bias")
        dtype = weights.dtype if isinstance(weights, Lent) else weight.dtype
        out = applied(GroupedLinear, x_RI.to(dtype), weight, ends_E, layer.layout.is_transposed)
        if bias is not None:
            out = out + bias_rows(bias, ends_E)
        for low in factors:
            if low.name == name:
                narrow = applied(GroupedLinear, x_RI.to(low.down_ErI.dtype), low.down_ErI, ends_E, False)
                wide = applied(GroupedLinear, narrow, low.up_EOr, ends_E, False)
                out = out + low.scaling * wide.to(out.dtype)
        return out

    return linear


def _adapted_rows(
    layer: ExpertLayer, weights: LayerWeights, factors: Sequence[_LentFactors], x_RD: Tensor, ends_E: Tensor
) -> Tensor:
    """Expert outputs before a post-expert norm."""
    linear = _adapted_linear(layer, weights, factors)
    return linear("down_proj", layer.activate(linear(layer.layout.up_name, x_RD, ends_E)), ends_E)


class _AdaptedRows(torch.autograd.Function):
    """Rows through lent weights, which are frozen, and adapters, which are trained.

    The weights are only there while they are lent, so nothing of them is kept: the backward computes the rows again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        ends_E: Tensor,
        layer: ExpertLayer,
        source: WeightSource,
        factors: Sequence[_LentFactors],
        *flat: Tensor,
    ) -> Tensor:
        with source.layer(layer.index) as weights:
            out_RD = _adapted_rows(layer, weights, factors, x_RD, ends_E)
        ctx.save_for_backward(x_RD, ends_E, *flat)
        ctx.layer, ctx.source, ctx.kinds = layer, source, [(low.name, low.scaling) for low in factors]
        return out_RD

    @staticmethod
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Any, ...]:
        x_RD, ends_E, *flat = ctx.saved_tensors
        x_RD, *flat = [tensor.detach().requires_grad_() for tensor in (x_RD, *flat)]
        pairs = zip(ctx.kinds, flat[::2], flat[1::2], strict=True)
        factors = [_LentFactors(name, scaling, down, up) for (name, scaling), down, up in pairs]
        with ctx.source.layer(ctx.layer.index) as weights, torch.enable_grad():
            out_RD = _adapted_rows(ctx.layer, weights, factors, x_RD, ends_E)
            grad_x_RD, *gradients = torch.autograd.grad(out_RD, [x_RD, *flat], grad_out_RD)
        return grad_x_RD, None, None, None, None, *gradients


class _StreamedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        ends_E: Tensor,
        anchor: Tensor,
        layer: ExpertLayer,
        source: WeightSource,
        sink: ExpertGradients,
    ) -> Tensor:
        with source.layer(layer.index) as weights:
            out_RD, pre_RG = expert_math.forward_rows(layer, weights, x_RD, ends_E)
        ctx.save_for_backward(x_RD, pre_RG, ends_E)
        ctx.layer, ctx.source, ctx.sink = layer, source, sink
        return out_RD

    @staticmethod
    def backward(ctx: Any, grad_out_RD: Tensor) -> tuple[Any, ...]:
        x_RD, pre_RG, ends_E = ctx.saved_tensors
        layer: ExpertLayer = ctx.layer
        with ctx.source.layer(layer.index) as weights:
            rows = expert_math.backward_rows(layer, weights, pre_RG, grad_out_RD, ends_E)
        ctx.sink.add(layer.index, expert_math.weight_gradients(layer, x_RD, rows, grad_out_RD, ends_E))
        return rows.grad_x_RD.to(x_RD.dtype), None, None, None, None, None
