"""What the C library keeps of memory that was freed.

glibc maps large blocks and unmaps them when they are freed; but each that is freed raises the size from which blocks
are mapped, to 32 MiB in the end. Matrices, messages and gradients below that then come from heaps, which keep what
lies between two blocks in use: of a party with 118 million parameters, 450 MB. And it makes a heap for each thread.
"""

from __future__ import annotations

import ctypes
import os
import sys

_MIB = 1 << 20
_SETTINGS = (
    # (parameter of mallopt, environment variable, its name among GLIBC_TUNABLES, value)
    (-3, "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold", _MIB),
    (-1, "MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold", _MIB),
    (-8, "MALLOC_ARENA_MAX", "glibc.malloc.arena_max", 2),
)


def give_back_freed() -> None:
    """Map blocks of 1 MiB and more, whatever was freed before, and share two heaps among all threads.

    What a person has set in the environment stays. Other C libraries have no such settings, and nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    for parameter, variable, tunable, value in _SETTINGS:
        if variable not in os.environ and tunable not in tunables:
            mallopt(parameter, value)
