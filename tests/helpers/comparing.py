"""Tensors against tensors: how far apart two are."""

from __future__ import annotations

import math

from torch import Tensor


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; infinite where it is no number, which `max` would leave out."""
    found, expected = found.detach(), expected.detach()
    off = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    return math.inf if math.isnan(off) else off
