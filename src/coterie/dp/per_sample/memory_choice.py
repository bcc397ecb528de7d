"""Which of the two ways of clipping a batch gets: one backward that keeps its captures, or two that keep nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import psutil
import torch
from torch import Tensor

from coterie.dp.losses import Batch

Method = Literal["auto", "book_keeping", "ghost"]


class MemoryChoice:
    """The choice for each batch; ``auto`` measures the first one's captures.

    Args:
        method: as set.
        devices: where the model's parameters are.

    Attributes:
        method: as set.
    """

    def __init__(self, method: Method, devices: Sequence[torch.device]) -> None:
        self.method = method
        self._devices = devices
        self._bytes_per_value: float | None = None

    def next(self, batch: Batch) -> Method:
        """Ghost for the first batch of ``auto``, to measure; then book-keeping if its captures take half at most."""
        if self.method != "auto":
            return self.method
        if self._bytes_per_value is None:
            return "ghost"
        need = self._bytes_per_value * _values(batch)
        return "book_keeping" if need < 0.5 * _free_bytes(self._devices) else "ghost"

    def measured(self, batch: Batch, captured_bytes: int) -> None:
        """What a batch's captures took, or would have taken."""
        self._bytes_per_value = captured_bytes / max(_values(batch), 1)


def _values(batch: Batch) -> int:
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=1)


def _free_bytes(devices: Sequence[torch.device]) -> int:
    cuda = [device for device in devices if device.type == "cuda"]
    if cuda:
        return min(torch.cuda.mem_get_info(device)[0] for device in cuda)
    return int(psutil.virtual_memory().available)
