"""Work that releases the interpreter lock, shared out over as many threads as torch may use."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Job = TypeVar("_Job")
_MOST = 16


def thread_count() -> int:
    """As many as torch uses, and at most 16."""
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1, _MOST))


def run_in_threads(function: Callable[[_Job], None], jobs: Sequence[_Job]) -> None:
    """``function`` of every job; whatever one of them raises is raised here, after the others are done."""
    if len(jobs) == 1:
        function(jobs[0])
        return
    # Also where one thread is all there is: what a compiler leaves on a heap of its own is not between large tensors.
    futures = [_pool(os.getpid(), thread_count()).submit(function, job) for job in jobs]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool, kept: it is used many times a step. A forked child has none of these threads, and makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="coterie-dp")
