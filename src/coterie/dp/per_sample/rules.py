"""What happens to an operation on a trainable parameter: the table, and what is done with operations not in it.

In order: an operation on parameters alone, which is only remembered; a rule of its own (`rules_matrix`,
`rules_elementwise`, `rules_convolution`); an operation whose parameters were all repeated over the records before;
running it again one record at a time, where the parameter is small; refusal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.dp.per_sample.capture import Capture, Rule, Use, iterate_nodes, mapped, node_of, nodes, refusal, tensors
from coterie.dp.per_sample.guard import Guard
from coterie.dp.per_sample.replays import replayed
from coterie.dp.per_sample.rules_convolution import OTHER_RULES, aligned
from coterie.dp.per_sample.rules_elementwise import ELEMENTWISE_RULES
from coterie.dp.per_sample.rules_matrix import MATRIX_RULES
from coterie.dp.per_sample.sites import CONSTANT, Meaning
from coterie.dp.per_sample.weight_expressions import Function
from coterie.errors import CoterieError, NoRuleError
from coterie.models.autograd import applied

RULES: dict[Function, Rule] = {**MATRIX_RULES, **ELEMENTWISE_RULES, **OTHER_RULES}

_T: Any = torch.Tensor
_LIKE_ANOTHER = {_T.to, _T.type_as, _T.view_as, _T.reshape_as, _T.expand_as}
"""Of their second tensor only shape, type or device matters."""
_IN_PLACE_OPERATORS = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__",
    "__imatmul__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip


def apply_rule(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``function(*args, **kwargs)``, with every parameter's gradient arranged for.

    Where no rule covers the use, the parameters are guarded: autograd runs the operation on values that raise
    `NoRuleError` once a gradient comes back to them. Uses that never get one (an indexer that only picks positions)
    are harmless.

    Raises:
        NoRuleError: it writes into a parameter, or into a value made from one.
    """
    sources = list(iterate_nodes(nodes((args, kwargs))))
    capture.last = sources[0]
    writes = _writes(function, kwargs)
    if writes and any(node_of(tensor) is not None for tensor in tensors((args[:1], kwargs.get("out")))):
        raise refusal(sources[0], function, "it changes a parameter, or a value made from one, in place")
    try:
        return _apply(capture, function, args, kwargs, writes)
    except NoRuleError as error:
        reason = error
    except CoterieError:
        raise
    except Exception as error:  # if the operation itself is at fault, it fails again below
        if capture.recomputing:  # checkpoints stop a recompute by an exception of their own
            raise
        reason = refusal(sources[0], function, f"its rule failed ({type(error).__name__}: {error})")
    return function(*_guarded(capture, args, reason), **_guarded(capture, kwargs, reason))


def _guarded(capture: Capture, items: Any, error: NoRuleError) -> Any:
    error = error.with_traceback(None)

    def guard(item: Any) -> Any:
        node = node_of(item)
        return item if node is None else applied(Guard, capture.anchor, node.value, error)

    return mapped(items, guard)


def _apply(capture: Capture, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool) -> Any:
    operands = list(tensors((args, kwargs)))
    nodes = [node_of(tensor) for tensor in operands]
    node = next(each for each in nodes if each is not None)
    if (None not in nodes and not writes) or (function in _LIKE_ANOTHER and nodes[0] is not None):
        return capture.derive(function, args, kwargs)
    use = Use(operands, _meanings(capture, function, operands))
    if writes:
        if function in ELEMENTWISE_RULES and not any(tensor.is_complex() for tensor in operands):
            result = RULES[function](capture, function, args, kwargs, use)
            if result is not NotImplemented:
                return result
        raise refusal(node, function, "it is written into another tensor")
    data = [
        (tensor, meaning)
        for tensor, meaning, source in zip(operands, use.meanings, nodes, strict=True)
        if source is None and (meaning.dim != CONSTANT.dim or tensor.requires_grad)
    ]
    if not data:
        return capture.derive(function, args, kwargs)
    rule = None if any(source is not None and source.value.is_complex() for source in nodes) else RULES.get(function)
    if rule is not None:
        result = rule(capture, function, args, kwargs, use)
        if result is not NotImplemented:
            return result
    if capture.row_records is not None:
        raise refusal(node, function, "it is used on rows sorted by expert")
    if any(meaning.dim < 0 for _, meaning in data) or any(meaning.dim < CONSTANT.dim for meaning in use.meanings):
        raise refusal(node, function, "one of its inputs does not hold the records in a dimension of its own")
    tracked = [tensor for tensor in operands if node_of(tensor) is not None]
    if all(use.records_first(tensor) and not tensor.is_complex() for tensor in tracked):
        return aligned(capture, function, args, kwargs)
    return replayed(capture, function, args, kwargs, use)


def _meanings(capture: Capture, function: Function, operands: list[Tensor]) -> list[Meaning]:
    rows = capture.row_records
    if rows is None:
        node = next(source for tensor in operands if (source := node_of(tensor)) is not None)
        return list(capture.meanings(node, getattr(function, "__name__", str(function)), operands))
    return [
        Meaning(0, False)
        if node_of(tensor) is None and (tensor.requires_grad or (tensor.ndim and tensor.shape[0] == rows.shape[0]))
        else CONSTANT
        for tensor in operands
    ]


def _writes(function: Function, kwargs: dict[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return name in _IN_PLACE_OPERATORS or bool(kwargs and (kwargs.get("out") is not None or kwargs.get("inplace")))
