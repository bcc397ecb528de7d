"""Rules for parameters that multiply data as matrices, and for tables.

Each rule runs the operation with the parameter's plain value, so autograd forms no weight gradient; it captures the
rows that entered and the gradient at the output, detached, when the backward comes by.

Shape letters: B records, T rows of a record, G groups, I inputs, O outputs, V table rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.dp.per_sample.capture import Capture, Rule, Use, node_of, refusal
from coterie.dp.per_sample.stacked_terms import Segments, StackedBias, StackedOuter
from coterie.dp.per_sample.terms import Dense, Lookup, Outer
from coterie.dp.per_sample.weight_expressions import Function, Node
from coterie.models.autograd import applied
from coterie.models.tensors import compute_dtype

_T = torch.Tensor


class _Linear(torch.autograd.Function):
    """``x @ W.T + b`` that captures; W and b get no gradient of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        capture: Capture,
        weight_node: Node | None,
        bias_node: Node | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.weight_node, ctx.bias_node = capture, weight_node, bias_node
        ctx.row_records = capture.row_records
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        if ctx.row_records is not None:
            _deliver_ragged(ctx, x.detach(), grad)
            return None, grad @ weight if ctx.needs_input_grad[1] else None, *(None,) * 5
        batch = ctx.capture.batch
        g_BTO = grad.reshape(batch, -1, grad.shape[-1])
        if ctx.weight_node is not None:
            a_BGTI = x.detach().reshape(batch, 1, -1, x.shape[-1])
            ctx.capture.deliver(ctx.weight_node, Outer(a_BGTI, g_BTO.unsqueeze(1), weight.shape))
        if ctx.bias_node is not None:
            ctx.capture.deliver(ctx.bias_node, Dense(g_BTO.sum(1, dtype=torch.float32)))
        grad_x = grad @ weight if ctx.needs_input_grad[1] else None
        return None, grad_x, *(None,) * 5


def _deliver_ragged(ctx: Any, x_RI: Tensor, g_RO: Tensor) -> None:
    """Rows of one expert, in ascending order of their records."""
    ends_1 = torch.tensor([x_RI.shape[0]], device=x_RI.device)
    segments = Segments(ctx.row_records, ends_1, ctx.capture.batch)
    if ctx.weight_node is not None:
        shape = ctx.weight_node.value.shape
        ctx.capture.deliver(ctx.weight_node, StackedOuter(x_RI, g_RO, segments, shape, transposed=False))
    if ctx.bias_node is not None:
        ctx.capture.deliver(ctx.bias_node, StackedBias(g_RO, segments))


def linear(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """``F.linear(x, W, b)`` with W, b or both trainable; x is [B, .., I] or [B * T, I]."""
    x, weight, bias = _signature(args, kwargs, "input", "weight", "bias")
    if not (_multiplied(x, use) and use.constant(weight) and use.constant(bias)):
        return NotImplemented
    return _linear(capture, x, weight, bias)


def _multiplied(x: Tensor, use: Use) -> bool:
    """It is data whose rows are taken one by one."""
    return node_of(x) is None and x.ndim >= 2 and use.records_first(x)


def _linear(capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    weight_node, bias_node = node_of(weight), node_of(bias)
    if weight.ndim != 2 or (bias is not None and bias.ndim != 1) or (weight_node is None and weight.requires_grad):
        return NotImplemented
    for used in (weight_node, bias_node):
        if used is not None:
            capture.expect(used)
    plain = weight if weight_node is None else weight_node.value
    plain_bias = bias if bias_node is None else bias_node.value
    dtype = compute_dtype(x, plain)
    if torch.is_autocast_enabled(x.device.type):
        x, plain, plain_bias = x.to(dtype), plain.to(dtype), None if plain_bias is None else plain_bias.to(dtype)
    return applied(_Linear, capture.anchor, x, plain, plain_bias, capture, weight_node, bias_node)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names))


