"""Memory that was freed, back to the system.

glibc maps a large block and unmaps it when it is freed; but each that is freed raises the size from which blocks are
mapped, to 32 MiB in the end. What is smaller comes from heaps then, and of those only the end is ever given back:
what was freed between two blocks in use stays. Layers that are fetched and put together leave as much as they hold.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any

_ARENA_MAX = -8
"""Of mallopt: the most heaps that threads share."""


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
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
