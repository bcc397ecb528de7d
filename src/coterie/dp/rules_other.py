"""Convolutions, values repeated over the records, and exact replay of small odd operations.

Shape letters: B records.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.dp.capture import Capture, Rule, node_of, nodes, refusal, tensors
from coterie.dp.derived import Function, Node
from coterie.dp.rules_elementwise import _settle_aligned
from coterie.dp.terms import Dense

_T = torch.Tensor


class _Convolution(torch.autograd.Function):
    """A convolution of [B, C, ..] that captures its weight's and bias's gradient per record."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
        capture: Capture,
        weight_node: Node | None,
        bias_node: Node | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.capture, ctx.nodes = options, capture, (weight_node, bias_node)
        return _convolve(x, weight, bias, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        weight_node, bias_node = ctx.nodes
        if weight_node is not None:
            ctx.capture.deliver(weight_node, Dense(_weight_gradients(x, weight, grad, ctx.options)))
        if bias_node is not None:
            ctx.capture.deliver(bias_node, Dense(grad.flatten(2).sum(2, dtype=torch.float32)))
        grad_x = None
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (grad_x,) = torch.autograd.grad(_convolve(leaf, weight, None, ctx.options), leaf, grad)
        return None, grad_x, *(None,) * 6


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim]
    return function(x, weight, bias, **options)


def _weight_gradients(x: Tensor, weight: Tensor, grad: Tensor, options: dict[str, Any]) -> Tensor:
    """[B, *weight.shape]: the records become groups of one wider convolution."""
    batch = x.shape[0]
    with torch.enable_grad():
        copies = weight.detach().float().repeat(batch, *(1,) * (weight.ndim - 1)).requires_grad_()
        wide = x.detach().float().reshape(1, -1, *x.shape[2:])
        out = _convolve(wide, copies, None, {**options, "groups": options.get("groups", 1) * batch})
        (gradients,) = torch.autograd.grad(out, copies, grad.float().reshape(out.shape))
    return gradients.view(batch, *weight.shape)


def convolution(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.conv1d`` and its wider forms."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    node = node_of(weight) or node_of(bias)
    if node is None or node_of(x) is not None:
        return NotImplemented
    if x.ndim != weight.ndim:
        raise refusal(node, function, "its input has no dimension for the records")
    if capture.rows_of(node, function, x) is None:
        return NotImplemented
    for used in (node_of(weight), node_of(bias)):
        if used is not None:
            capture.expect(used)
    plain, plain_bias = _plain(weight), None if bias is None else _plain(bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, plain, plain_bias = x.to(dtype), plain.to(dtype), None if plain_bias is None else plain_bias.to(dtype)
    return _Convolution.apply(capture.anchor, x, plain, plain_bias, given, capture, node_of(weight), node_of(bias))


def _plain(tensor: Tensor) -> Tensor:
    node = node_of(tensor)
    return tensor if node is None else node.value


class _Repeated(torch.autograd.Function):
    """A value whose first dimension is the records already: its gradient's rows belong to their records."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, capture: Capture, node: Node) -> Tensor:
        ctx.capture, ctx.node = capture, node
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.capture.deliver(*_settle_aligned(ctx.node, grad, ctx.capture.batch))
        return None, None, None, None


def aligned(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that treats records apart, on data and on parameters repeated over the records beforehand."""
    first = next(node for tensor in tensors((args, kwargs)) if (node := node_of(tensor)) is not None)
    data = next(tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad and node_of(tensor) is None)
    if _data_rows(capture, first, function, data) is None:
        raise refusal(first, function, "its inputs do not have the records in their first dimension")

    def plain(item: Any) -> Any:
        if isinstance(item, list | tuple):
            return type(item)(plain(part) for part in item)
        node = node_of(item)
        if node is None:
            return item
        capture.expect(node)
        return _Repeated.apply(capture.anchor, node.value, capture, node)

    return function(*(plain(item) for item in args), **{key: plain(item) for key, item in kwargs.items()})


def _data_rows(capture: Capture, node: Node, function: Function, data: Tensor) -> int | None:
    return capture.rows_of(node, function, data)


class _Replay(torch.autograd.Function):
    """Any function of data and small parameters; the backward runs it again, one record at a time."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.call = call
        return call.run(list(inputs), call.values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        inputs = ctx.saved_tensors
        batch = call.capture.batch
        each = grad.shape[0] // batch
        per_input: list[list[Tensor]] = [[] for _ in inputs]
        per_node: list[list[Tensor]] = [[] for _ in call.values]
        for record in range(batch):
            rows = slice(record * each, (record + 1) * each)
            with torch.enable_grad():
                leaves = [_leaf(tensor[_rows(tensor, batch, record)]) for tensor in inputs]
                weights = [_leaf(value) for value in call.values]
                out = call.run(leaves, weights)
                wanted = [leaf for leaf in (*leaves, *weights) if leaf.requires_grad]
                found = iter(torch.autograd.grad(out, wanted, grad[rows], allow_unused=True))
            for store, leaf in zip((*per_input, *per_node), (*leaves, *weights), strict=True):
                gradient = next(found) if leaf.requires_grad else None
                store.append(torch.zeros_like(leaf) if gradient is None else gradient)
        for node, gradients in zip(call.sources, per_node, strict=True):
            call.capture.deliver(node, Dense(torch.stack(gradients)))
        needs = ctx.needs_input_grad[2:]
        return None, None, *(torch.cat(parts) if need else None for parts, need in zip(per_input, needs, strict=True))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _rows(tensor: Tensor, batch: int, record: int) -> slice:
    each = tensor.shape[0] // batch
    return slice(record * each, (record + 1) * each)


class _Call:
    """A function call with its data tensors and its nodes as numbered holes."""

    def __init__(self, capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.capture = capture
        self._function = function
        self._args = nodes(args)
        self._kwargs = nodes(kwargs)
        self.sources = [node for tensor in tensors((args, kwargs)) if (node := node_of(tensor)) is not None]
        self.values = [node.value for node in self.sources]
        self.data = [tensor for tensor in tensors((args, kwargs)) if node_of(tensor) is None]

    def run(self, inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
        data, plain = iter(inputs), iter(weights)

        def fill(item: Any) -> Any:
            if isinstance(item, Node):
                return next(plain)
            if isinstance(item, Tensor):
                return next(data)
            if isinstance(item, list | tuple):
                return type(item)(fill(part) for part in item)
            return item

        args = fill(self._args)
        result = self._function(*args, **{key: fill(item) for key, item in self._kwargs.items()})
        if not isinstance(result, Tensor):
            raise refusal(self.sources[0], self._function, "it returns several tensors")
        return result


def replayed(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation without a rule, run again per record; needs every data tensor to have the records first.

    The self-check compares it with batches of one, as it does every rule.
    """
    call = _Call(capture, function, args, kwargs)
    node = call.sources[0]
    for tensor in call.data:
        if tensor.ndim == 0 or (tensor.shape[0] % capture.batch):
            raise refusal(node, function, "one of its inputs does not have the records in its first dimension")
    if capture.rows_of(node, function, call.data[0]) is None:
        raise refusal(node, function, "its input does not have the records in its first dimension")
    for source in call.sources:
        capture.expect(source)
    return _Replay.apply(capture.anchor, call, *call.data)


OTHER_RULES: dict[Function, Rule] = {
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    torch.conv1d: convolution,
    torch.conv2d: convolution,
}
