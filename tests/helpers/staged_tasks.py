"""Runs of ranks whose tensors count as those of GPUs, so that they go through copies in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.ranks import ways
from coterie.ranks.ranks import Ranks
from helpers import rank_tasks, spread_tasks

RUNS: list[tuple[Any, dict[str, Any]]] = [
    (rank_tasks.train_with, {"rounds": 1, "self_check": True}),
    (rank_tasks.train_with, {"rounds": 1, "isolation": "exact", "self_check": True}),
    (spread_tasks.train, {"rounds": 1}),
    (spread_tasks.train, {"rounds": 1, "gathered": True}),
]


@contextmanager
def as_on_gpus(types: set[str]) -> Iterator[None]:
    """Inside, no tensor counts as one in host memory; their types are kept."""

    def elsewhere(tensor: Tensor) -> bool:
        types.add(str(tensor.dtype).removeprefix("torch."))
        return False

    before = ways.in_host_memory
    setattr(ways, "in_host_memory", elsewhere)  # noqa: B010 - fixed in the product
    try:
        yield
    finally:
        setattr(ways, "in_host_memory", before)  # noqa: B010


def both_ways(ranks: Ranks, folder: Path) -> tuple[list[bool], list[str]]:
    """Whether runs come to the same bits by both ways, and the types of what crossed."""
    same, types = [], set[str]()
    for number, (train, options) in enumerate(RUNS):
        directly = train(ranks, folder / f"{number}", options)["weights"]
        with as_on_gpus(types):
            same.append(train(ranks, folder / f"{number} staged", options)["weights"] == directly)
    return same, sorted(types)
