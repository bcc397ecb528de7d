"""How much memory training holds."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch import nn


def model_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of parameters, buffers, one gradient per trainable parameter and the optimiser's state.

    Tied parameters count once, and a parameter on the meta device nothing. A gradient counts although it may be
    freed at the moment: every round needs its room.
    """
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    total = sum(tensor.nbytes for tensor in tensors)
    total += sum(param.nbytes for param in model.parameters() if param.requires_grad and not param.is_meta)
    if optimizer is not None:
        for state in optimizer.state.values():
            total += sum(part.nbytes for part in state.values() if isinstance(part, torch.Tensor))
    return total


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far. Importing torch and transformers alone takes about 370 MB.

    On Linux it is the kernel's high-water mark of this program's own memory: what getrusage says starts at the size
    of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
