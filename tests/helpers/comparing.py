"""Tensors against tensors: how far apart two are."""

from __future__ import annotations

from torch import Tensor


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))
