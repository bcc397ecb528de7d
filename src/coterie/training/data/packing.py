"""Cut tokenised documents into sequences.

Three ways, by ``data.packing``:

- ``chunks``: every document is cut by itself; its last sequence is shorter. No sequence holds text of two documents,
  so attention cannot cross a document boundary, whatever the family does with masks or positions.
- ``records``: one sequence per document, the rest is cut off. For private training: one record, one row.
- ``documents``: all documents, separated by the end token, are joined and cut. No padding, but a sequence may hold
  several documents that see each other (a block mask would need support by every family; hybrids have none).

Sequences are kept without padding; a batch is padded on the right to its longest row, with labels -100 there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from coterie.dp.label_words import LabelWords
from coterie.dp.losses import IGNORED
from coterie.errors import DataError
from coterie.training.seeds import derived_seed

"""Label of a position that is not predicted, as in Hugging Face."""

Packing = Literal["chunks", "records", "documents"]
Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask``, ``labels``, each int64 [B, T]; labels are the ids themselves (not shifted)."""


@dataclass(frozen=True)
class Sequences:
    """Tokenised text, ready to be batched. Works as a map-style dataset: ``len`` and ``[row]``.

    Attributes:
        tokens: all ids, one sequence after the other, int32.
        starts: [S + 1] where each begins and the last ends.
        document_S: document that each sequence begins in.
        pad_id: filler of short rows; masked everywhere.
        users: whose text each sequence is, when known.
        trained: which tokens are predicted, bool; None: all.
        words: the tokens of the classes, where only these are predicted; see `coterie.dp.label_words`.
        mask_id: what a masked model reads in place of a token that is predicted.
    """

    tokens: Tensor
    starts: Tensor
    document_S: Tensor
    pad_id: int = 0
    users: tuple[str, ...] | None = None
    trained: Tensor | None = None
    words: LabelWords | None = None
    mask_id: int | None = None

    def __len__(self) -> int:
        return self.starts.shape[0] - 1

    def __getitem__(self, row: int) -> Batch:
        if not 0 <= row < len(self):
            raise IndexError(row)
        place = slice(int(self.starts[row]), int(self.starts[row + 1]))
        ids_T = self.tokens[place].long()
        labels_T = ids_T.clone() if self.trained is None else ids_T.where(self.trained[place], IGNORED)
        read_T = ids_T if self.mask_id is None else ids_T.where(labels_T == IGNORED, self.mask_id)
        return {"input_ids": read_T, "attention_mask": torch.ones_like(ids_T), "labels": labels_T}

    @property
    def lengths(self) -> Tensor:
        """[S] tokens per sequence."""
        return torch.diff(self.starts)

    @property
    def predicted_tokens(self) -> int:
        """Tokens that have a prediction: all that are trained but the first of each sequence."""
        if self.trained is None:
            return int((self.lengths - 1).sum())
        return int(self.trained.sum()) - int(self.trained[self.starts[:-1]].sum())

    def digest(self) -> str:
        """Hex SHA-256 of all tokens and borders: tells whether a run's text is still the same."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        digest.update(self.starts.numpy().tobytes())
        if self.trained is not None:
            digest.update(self.trained.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some sequences, padded on the right to the longest of them."""
        return self.collate([self[row] for row in rows])

    def collate(self, items: Sequence[Batch]) -> Batch:
        """Pad and stack what ``[row]`` gives, as a Hugging Face collator does."""
        fillers = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        return {
            name: torch.nn.utils.rnn.pad_sequence([item[name] for item in items], True, float(filler))
            for name, filler in fillers.items()
        }

    def with_users(self, document_users: Sequence[str]) -> Sequences:
        """The same sequences, each belonging to the user of its document."""
        return replace(self, users=tuple(document_users[document] for document in self.document_S.tolist()))


