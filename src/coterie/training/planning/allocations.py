"""The most memory that a computation holds at once on a device, as its allocator counts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """What ``compute`` holds on ``device`` at its peak, beyond what was held before it began.

    On a GPU that is torch's own counter. On a CPU the profiler adds up every allocation and release of torch's
    allocator, which slows the computation down; what other libraries allocate is not in it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with _quiet(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        compute()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        return 0
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library writes to standard error, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
