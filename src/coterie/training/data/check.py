"""What would be trained: counts, lengths, what is cut off, texts that are there twice or nearly so, and a look."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from coterie.config import DataSpec
from coterie.training.data.chat import encoded, read_template
from coterie.training.data.documents import Documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import encode

_WORDS, _HASHES, _BANDS, _ALIKE = 3, 64, 16, 0.8
_PRIME = (1 << 31) - 1


@dataclass(frozen=True)
class HeldOut:
    """What a run would be measured on.

    Attributes:
        documents, records: documents read, sequences made of them.
        blank: documents that say nothing, which are left out.
        predicted: tokens with a label.
        trained: documents that are in the text to train on, too, word for word.
    """

    documents: int
    records: int
    blank: int
    predicted: int
    trained: int

    @classmethod
    def of(cls, documents: Documents, records: Sequences, training: Documents) -> HeldOut:
        known = set(training.texts)
        trained = sum(text in known for text in documents.texts)
        return cls(len(documents), len(records), documents.blank, records.predicted_tokens, trained)


@dataclass(frozen=True)
class DataReport:
    """What a run would see. For the owner's eyes: it shows text.

    Attributes:
        documents, records: documents read, sequences made of them.
        blank: documents that say nothing, which are left out.
        tokens, predicted: in all records; those with a label.
        shortest, median, longest: tokens of a record.
        cut, cut_tokens: documents of which something is left out, and how much.
        left_out: documents that became no record.
        most_pieces: most records that one document became.
        duplicates: documents that repeat an earlier one word for word.
        alike: sizes of groups of documents that say nearly the same, largest first.
        users: whose text it is, where a column says so; None otherwise.
        most_of_one: most records of one of them.
        first: the first records; tokens without a label stand between brackets.
        held_out: of the held-out text; None where there is none.
    """

    documents: int
    records: int
    blank: int
    tokens: int
    predicted: int
    shortest: int
    median: int
    longest: int
    cut: int
    cut_tokens: int
    left_out: int
    most_pieces: int
    duplicates: int
    alike: tuple[int, ...]
    users: int | None
    most_of_one: int | None
    first: tuple[str, ...]
    held_out: HeldOut | None = None

    def as_json(self) -> dict[str, Any]:
        """Figures alone: no text."""
        values = asdict(self)
        del values["first"]
        return values


def check_data(
    documents: Documents, records: Sequences, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, shown: int = 2
) -> DataReport:
    """Look at prepared data.

    Args:
        documents: as read.
        records: as `coterie.training.data.tokenizer.tokenize` made them.
        spec: of the data.
        tokenizer: that made them.
        shown: how many records are written out.
    """
    lengths = records.lengths
    pieces = torch.bincount(records.document_S, minlength=len(documents))
    before = _tokens_before(documents, spec, tokenizer)
    after = torch.zeros(len(documents), dtype=torch.int64).index_add(0, records.document_S, lengths)
    lost = [max(0, full - kept) for full, kept in zip(before, after.tolist(), strict=True)]
    joined = spec.packing == "documents"
    of_users = None if records.users is None else Counter(records.users)
    return DataReport(
        documents=len(documents),
        records=len(records),
        blank=documents.blank,
        tokens=int(lengths.sum()),
        predicted=records.predicted_tokens,
        shortest=int(lengths.min()),
        median=int(lengths.median()),
        longest=int(lengths.max()),
        cut=0 if joined else sum(bool(tokens) for tokens in lost),
        cut_tokens=0 if joined else sum(lost),
        left_out=0 if joined else int((pieces == 0).sum()),
        most_pieces=int(pieces.max()),
        duplicates=len(documents) - len(set(documents.texts)),
        alike=tuple(sorted(_groups(documents.texts), reverse=True)),
        users=None if of_users is None else len(of_users),
        most_of_one=None if of_users is None else max(of_users.values()),
        first=tuple(_written(records, row, tokenizer) for row in range(min(shown, len(records)))),
    )


def _tokens_before(documents: Documents, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if documents.conversations is None:
        return [len(ids) for ids in encode(tokenizer, documents.texts)]
    template = read_template(spec.template)
    return [len(encoded(talk, tokenizer, template)[0]) for talk in documents.conversations]


def _written(records: Sequences, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Tokens with a bar between them; those that only are read, in brackets."""
    item = records[row]
    said, masked = [], False
    for token, label in zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True):
        if (label == -100) != masked:
            masked = not masked
            said.append("[" if masked else "]")
        said.append(tokenizer.decode([token]))
    return "|".join(said) + ("|]" if masked else "")


def _groups(texts: Sequence[str]) -> list[int]:
    """Sizes of groups of texts that share most of their runs of three words, exact copies included."""
    shingles = [_shingles(text) for text in texts]
    parent = list(range(len(texts)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for one, other in _candidates(shingles):
        first, second = root(one), root(other)
        if first != second and _similarity(shingles[first], shingles[second]) >= _ALIKE:
            parent[second] = first
    sizes = Counter(root(number) for number in range(len(texts)))
    return [size for size in sizes.values() if size > 1]


def _shingles(text: str) -> frozenset[int]:
    words = re.findall(r"\w+", text.casefold())
    runs = range(max(1, len(words) - _WORDS + 1))
    return frozenset(hash(tuple(words[at : at + _WORDS])) % _PRIME for at in runs)


def _similarity(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)


def _candidates(shingles: Sequence[frozenset[int]]) -> Iterator[tuple[int, int]]:
    """Pairs whose smallest hashes agree in a band: of pairs that are alike, nearly all."""
    draw = np.random.default_rng(0)
    factors, offsets = draw.integers(1, _PRIME, _HASHES), draw.integers(0, _PRIME, _HASHES)
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number, own in enumerate(shingles):
        values = np.fromiter(own, np.int64, len(own))
        smallest = ((values[:, None] * factors + offsets) % _PRIME).min(0).reshape(_BANDS, -1)
        for band, part in enumerate(smallest):
            buckets[band, part.tobytes()].append(number)
    for bucket in buckets.values():
        if len(bucket) <= 50:
            yield from combinations(bucket, 2)
        else:  # a text that is everywhere: comparing with the first is enough to join them
            yield from ((bucket[0], other) for other in bucket[1:])
