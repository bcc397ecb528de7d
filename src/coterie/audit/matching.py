"""Which guess stands for which record, one to one, and how much of it is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_place(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two records have in common, place by place."""
    return sum(a == b for a, b in zip(one, other, strict=False))


def matched(truth: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]]) -> list[int]:
    """For each true record the tokens in place of its guess; a guess counts for one record, the best pair first."""
    found = [0] * len(truth)
    for count, row, _ in pairs(truth, guesses):
        found[row] = count
    return found


def pairs(truth: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Tokens in place, record and guess of each pair, until one side is used up."""
    possible = sorted(
        (
            (in_place(record, guess), row, column)
            for row, record in enumerate(truth)
            for column, guess in enumerate(guesses)
        ),
        reverse=True,
    )
    rows: set[int] = set()
    columns: set[int] = set()
    chosen = []
    for count, row, column in possible:
        if row not in rows and column not in columns:
            chosen.append((count, row, column))
            rows.add(row)
            columns.add(column)
    return chosen


def places_in(counts: Sequence[int], lengths: Sequence[int], documents: Tensor) -> tuple[Tensor, Tensor]:
    """So many right places of each record, bool [P], and their documents; only sums over records mean something."""
    right = [place < count for count, length in zip(counts, lengths, strict=True) for place in range(length)]
    return torch.tensor(right, dtype=torch.bool), documents.repeat_interleave(
        torch.tensor(lengths, dtype=torch.int64)
    )
