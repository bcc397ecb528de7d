"""Full float32 products for the engine's own norms and sums, whatever precision the caller trains in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DEVICES = ("cpu", "cuda")


@contextmanager
def full_float32() -> Iterator[None]:
    """Autocast off, and float32 matrix products in float32: no TF32, no bfloat16 passes. Put back afterwards.

    Slack and eta are bounds for float32. A norm computed in a lower precision can be too small by more than they
    allow, and the record would contribute more than C.
    """
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Float32 matrix products on a GPU read 11 significant bits of each operand: for operands that have no more."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def in_full_float32(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`full_float32` around every call."""

    @wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with full_float32():
            return function(*args, **kwargs)

    return guarded