def pack(
    documents: Iterable[Sequence[int]], *, sequence_length: int, packing: Packing, end_id: int | None, pad_id: int = 0
) -> Sequences:
    """Cut documents, given as token ids, into sequences of at most ``sequence_length`` tokens.

    Args:
        documents: token ids of each document, with whatever begins a text for this tokenizer.
        sequence_length: most tokens in a sequence.
        packing: whether documents share sequences.
        end_id: appended to a document that does not end with it; None for tokenizers without one.
        pad_id: fills up the batch behind short sequences.

    Raises:
        DataError: nothing is left to train on: every piece is a single token, which predicts nothing.
    """
    pieces: list[Sequence[int]] = []
    owners: list[int] = []
    stream: list[int] = []
    stream_owners: list[int] = []
    for index, ids in enumerate(documents):
        whole = [*ids] if end_id is None or (len(ids) and ids[-1] == end_id) else [*ids, end_id]
        if packing == "documents":
            stream.extend(whole)
            stream_owners.extend([index] * len(whole))
        else:
            stops = len(whole) if packing == "chunks" else min(len(whole), 1)
            for start in range(0, stops, sequence_length):
                pieces.append(whole[start : start + sequence_length])
                owners.append(index)
    for start in range(0, len(stream), sequence_length):
        pieces.append(stream[start : start + sequence_length])
        owners.append(stream_owners[start])
    kept = [(piece, owner) for piece, owner in zip(pieces, owners, strict=True) if len(piece) > 1]
    if not kept:
        raise DataError(
            "No sequence of two or more tokens can be made from the text.",
            code="data-no-sequence",
            why="a single token predicts nothing",
            fix="check data.sequence_length and the text column",
        )
    lengths = torch.tensor([len(piece) for piece, _ in kept])
    return Sequences(
        tokens=torch.tensor([token for piece, _ in kept for token in piece], dtype=torch.int32),
        starts=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        document_S=torch.tensor([owner for _, owner in kept]),
        pad_id=pad_id,
    )


def pack_answers(
    documents: Iterable[tuple[Sequence[int], Sequence[bool]]], *, sequence_length: int, pad_id: int = 0
) -> Sequences:
    """One sequence a conversation, the rest cut off; tokens that are nobody's answer have no label.

    Args:
        documents: token ids, and which of them are trained.
        sequence_length: most tokens in a sequence.
        pad_id: fills up the batch behind short sequences.

    Raises:
        DataError: no answer is left to train on within the first ``sequence_length`` tokens of any.
    """
    cut = [(ids[:sequence_length], trained[:sequence_length]) for ids, trained in documents]
    kept = [(number, ids, trained) for number, (ids, trained) in enumerate(cut) if any(trained[1:])]
    if not kept:
        raise DataError(
            "No answer can be trained: none begins within data.sequence_length.",
            code="data-no-sequence",
            why="a prompt alone predicts nothing",
            fix="set data.sequence_length to more than prompts have tokens",
        )
    lengths = torch.tensor([len(ids) for _, ids, _ in kept])
    return Sequences(
        tokens=torch.tensor([token for _, ids, _ in kept for token in ids], dtype=torch.int32),
        starts=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        document_S=torch.tensor([number for number, _, _ in kept]),
        pad_id=pad_id,
        trained=torch.tensor([mark for _, _, trained in kept for mark in trained]),
    )


@dataclass(frozen=True)
class RoundOrder:
    """Which sequences each round takes: a shuffled pass over the data after the other, from the seed.

    A pure function of the round, so that a resumed run, and a second process with the same config, take the same.

    Attributes:
        num_rows: sequences in the data.
        batch_size: sequences per round; a round may reach into the next pass.
        seed: of the shuffles.
    """

    num_rows: int
    batch_size: int
    seed: int

    def rows(self, round_no: int) -> list[int]:
        """The sequences of a round, counted from 1."""
        taken: list[int] = []
        position = (round_no - 1) * self.batch_size
        while len(taken) < self.batch_size:
            shuffled = self._shuffled(position // self.num_rows)
            start = position % self.num_rows
            part = shuffled[start : start + self.batch_size - len(taken)]
            taken.extend(part)
            position += len(part)
        return taken

    def micro_batches(self, round_no: int, size: int) -> list[list[int]]:
        """The sequences of a round in groups of ``size``; the last group may be smaller."""
        rows = self.rows(round_no)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _shuffled(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, number))
        return torch.randperm(self.num_rows, generator=generator).tolist()
