"""What happens to an operation on a trainable parameter: the table, and what is done with operations not in it.

In order: a rule of its own (`rules_matrix`, `rules_elementwise`, `rules_other`); an operation on parameters alone,
which is only remembered; an operation whose parameter was already repeated over the records; replaying it one record
at a time, where the parameter is small and every input has the records first; refusal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.dp.capture import Capture, Rule, iterate_nodes, node_of, nodes, refusal, tensors, values
from coterie.dp.derived import Function
from coterie.dp.rules_elementwise import ELEMENTWISE_RULES
from coterie.dp.rules_matrix import MATRIX_RULES
from coterie.dp.rules_other import OTHER_RULES, aligned, replayed
from coterie.errors import NoRuleError

RULES: dict[Function, Rule] = {**MATRIX_RULES, **ELEMENTWISE_RULES, **OTHER_RULES}

SMALL = 1 << 16
"""Most entries of a parameter whose unknown operation is replayed record by record."""


def apply_rule(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``function(*args, **kwargs)``, with every parameter's gradient arranged for.

    Where no rule covers the use, the result is guarded: `NoRuleError` is raised once a gradient comes back to it.
    Uses that never get one (an indexer that only picks positions) are harmless.
    """
    try:
        return _apply(capture, function, args, kwargs)
    except NoRuleError as error:
        result = function(*values(args), **values(kwargs))
        if isinstance(result, tuple | list):
            return type(result)(_guarded(capture, part, error) for part in result)
        return _guarded(capture, result, error)


def _guarded(capture: Capture, result: Any, error: NoRuleError) -> Any:
    if isinstance(result, Tensor) and result.is_floating_point():
        return _Guard.apply(capture.anchor, result, error.with_traceback(None))
    return result


class _Guard(torch.autograd.Function):
    """Passes a value through and raises when a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, error: NoRuleError) -> Tensor:
        ctx.error = error
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise ctx.error


def _apply(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rule = RULES.get(function)
    if rule is not None:
        result = rule(capture, function, args, kwargs)
        if result is not NotImplemented:
            return result
    sources = list(iterate_nodes(nodes((args, kwargs))))
    if _is_in_place(function, args):
        raise refusal(sources[0], function, "it changes a parameter in place during the forward")
    data = [tensor for tensor in tensors((args, kwargs)) if node_of(tensor) is None]
    if not any(tensor.requires_grad for tensor in data):
        return capture.derive(function, args, kwargs)
    lengths = {tensor.shape[0] if tensor.ndim else 0 for tensor in data if tensor.requires_grad}
    if len(lengths) != 1 or capture.row_records is not None:
        raise refusal(sources[0], function, "its inputs do not have the records in their first dimension")
    if all(source.value.ndim and source.value.shape[0] in lengths and source.function for source in sources):
        return aligned(capture, function, args, kwargs)
    if all(source.value.numel() <= SMALL for source in sources):
        return replayed(capture, function, args, kwargs)
    raise refusal(sources[0], function, f"there is no rule for `{getattr(function, '__name__', function)}`")


def _is_in_place(function: Function, args: tuple[Any, ...]) -> bool:
    name = getattr(function, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    return bool(in_place and args and isinstance(args[0], Tensor) and node_of(args[0]) is not None)
