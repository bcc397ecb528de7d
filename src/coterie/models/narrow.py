"""Frozen weights that lie in the number format they came in, and are computed with in a wider one.

Whoever computes with a `Narrow` computes with its widened values, which are exact, so every number is the one that
widened weights would give. They exist for the length of one operation: the backward keeps what is narrow and widens
it once more. Everything that asks such a weight for its dtype is told what is computed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from coterie.models.widened import room_for

_aten = torch.ops.aten
_SAME_VALUES = {
    _aten.alias.default, _aten.detach.default, _aten.permute.default, _aten.t.default, _aten.transpose.int,
    _aten.view.default,
}  # fmt: skip
"""Operations that only look at a tensor differently."""

_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
"""Operations that are done with their operands when they return."""


class Narrow(Tensor):
    """A tensor whose values are stored in fewer bytes than its dtype has, exactly. It cannot be written to.

    Attributes:
        stored: the values.
    """

    # Not a function of its own that does nothing: other classes of an operation's tensors would no longer see it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor, dtype: torch.dtype) -> Self:
        made: Self = Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's own way to make such a class
            cls, stored.shape, strides=stored.stride(), dtype=dtype, device=stored.device
        )
        made.stored = stored
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Narrow({tuple(self.shape)}, {self.stored.dtype} as {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = Narrow(self.stored.clone(), self.dtype)
        memo[id(self)] = torch.nn.Parameter(copied, False) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _SAME_VALUES:
            return cls(function(args[0].stored, *args[1:], **kwargs), args[0].dtype)
        if function is _aten.embedding.default:  # the looked-up rows alone
            return function(args[0].stored, *args[1:], **kwargs).to(args[0].dtype)
        if function is _aten.set_.source_Tensor and args[0] is args[1]:  # a parametrization (peft's, of a router)
            return args[0]
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise RuntimeError(f"{function} would write to frozen weights that are kept as {value.stored.dtype}")
        once = function in _PRODUCTS and sum(isinstance(value, cls) for value in args) == 1

        def wide(value: Narrow) -> Tensor:
            stored, dtype = value.stored, value.dtype
            return room_for(stored, dtype).copy_(stored) if once else stored.to(dtype)

        return function(*tree_map_only(cls, wide, args), **tree_map_only(cls, wide, kwargs))


def frozen_as_stored(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that nobody will train, to be computed with in a dtype: matrices stay narrow, all else is converted.

    Args:
        stored: as a file has them.
        dtype: that is computed in.
    """
    narrow = stored.is_floating_point() and stored.dtype.itemsize < dtype.itemsize and stored.ndim > 1
    # What was read may be a view of the file, whose pages would count, and which somebody may write to.
    return Narrow(stored.clone(), dtype) if narrow else stored.to(dtype)