def matmul(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """``x @ W``, ``W @ x`` and their stacked forms, with one side trainable."""
    left, right = _signature(args, kwargs, "input", "mat2" if "mat2" in kwargs else "other")
    if function is _T.__rmatmul__:
        left, right = right, left
    weight_left, weight_right = node_of(left), node_of(right)
    if (weight_left is None) == (weight_right is None):
        return NotImplemented
    if weight_right is not None:
        if not use.constant(right):
            return NotImplemented
        if weight_right.value.ndim == 2:
            if not _multiplied(left, use):
                return NotImplemented
            return _linear(capture, left, capture.derive(_T.transpose, (right, 0, 1), {}), None)
        return _stacked(capture, function, left, weight_right, use)
    assert weight_left is not None
    if weight_left.value.ndim == 2 and right.ndim >= 3 and _multiplied(right, use) and use.constant(left):
        result = _linear(capture, right.transpose(-1, -2), left, None)
        return result if result is NotImplemented else result.transpose(-1, -2)
    return NotImplemented


class _Stacked(torch.autograd.Function):
    """``x [G, N, I] @ W [G, I, O]`` with rows N grouped by record, or ``x [B, G, T, I]``."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor, capture: Capture, node: Node) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.node = capture, node
        return torch.matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        batch = ctx.capture.batch
        a, g = (_by_record(rows, batch) for rows in (x.detach(), grad))
        ctx.capture.deliver(ctx.node, Outer(a, g, weight.shape, flipped=True))
        grad_x = grad @ weight.mT if ctx.needs_input_grad[1] else None
        return None, grad_x, None, None, None


def _by_record(rows: Tensor, batch: int) -> Tensor:
    """[G, N, X] with N grouped by record to [B, G, T, X]; four dimensions are already so."""
    if rows.ndim == 4:
        return rows
    return rows.reshape(rows.shape[0], batch, -1, rows.shape[-1]).transpose(0, 1)


def _stacked(capture: Capture, function: Function, x: Tensor, node: Node, use: Use) -> Any:
    if capture.row_records is not None:
        raise refusal(node, function, "it is used on rows sorted by expert")
    if node.value.ndim != 3 or x.ndim not in (3, 4) or use.of(x).dim != 4 - x.ndim:
        return NotImplemented
    if x.shape[-3] != node.value.shape[0]:
        return NotImplemented
    capture.expect(node)
    return applied(_Stacked, capture.anchor, x, node.value.to(x.dtype), capture, node)


def addmm(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """``addmm(bias, x, W)`` (Hugging Face's Conv1D) as a linear layer."""
    if len(args) != 3 or kwargs:
        return NotImplemented
    bias, x, weight = args
    if not (_multiplied(x, use) and use.constant(weight) and use.constant(bias)):
        return NotImplemented
    turned = weight.t() if node_of(weight) is None else capture.derive(_T.t, (weight,), {})
    return _linear(capture, x, turned, bias)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, ids: Tensor, weight: Tensor, padding: int | None, capture: Capture, node: Node
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.capture, ctx.node, ctx.shape, ctx.padding = capture, node, weight.shape, padding
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        ids_BT = ids.reshape(ctx.capture.batch, -1)
        ids_BT = torch.where(ids_BT < 0, ids_BT + ctx.shape[0], ids_BT)
        if ctx.padding is not None:
            ids_BT = torch.where(ids_BT == ctx.padding % ctx.shape[0], -1, ids_BT)
        width = ctx.shape[1:].numel()
        ctx.capture.deliver(ctx.node, Lookup(ids_BT, grad.reshape(*ids_BT.shape, width), ctx.shape))
        return None, None, None, None, None, None


def embedding(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """``F.embedding(ids, W)``."""
    ids, weight, padding, max_norm, _, by_frequency = _signature(
        args, kwargs, "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"
    )
    node = node_of(weight)
    if node is None:
        return NotImplemented
    if max_norm is not None or by_frequency:
        raise refusal(node, function, "max_norm and scale_grad_by_freq mix the records of a batch")
    return _lookup(capture, function, ids, weight, padding, use)


def _lookup(capture: Capture, function: Function, ids: Tensor, table: Tensor, padding: int | None, use: Use) -> Any:
    node = node_of(table)
    if node is None or node_of(ids) is not None:
        return NotImplemented
    if capture.row_records is not None:
        raise refusal(node, function, "it is used on rows sorted by expert")
    if not use.records_first(ids) or not use.constant(table):
        return NotImplemented
    capture.expect(node)
    return applied(_Embedding, capture.anchor, ids, node.value, padding, capture, node)


def getitem(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """``W[ids]`` as a table."""
    table, index = args
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool:
        return _lookup(capture, function, index, table, None, use)
    return NotImplemented


def index_select(
    capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use
) -> Any:
    """``W.index_select(0, ids)``, the same as ``W[ids]``."""
    table, dim, ids = _signature(args, kwargs, "input", "dim", "index")
    return _lookup(capture, function, ids, table, None, use) if dim == 0 and ids.ndim == 1 else NotImplemented


MATRIX_RULES: dict[Function, Rule] = {
    F.linear: linear,
    torch.matmul: matmul,
    _T.matmul: matmul,
    _T.__matmul__: matmul,
    _T.__rmatmul__: matmul,
    torch.mm: matmul,
    _T.mm: matmul,
    torch.bmm: matmul,
    _T.bmm: matmul,
    torch.addmm: addmm,
    F.embedding: embedding,
    _T.__getitem__: getitem,
    torch.index_select: index_select,
    _T.index_select: index_select,
}
