"""Tensors computed from parameters alone, followed from the parameter to the operation that meets data.

Models seldom use a parameter as it is stored: norms use ``1 + w``, routers ``w.float()``, attention sinks
``s.expand(...)``, LoRA merges ``B @ A``. A `Node` remembers such an expression so that a gradient at its end can be
carried back to the parameter, exactly, by replaying it.

Nothing here holds an autograd graph: values are plain, and an expression is replayed only when it must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from coterie.errors import NoRuleError

Function = Callable[..., Any]


class Kind(IntEnum):
    """How a node relates to its one root, from the cheapest to carry gradients through to the dearest.

    SAME: same entries in the same row-major order with unit derivative (``w``, ``1 + w``, ``w.float()``, views).
    TRANSPOSED: a matrix whose transpose is SAME.
    ISOMETRIC: entries moved or dropped, never repeated or scaled (slices, permutations): gradients keep their norm.
    GENERAL: anything else, or more than one root.
    """

    SAME = 0
    TRANSPOSED = 1
    ISOMETRIC = 2
    GENERAL = 3


@dataclass(eq=False)
class Node:
    """A weight-only value, and how it was made.

    Attributes:
        value: the number itself, plain and detached.
        roots: the trainable parameters it depends on.
        kind: see `Kind`.
        function: None for a root; else ``function(*args, **kwargs)`` gives the value, nodes standing for values.
        part: position in the result of a function that returns several tensors.
    """

    value: Tensor
    roots: tuple[Root, ...] = ()
    kind: Kind = Kind.SAME
    function: Function | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    part: int | None = None


@dataclass(eq=False)
class Root(Node):
    """One trainable parameter during one pass.

    Attributes:
        name: its name in the model.
        expected: uses seen in the forward.
        captured: (node, term) pairs that the backward delivered.
        done: its norm was computed, or its sum added; a later capture would be lost.
    """

    name: str = ""
    expected: int = 0
    captured: list[tuple[Node, Any]] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.roots = (self,)


_T: Any = torch.Tensor
_SAME_WHEN_ALONE = {
    _T.float, _T.double, _T.half, _T.bfloat16, _T.to, _T.type, _T.type_as, _T.clone, torch.clone, _T.contiguous,
    _T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten, _T.squeeze, torch.squeeze, _T.unsqueeze,
    torch.unsqueeze, _T.view_as, _T.reshape_as, _T.cpu, _T.cuda, torch.unflatten, _T.unflatten,
}  # fmt: skip
_SHIFTS = {torch.add, _T.add, _T.__add__, _T.__radd__, torch.sub, _T.sub, _T.__sub__}
_TRANSPOSES = {_T.t, torch.t, _T.T.__get__, _T.mT.__get__}
_SWAPS = {_T.transpose, torch.transpose, _T.swapaxes, torch.swapaxes}
_MOVES = {
    _T.permute, torch.permute, _T.transpose, torch.transpose, _T.swapaxes, torch.swapaxes, _T.mT.__get__,
    _T.chunk, torch.chunk, _T.split, torch.split, _T.unbind, torch.unbind, _T.narrow, torch.narrow, _T.select,
    torch.select, _T.neg, torch.neg, _T.__neg__, _T.flip, torch.flip, _T.roll, torch.roll, _T.__iter__,
}  # fmt: skip


def kind_of(
    function: Function, sources: list[Node], args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> Kind:
    """The kind of ``function(*args, **kwargs)``, judged from the function and its node arguments."""
    if len(sources) != 1 or len(sources[0].roots) != 1 or not value.is_floating_point():
        return Kind.GENERAL
    source = sources[0]
    same_size = value.numel() == source.value.numel()
    reinterpreted = function is _T.view and any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values()))
    if function in _SAME_WHEN_ALONE and same_size and not reinterpreted:
        return source.kind if source.kind != Kind.TRANSPOSED or value.shape == source.value.shape else Kind.ISOMETRIC
    if function in _SHIFTS and value.shape == source.value.shape and not kwargs and len(args) == 2:
        # ``c - w`` turns the sign, which `_T.__rsub__` covers as GENERAL; here the node comes first or is added.
        return source.kind if args[0] is source or function not in (torch.sub, _T.sub) else Kind.GENERAL
    if function in _TRANSPOSES or (
        function in _SWAPS and value.ndim == 2 and value.shape == source.value.shape[::-1]
    ):
        return _transposed(source)
    if function is _T.__getitem__ and _basic_index(args[1]):
        return source.kind if same_size and source.kind == Kind.SAME else max(source.kind, Kind.ISOMETRIC)
    if function in _MOVES:
        return max(source.kind, Kind.ISOMETRIC)
    return Kind.GENERAL


def _transposed(source: Node) -> Kind:
    if source.value.ndim != 2 or source.kind > Kind.TRANSPOSED:
        return max(source.kind, Kind.ISOMETRIC)
    if source.kind == Kind.TRANSPOSED:
        return Kind.SAME
    return Kind.TRANSPOSED if source.value.shape == source.roots[0].value.shape else Kind.ISOMETRIC


def _basic_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts)


def replay(node: Node, leaves: dict[Root, Tensor]) -> Tensor:
    """The node's value again, with other tensors in the roots' place; differentiable if those are."""
    if node.function is None:
        return leaves[node] if isinstance(node, Root) else node.value

    def again(item: Any) -> Any:
        if isinstance(item, Node):
            return replay(item, leaves)
        if isinstance(item, list | tuple) and type(item) is not torch.Size:
            parts = [again(part) for part in item]
            return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
        if isinstance(item, slice):
            return slice(again(item.start), again(item.stop), again(item.step))
        return {key: again(part) for key, part in item.items()} if isinstance(item, dict) else item

    result = node.function(*again(node.args), **again(node.kwargs))
    chosen: Tensor = result if node.part is None else result[node.part]
    return chosen


def same_numbers(again: Tensor, before: Tensor) -> bool:
    """Whether a computation that was repeated gave what it gave before, up to the rounding of its type."""
    if again.shape != before.shape:
        return False
    loose = before.dtype in (torch.float16, torch.bfloat16) or torch.get_float32_matmul_precision() != "highest"
    wide = torch.complex128 if before.is_complex() else torch.float64
    again, before = again.detach().to(wide), before.detach().to(wide)
    finite = torch.isfinite(before)
    largest = before[finite].abs().max() if bool(finite.any()) else 0.0
    apart = torch.where(finite, again - before, 0.0).abs()
    return bool((apart <= (0.05 if loose else 1e-3) * largest).all())


class Pullback:
    """Carries gradients at a node back to one of its roots, as often as wanted. Linear in the gradient.

    Raises:
        NoRuleError: the expression, run again, does not give the value that the forward used (it draws random
            numbers, or something it reads was changed since), or cannot be differentiated.
    """

    def __init__(self, node: Node, root: Root) -> None:
        self._node = node
        self._root = root
        self._graph: tuple[Tensor, Tensor] | None = None
        if node.kind > Kind.TRANSPOSED:
            with torch.enable_grad(), self._explained():
                self._graph = self._replayed(torch.float32)
            if not same_numbers(self._graph[0], node.value):
                raise self._refusal(
                    "run again, it gives another value: it draws random numbers, or what it reads changed"
                )

    def _replayed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaves = {other: other.value.to(dtype) for other in self._node.roots}
        leaf = leaves[self._root] = leaves[self._root].clone().requires_grad_()
        try:
            return replay(self._node, leaves), leaf
        except RuntimeError:
            if dtype == self._root.value.dtype:
                raise
            return self._replayed(self._root.value.dtype)  # beside constants of that type

    def __call__(self, gradient: Tensor) -> Tensor:
        """[*node shape] to [*root shape], float32."""
        shape = self._root.value.shape
        if self._graph is None:
            turned = gradient if self._node.kind == Kind.SAME else gradient.transpose(-1, -2)
            return turned.reshape(shape).float()
        value, leaf = self._graph
        with self._explained():
            (result,) = torch.autograd.grad(
                value, leaf, gradient.reshape(value.shape).to(value.dtype), retain_graph=True, allow_unused=True
            )
        return result.float() if result is not None else torch.zeros(shape, device=gradient.device)

    def batched(self, gradients_B: Tensor) -> Tensor:
        """[B, *node shape] to [B, *root shape], float32."""
        if self._graph is None:
            turned = gradients_B if self._node.kind == Kind.SAME else gradients_B.transpose(-1, -2)
            return turned.reshape(-1, *self._root.value.shape).float()
        return torch.stack([self(gradient) for gradient in gradients_B])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._refusal(f"it cannot be differentiated again ({type(error).__name__})") from error

    def _refusal(self, reason: str) -> NoRuleError:
        name = getattr(self._node.function, "__name__", "an operation")
        return NoRuleError(
            f"The value that `{name}` makes from `{self._root.name}` cannot be carried back to it.",
            where=reason,
            why="norm and sum would be of another gradient than the model's, and clipping would not bound it",
            fix="freeze the parameter, or switch off the randomness on it (dropout of weights)",
        )
