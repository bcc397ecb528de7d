"""What several places ask of a tensor: its bytes, and the dtype of a product."""

from __future__ import annotations

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian contents; no copy if the tensor is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What autocast would compute the product of both in, also of a kind that is not on its list; the weight's own
    dtype where it is off."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
