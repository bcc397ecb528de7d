"""One matrix at a time, widened to be multiplied, into memory that is kept for the next one.

A block that is allocated and freed for each matrix would be taken from another hole of the heap each time, until the
pages of all of them are resident (`coterie.models.streaming.heap`).
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Room(threading.local):
    """Of one thread: the memory, by device and dtype."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}


_ROOM = _Room()


@torch.no_grad()
def room_for(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor with the shape and strides of ``matrix.to(dtype)``.

    It is the caller's until this thread asks for the next one.
    """
    strides = torch.empty_like(matrix, device="meta").stride()
    key, size = (matrix.device, dtype), matrix.numel()
    room = _ROOM.kept.get(key)
    if room is None or room.numel() < size:
        _ROOM.kept.pop(key, None)
        with torch.inference_mode(False):  # what is made inside could not be written to outside
            room = _ROOM.kept[key] = torch.empty(size, dtype=dtype, device=matrix.device)
    return room.as_strided(matrix.shape, strides)
