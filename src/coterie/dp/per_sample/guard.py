"""The last line: a value that must not get a gradient."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from coterie.errors import NoRuleError


class Guard(torch.autograd.Function):
    """Passes a value through and raises when a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, error: NoRuleError) -> Tensor:
        ctx.error = error
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise copy(ctx.error)  # a traceback in the one that this node holds would keep the graph alive
