"""What ranks of a party do on a device that is not the processor: the one that benchmarks compile and count on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch

from coterie.ranks.ranks import Ranks
from helpers import party_tasks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def device() -> ModuleType:
    """The benchmarks' device."""
    sys.path.insert(0, str(BENCHMARKS))
    import counted_device

    return counted_device


def checked(ranks: Ranks, folder: Path, compiled: Path) -> tuple[int, float, int]:
    """`party_tasks.checked` on that device, and the most bytes that this rank held there."""
    torch.set_num_threads(1)
    there = device().install(compiled)
    count, difference = party_tasks.checked(ranks, folder)
    return count, difference, there.peak()
