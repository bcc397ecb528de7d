"""Canary and probing records: token ids that stand out, made at random.

A canary should reach as far as the clip norm lets it, and point elsewhere than every other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from coterie.training.data.packing import Sequences

Ids = list[int]
"""Token ids of one record."""


class CanaryFamily(Protocol):
    """A way of making canaries. Those made of text, or of tokens that a vocabulary gained for them, are others."""

    @property
    def name(self) -> str:
        """For people."""

    def make(self, count: int, vocabulary: int, length: int, chance: np.random.Generator) -> list[Ids]:
        """So many records of different ids.

        Args:
            count: of records.
            vocabulary: ids are below it.
            length: tokens of a record.
            chance: all that is random.
        """


@dataclass(frozen=True)
class Alternating:
    """Two ids in turn, "a b a b ...": they reach furthest, and different pairs are nearly orthogonal."""

    name: str = "two alternating ids"

    def make(self, count: int, vocabulary: int, length: int, chance: np.random.Generator) -> list[Ids]:
        return [
            [int(pair[place % 2]) for place in range(length)] for pair in _different(count, 2, vocabulary, chance)
        ]


@dataclass(frozen=True)
class RandomIds:
    """Ids drawn uniformly."""

    name: str = "random ids"

    def make(self, count: int, vocabulary: int, length: int, chance: np.random.Generator) -> list[Ids]:
        return [[int(token) for token in chance.integers(0, vocabulary, length)] for _ in range(count)]


@dataclass(frozen=True)
class Repeated:
    """One id, again and again."""

    name: str = "one repeated id"

    def make(self, count: int, vocabulary: int, length: int, chance: np.random.Generator) -> list[Ids]:
        return [[int(one[0])] * length for one in _different(count, 1, vocabulary, chance)]


FAMILIES: tuple[CanaryFamily, ...] = (Alternating(), RandomIds())
"""Canaries for one run; each has its share of them."""


def _different(count: int, each: int, vocabulary: int, chance: np.random.Generator) -> np.ndarray:
    """[count, each] ids, none of them twice as long as the vocabulary lasts."""
    passes = [chance.permutation(vocabulary) for _ in range(-(-count * each // vocabulary))]
    ids = np.concatenate(passes)[: count * each].reshape(count, each)
    same = ids[:, 0] == ids[:, -1]
    if each > 1:
        ids[same, -1] = (ids[same, -1] + 1) % vocabulary
    return ids


def sequences(records: Sequence[Ids], like: Sequences, users: Sequence[str] | None = None) -> Sequences:
    """Records of token ids, padded as the owner's are.

    Args:
        records: each at least two tokens.
        like: the owner's.
        users: of each record, where units are users; default there: each a user of its own.
    """
    lengths = torch.tensor([0, *(len(record) for record in records)])
    if users is None and like.users is not None:
        users = [f"canary {number}" for number in range(len(records))]
    return Sequences(
        torch.tensor([token for record in records for token in record], dtype=torch.int32),
        lengths.cumsum(0),
        torch.arange(len(records)),
        like.pad_id,
        None if users is None else tuple(users),
    )


def ids_of(records: Sequences, row: int) -> Ids:
    """The token ids of a record."""
    return [int(token) for token in records[row]["input_ids"]]
