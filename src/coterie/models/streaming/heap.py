"""Memory that was freed, back to the system.

glibc maps a large block and unmaps it when it is freed; but each that is freed raises the size from which blocks are
mapped, to 32 MiB in the end. What is smaller comes from heaps then, and of those only the end is ever given back:
what was freed between two blocks in use stays. Layers that are fetched and put together leave as much as they hold.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ARENA_MAX = -8
"""Of mallopt: the most heaps that threads share."""

_MUCH = 64 << 20
"""Bytes of free pages: what a forward through one layer leaves."""


@dataclass
class _Seen:
    """Of this process.

    Attributes:
        other: bytes of resident pages that hold no blocks of C, as they were when free ones were given back last.
        needed: bytes of these and of blocks in use, the most so far.
    """

    other: int = 0
    needed: int = 0


_SEEN = _Seen()


class _Blocks(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _glibc(function: str) -> Any:
    """A function that glibc has; None with another C library."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def share_heaps() -> None:
    """Let all threads share two heaps, in a process of our own: glibc would make one for each, and a party has many.

    What a person has set in the environment stays.
    """
    set_by_person = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = _glibc("mallopt")
    if mallopt is not None and not set_by_person:
        mallopt(_ARENA_MAX, 2)


def give_back_freed() -> None:
    """Give back whole pages that are free, also between blocks in use. Does nothing without glibc.

    Cost: milliseconds, in which no other thread allocates; what is allocated next is cleared by the system again.
    """
    if _glibc("malloc_trim") is not None:
        _glibc("malloc_trim")(0)
        _SEEN.other = max(0, _resident_bytes() - _bytes_in_use())


def give_back_at_a_peak() -> None:
    """`give_back_freed` where this process would else become the larger for pages that are free.

    As long as it is no larger than what it needed at some moment, and 64 MiB beside, they are left for what is
    allocated next: they are cheaper than new ones, and its peak stays what it is.

    Cost: some ten microseconds; where pages are given back, see there.
    """
    _SEEN.needed = max(_SEEN.needed, _SEEN.other + _bytes_in_use())
    if _resident_bytes() > _SEEN.needed + _MUCH:
        give_back_freed()


def _resident_bytes() -> int:
    """Of all pages; 0 where the system does not say it."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def _bytes_in_use() -> int:
    """Of all blocks of C; 0 without glibc."""
    found = _glibc("mallinfo2")
    if found is None:
        return 0
    found.restype = _Blocks
    blocks = found()
    return int(blocks.uordblks + blocks.hblkhd)
