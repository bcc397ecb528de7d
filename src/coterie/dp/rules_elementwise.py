"""Rules for parameters that meet data entry by entry: norm weights, biases, scales, decay rates.

The parameter's plain value is expanded to the shape of the result by an autograd function whose backward receives
the gradient of every entry, before anything is summed; it sums over each record's own entries.

Shape letters: B records.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.dp.capture import Capture, Rule, node_of, refusal, tensors
from coterie.dp.derived import Function, Node
from coterie.dp.terms import Aligned, Dense, Lookup, Term

_T = torch.Tensor


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, shape: torch.Size, capture: Capture, node: Node) -> Tensor:
        ctx.capture, ctx.node, ctx.row_records = capture, node, capture.row_records
        return value.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.capture.deliver(*settle(ctx.node, grad, ctx.capture.batch, ctx.row_records))
        return None, None, None, None, None


def settle(node: Node, grad: Tensor, batch: int, row_records: Tensor | None) -> tuple[Node, Term]:
    """The term of an expanded value, given the gradient of every entry of the expansion.

    Values that were themselves made by repeating (``expand``, a table looked up at fixed positions) are taken back
    one step, where the gradients are smaller.
    """
    shape = (*(1,) * (grad.ndim - node.value.ndim), *node.value.shape)
    if shape[0] != 1 and shape[0] == grad.shape[0]:
        return _settle_aligned(node, _summed(grad, (grad.shape[0], *shape[1:])), batch)
    if row_records is None:
        grouped = grad.reshape(batch, -1, *grad.shape[1:])
        # Sum a record's rows, and every other dimension along which the value was repeated.
        gradients = _summed(grouped.unsqueeze(1), (batch, 1, 1, *shape[1:]))
    else:
        rows = _summed(grad, (grad.shape[0], *shape[1:])).float()
        gradients = rows.new_zeros(batch, *shape[1:]).index_add_(0, row_records, rows)
    return _settle_lookup(node, gradients.reshape(batch, *node.value.shape))


def _summed(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    dims = [i for i, (have, want) in enumerate(zip(grad.shape, shape, strict=True)) if have != want]
    return grad.sum(dims, keepdim=True, dtype=torch.float32) if dims else grad


def _settle_aligned(node: Node, grad: Tensor, batch: int) -> tuple[Node, Term]:
    source = node.args[0] if node.function is _T.expand else None
    if isinstance(source, Node):
        padded = (*(1,) * (grad.ndim - source.value.ndim), *source.value.shape)
        if padded[0] == 1:
            grouped = grad.reshape(batch, -1, *grad.shape[1:])
            gradients = _summed(grouped.unsqueeze(1), (batch, 1, 1, *padded[1:]))
            return _settle_lookup(source, gradients.reshape(batch, *source.value.shape))
    return node, Aligned(grad, batch)


def _settle_lookup(node: Node, gradients_B: Tensor) -> tuple[Node, Term]:
    """A table looked up at ids that all records share: back to the table's rows."""
    if node.function is F.embedding and node.kwargs.get("padding_idx") is None:
        ids, table = node.args[:2]
        if isinstance(table, Node) and isinstance(ids, Tensor) and (len(node.args) < 3 or node.args[2] is None):
            batch = gradients_B.shape[0]
            ids_BT = ids.reshape(1, -1).expand(batch, -1)
            return table, Lookup(ids_BT, gradients_B.reshape(batch, -1, table.value.shape[-1]), table.value.shape)
    return node, Dense(gradients_B)


def expand(capture: Capture, node: Node, shape: torch.Size) -> Tensor:
    """The node's value expanded to ``shape``, its gradient per record arranged for."""
    if len(shape) == 0:
        raise refusal(node, torch.Tensor.expand, "it meets a single number, which belongs to no record")
    capture.expect(node)
    return _Expand.apply(capture.anchor, node.value, shape, capture, node)


def elementwise(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any broadcasting operation of parameters with data."""
    operands = list(tensors((args, kwargs)))
    data = [tensor for tensor in operands if node_of(tensor) is None]
    if not any(tensor.requires_grad for tensor in data):
        return NotImplemented
    if args and node_of(args[0]) is not None and _in_place(function):
        raise refusal(node_of(args[0]), function, "it changes a parameter in place")  # type: ignore[arg-type]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in operands))
    sources = [node for tensor in operands if (node := node_of(tensor)) is not None]
    if capture.row_records is None and not _records_first(capture, function, sources[0], shape, data):
        raise refusal(sources[0], function, f"the result of shape {list(shape)} does not have the records first")

    def plain(item: Any) -> Any:
        node = node_of(item)
        return item if node is None else expand(capture, node, shape)

    return function(*(plain(item) for item in args), **{key: plain(item) for key, item in kwargs.items()})


def _records_first(capture: Capture, function: Function, node: Node, shape: torch.Size, data: list[Tensor]) -> bool:
    widest = max((tensor for tensor in data if tensor.requires_grad), key=lambda tensor: tensor.ndim)
    if widest.ndim < len(shape) or (widest.shape[0] == 1 and shape[0] != 1 and capture.batch != 1):
        return False
    return capture.rows_of(node, function, widest) is not None


def _in_place(function: Function) -> bool:
    name = function.__name__
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def layer_norm(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.layer_norm`` and ``F.rms_norm``: normalise without weight, then scale and shift entry by entry."""
    names: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")
    if function is F.rms_norm:
        names = ("input", "normalized_shape", "weight", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    if node_of(given["input"]) is not None:
        return NotImplemented
    out = function(**given)
    if weight is not None:
        out = _scaled(capture, torch.mul, out, weight)
    return out if bias is None else _scaled(capture, torch.add, out, bias)


def _scaled(capture: Capture, function: Function, data: Tensor, parameter: Tensor) -> Any:
    if node_of(parameter) is None:
        return function(data, parameter)
    result = elementwise(capture, function, (data, parameter), {})
    return capture.derive(function, (data, parameter), {}) if result is NotImplemented else result


_NAMES = (
    "add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "where", "lerp", "addcmul", "addcdiv",
    "rsub", "logaddexp", "hypot", "atan2", "fmod", "remainder", "masked_fill", "clamp", "xlogy",
)  # fmt: skip
_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow")
_IN_PLACE = ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def _functions() -> list[Function]:
    found = [getattr(owner, name) for name in _NAMES for owner in (torch, _T) if hasattr(owner, name)]
    found += [getattr(_T, f"__{name}__") for name in _OPERATORS if hasattr(_T, f"__{name}__")]
    return found + [getattr(_T, name) for name in _IN_PLACE]


ELEMENTWISE_RULES: dict[Function, Rule] = {
    **dict.fromkeys(_functions(), elementwise),
    F.layer_norm: layer_norm,
    F.rms_norm: layer_norm,
}
