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

from coterie.dp.per_sample.capture import Capture, Rule, Use, node_of
from coterie.dp.per_sample.terms import Aligned, Dense, Lookup, Term
from coterie.dp.per_sample.weight_expressions import Function, Node
from coterie.models.autograd import applied

_T = torch.Tensor


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, shape: torch.Size, capture: Capture, node: Node, repeated: bool
    ) -> Tensor:
        ctx.capture, ctx.node, ctx.row_records, ctx.repeated = capture, node, capture.row_records, repeated
        return value.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.capture.deliver(*settle(ctx.node, grad, ctx.capture.batch, ctx.row_records, ctx.repeated))
        return None, None, None, None, None, None


def settle(node: Node, grad: Tensor, batch: int, row_records: Tensor | None, repeated: bool) -> tuple[Node, Term]:
    """The term of an expanded value, given the gradient of every entry of the expansion.

    ``repeated``: the value's own first dimension already was the records'.

    Values that were themselves made by repeating (``expand``, a table looked up at fixed positions) are taken back
    one step, where the gradients are smaller.
    """
    shape = (*(1,) * (grad.ndim - node.value.ndim), *node.value.shape)
    if repeated:
        return settle_repeated(node, _summed(grad, (grad.shape[0], *shape[1:])), batch)
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


def settle_repeated(node: Node, grad: Tensor, batch: int) -> tuple[Node, Term]:
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


def expand(capture: Capture, node: Node, shape: torch.Size, repeated: bool = False) -> Tensor:
    """The node's value expanded to ``shape``, its gradient per record arranged for; ``repeated`` as in `settle`."""
    capture.expect(node)
    return applied(_Expand, capture.anchor, node.value, shape, capture, node, repeated)


def elementwise(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """Any broadcasting operation of parameters with data."""
    sizes = (tensor.shape for tensor in use.operands)
    shape: torch.Size = torch.broadcast_shapes(*sizes)  # type: ignore[no-untyped-call]
    if not _records_first(use, len(shape)):
        return NotImplemented

    def plain(item: Any) -> Any:
        node = node_of(item)
        return item if node is None else expand(capture, node, shape, use.records_first(item))

    return function(*(plain(item) for item in args), **{key: plain(item) for key, item in kwargs.items()})


def _records_first(use: Use, ndim: int) -> bool:
    """The result of broadcasting has the records in its first dimension, from all operands that hold any."""
    for tensor, meaning in zip(use.operands, use.meanings, strict=True):
        if meaning.dim > 0 or meaning.dim < -1:
            return False
        if meaning.dim == 0 and tensor.ndim != ndim:
            return False
        if meaning.dim == -1 and (
            (tensor.ndim == ndim and ndim and tensor.shape[0] != 1)
            or (tensor.requires_grad and node_of(tensor) is None)
        ):
            return False
    return any(meaning.dim == 0 for meaning in use.meanings)


def layer_norm(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use) -> Any:
    """``F.layer_norm`` and ``F.rms_norm``: normalise without weight, then scale and shift entry by entry."""
    names: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")
    if function is F.rms_norm:
        names = ("input", "normalized_shape", "weight", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    data = given["input"]
    if node_of(data) is not None or not use.records_first(data) or data.ndim <= len(given["normalized_shape"]):
        return NotImplemented
    if not (use.constant(weight) and use.constant(bias)):
        return NotImplemented
    out = function(**given)
    for step, parameter in ((torch.mul, weight), (torch.add, bias)):
        if parameter is not None:
            both = Use((out, parameter), (use.of(data), use.of(parameter)))
            tracked = node_of(parameter) is not None
            out = elementwise(capture, step, (out, parameter), {}, both) if tracked else step(out, parameter)
    return out


_NAMES = (
    "add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "where", "lerp", "addcmul", "addcdiv",
    "rsub", "logaddexp", "hypot", "atan2", "fmod", "remainder", "masked_fill", "clamp", "xlogy",
)  # fmt: skip
_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow")
_IN_PLACE = ("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def _functions() -> list[Function]:
    functions = [getattr(owner, name) for name in _NAMES for owner in (torch, _T) if hasattr(owner, name)]
    functions += [getattr(_T, f"__{name}__") for name in _OPERATORS if hasattr(_T, f"__{name}__")]
    return functions + [getattr(_T, name) for name in _IN_PLACE]


ELEMENTWISE_RULES: dict[Function, Rule] = {
    **dict.fromkeys(_functions(), elementwise),
    F.layer_norm: layer_norm,
    F.rms_norm: layer_norm,
}
