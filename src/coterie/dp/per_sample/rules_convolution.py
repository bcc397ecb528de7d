"""Convolutions, and values repeated over the records.

Shape letters: B records.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.dp.per_sample.capture import Capture, Rule, Use, mapped, node_of
from coterie.dp.per_sample.rules_elementwise import settle_repeated
from coterie.dp.per_sample.terms import Dense
from coterie.dp.per_sample.weight_expressions import Function, Node
from coterie.models.autograd import applied


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
            rows = _weight_gradients(x, weight, grad, ctx.options)
            ctx.capture.deliver(weight_node, Dense(_of_records(rows, ctx.capture.batch)))
        if bias_node is not None:
            rows = grad.flatten(2).sum(2, dtype=torch.float32)
            ctx.capture.deliver(bias_node, Dense(_of_records(rows, ctx.capture.batch)))
        grad_x = None
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (grad_x,) = torch.autograd.grad(_convolve(leaf, weight, None, ctx.options), leaf, grad)
        return None, grad_x, *(None,) * 6


def _of_records(rows: Tensor, batch: int) -> Tensor:
    """[B * k, ..] to [B, ..], summed."""
    return rows if rows.shape[0] == batch else rows.reshape(batch, -1, *rows.shape[1:]).sum(1)


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


def convolution(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """``F.conv1d`` and its wider forms."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    if capture.row_records is not None or node_of(x) is not None or x.ndim != weight.ndim:
        return NotImplemented
    if not (use.records_first(x) and use.constant(weight) and use.constant(bias)):
        return NotImplemented
    if any(each is not None and node_of(each) is None and each.requires_grad for each in (weight, bias)):
        return NotImplemented
    for used in (node_of(weight), node_of(bias)):
        if used is not None:
            capture.expect(used)
    plain, plain_bias = _plain(weight), None if bias is None else _plain(bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, plain, plain_bias = x.to(dtype), plain.to(dtype), None if plain_bias is None else plain_bias.to(dtype)
    return applied(_Convolution, capture.anchor, x, plain, plain_bias, given, capture, node_of(weight), node_of(bias))


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
        ctx.capture.deliver(*settle_repeated(ctx.node, grad, ctx.capture.batch))
        return None, None, None, None


def aligned(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that treats records apart, on data and on parameters repeated over the records beforehand."""

    def plain(item: Any) -> Any:
        node = node_of(item)
        if node is None:
            return item
        capture.expect(node)
        return applied(_Repeated, capture.anchor, node.value, capture, node)

    return function(*mapped(args, plain), **mapped(kwargs, plain))


OTHER_RULES: dict[Function, Rule] = {
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    torch.conv1d: convolution,
    torch.conv2d: convolution,
}
