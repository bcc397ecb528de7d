"""Matrix products over rows that are sorted by expert.

Shape letters: E experts, R routed rows (one per chosen (token, expert) pair), I inputs, O outputs.
``ends_E[e]`` is the number of rows that belong to experts 0..e, so expert e owns the rows
``ends_E[e-1]:ends_E[e]``.

Everything here is closed form: no function needs autograd, so an expert host can call them from any thread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.models.widened import room_for

_ALIGN_BYTES = 16


def _native(x_RI: Tensor, weight_EIO: Tensor) -> bool:
    """Whether torch's own grouped kernel takes these tensors and is the faster choice.

    It wants bfloat16, CUDA compute capability 8.0 or newer and row strides that are multiples of 16 bytes.
    On CPU a loop over experts is as fast and has none of its restrictions (no float64, no stride-0 gradients).
    """
    if x_RI.device.type != "cuda" or x_RI.dtype != torch.bfloat16 or x_RI.shape[0] == 0:
        return False
    if weight_EIO.dtype != x_RI.dtype:
        return False
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    sizes = (x_RI.shape[-1], weight_EIO.shape[-1])
    if any(n * x_RI.element_size() % _ALIGN_BYTES for n in sizes):
        return False
    return torch.cuda.get_device_capability(x_RI.device) >= (8, 0)


def grouped_mm(x_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the matrix of its expert.

    Args:
        x_RI: rows sorted by expert.
        weight_EIO: one matrix per expert, any strides, same device as ``x_RI``. Of another dtype, the matrix of one
            expert after the other is converted to that of ``x_RI``.
        ends_E: int32 or int64, cumulative row counts.

    Returns:
        [R, O], dtype of ``x_RI``.
    """
    if _native(x_RI, weight_EIO):
        return torch.nn.functional.grouped_mm(x_RI.contiguous(), weight_EIO, offs=ends_E.to(torch.int32))
    out = x_RI.new_empty(x_RI.shape[0], weight_EIO.shape[-1])
    converted = None if weight_EIO.dtype == x_RI.dtype else room_for(weight_EIO[0], x_RI.dtype)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            matrix = weight_EIO[expert]
            torch.mm(x_RI[start:end], matrix if converted is None else converted.copy_(matrix), out=out[start:end])
        start = end
    return out


def grouped_outer(x_RI: Tensor, grad_RO: Tensor, ends_E: Tensor) -> Tensor:
    """Sum of outer products per expert: the gradient of ``grouped_mm`` with respect to its weight.

    Returns:
        [E, I, O], dtype of ``x_RI``; zero for an expert without rows.
    """
    num_experts, inputs, outputs = ends_E.shape[0], x_RI.shape[1], grad_RO.shape[1]
    if _native(x_RI, grad_RO.unsqueeze(0)):
        return torch.nn.functional.grouped_mm(
            x_RI.contiguous().t(), grad_RO.contiguous(), offs=ends_E.to(torch.int32)
        )
    out = x_RI.new_zeros(num_experts, inputs, outputs)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_RI[start:end].t(), grad_RO[start:end], out=out[expert])
        start = end
    return out


def grouped_sum(grad_RO: Tensor, ends_E: Tensor) -> Tensor:
    """Sum of rows per expert: the gradient of a bias that is added to every row of its expert. [E, O]."""
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    expert_R = torch.repeat_interleave(torch.arange(ends_E.shape[0], device=ends_E.device), counts)
    out = grad_RO.new_zeros(ends_E.shape[0], grad_RO.shape[1])
    return out.index_add_(0, expert_R, grad_RO)


class GroupedLinear(torch.autograd.Function):
    """``grouped_mm`` with closed-form gradients; the weight may be stored [E, I, O] or [E, O, I].

    ``apply(x_RI, weight, ends_E, is_transposed)`` with HF's meaning of ``is_transposed``: True for [E, I, O].
    """

    @staticmethod
    def forward(x_RI: Tensor, weight: Tensor, ends_E: Tensor, is_transposed: bool) -> Tensor:
        return grouped_mm(x_RI, as_EIO(weight, is_transposed), ends_E)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_RI, weight, ends_E, is_transposed = inputs
        ctx.save_for_backward(x_RI, weight, ends_E)
        ctx.is_transposed = is_transposed  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_RO: Tensor) -> tuple[Any, ...]:
        x_RI, weight, ends_E = ctx.saved_tensors  # type: ignore[attr-defined]
        is_transposed: bool = ctx.is_transposed  # type: ignore[attr-defined]
        needs_x, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad_x = grad_weight = None
        if needs_x:
            grad_x = grouped_mm(grad_RO, as_EIO(weight, is_transposed).transpose(1, 2), ends_E)
        if needs_weight:
            grad_weight = weight_outer(x_RI, grad_RO, ends_E, is_transposed)
        return grad_x, grad_weight, None, None


def no_wider(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight that is multiplied in ``dtype``: as it is where it is narrower, so that `grouped_mm` widens the matrix
    of one expert after the other and never all of them."""
    return weight if weight.dtype.itemsize < dtype.itemsize else weight.to(dtype)


def as_EIO(weight: Tensor, is_transposed: bool) -> Tensor:
    """A view of an expert weight as [E, I, O] whatever its storage."""
    return weight if is_transposed else weight.transpose(1, 2)


def weight_outer(x_RI: Tensor, grad_RO: Tensor, ends_E: Tensor, is_transposed: bool) -> Tensor:
    """``grouped_outer`` in the storage order of the weight it is the gradient of."""
    if is_transposed:
        return grouped_outer(x_RI, grad_RO, ends_E)
    return grouped_outer(grad_RO, x_RI, ends_E)
