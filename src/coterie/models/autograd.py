"""Calls into autograd for which torch declares no types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle


def applied(function: type[Function], *inputs: Any) -> Tensor:
    """``function.apply(*inputs)`` of a function with one output."""
    apply: Any = function.apply
    output: Tensor = apply(*inputs)
    return output


def applied_to_several(function: type[Function], *inputs: Any) -> tuple[Tensor, ...]:
    """The same, of a function with several outputs."""
    apply: Any = function.apply
    outputs: tuple[Tensor, ...] = apply(*inputs)
    return outputs


def backward(loss: Tensor) -> None:
    """``loss.backward()``."""
    run: Any = loss.backward
    run()


def on_gradient(tensor: Tensor, hook: Callable[[Tensor], Any]) -> RemovableHandle:
    """``tensor.register_hook(hook)``."""
    register: Any = tensor.register_hook
    handle: RemovableHandle = register(hook)
    return handle


def on_accumulated(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """``parameter.register_post_accumulate_grad_hook(hook)``."""
    register: Any = parameter.register_post_accumulate_grad_hook
    handle: RemovableHandle = register(hook)
    return handle
