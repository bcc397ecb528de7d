"""Sequences lose no token, mix no documents unless asked, and rounds take them in a fixed order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.dp.losses import IGNORED
from coterie.errors import DataError
from coterie.training.data.packing import RoundOrder, Sequences, pack

END = 1
documents = st.lists(st.lists(st.integers(2, 50), max_size=30), min_size=1, max_size=8)


def rows_of(sequences: Sequences) -> list[list[int]]:
    return [sequences[row]["input_ids"].tolist() for row in range(len(sequences))]


@given(documents, st.integers(2, 12))
def test_chunks_keep_every_token_of_a_document_and_never_mix_two(texts: list[list[int]], length: int) -> None:
    texts = [[100 + index, *text] for index, text in enumerate(texts)]  # the first token tells the document
    sequences = pack(texts, sequence_length=length, packing="chunks", end_id=END)
    assert max(map(len, rows_of(sequences))) <= length
    owners = sequences.document_S.tolist()
    for index, text in enumerate(texts):
        whole = [*text, END]
        expected = [whole[start : start + length] for start in range(0, len(whole), length)]
        mine = [sequences[row]["input_ids"].tolist() for row in range(len(sequences)) if owners[row] == index]
        assert mine == [piece for piece in expected if len(piece) > 1]


@given(documents, st.integers(2, 12))
def test_records_are_one_row_each_cut_at_the_end(texts: list[list[int]], length: int) -> None:
    texts = [[7, *text] for text in texts]
    sequences = pack(texts, sequence_length=length, packing="records", end_id=END)
    assert rows_of(sequences) == [[*text, END][:length] for text in texts]
    assert sequences.document_S.tolist() == list(range(len(texts)))


def test_documents_fill_sequences_one_after_the_other() -> None:
    sequences = pack([[5, 6], [7], [8, 9, 10]], sequence_length=4, packing="documents", end_id=END)
    assert rows_of(sequences) == [[5, 6, END, 7], [END, 8, 9, 10]]
    assert sequences.document_S.tolist() == [0, 1]


def test_an_end_token_is_not_added_twice_and_not_at_all_without_one() -> None:
    assert rows_of(pack([[5, END]], sequence_length=9, packing="chunks", end_id=END)) == [[5, END]]
    assert rows_of(pack([[5, 6]], sequence_length=9, packing="chunks", end_id=None)) == [[5, 6]]


def test_text_of_single_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="No sequence of two or more tokens"):
        pack([[5], [6]], sequence_length=9, packing="chunks", end_id=None)


def test_a_batch_is_padded_on_the_right_and_padding_is_masked_and_unlabelled() -> None:
    sequences = pack([[5, 6, 7], [8]], sequence_length=9, packing="chunks", end_id=END, pad_id=3)
    batch = sequences.batch([1, 0])
    assert batch["input_ids"].tolist() == [[8, END, 3, 3], [5, 6, 7, END]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[8, END, IGNORED, IGNORED], [5, 6, 7, END]]
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert sequences.predicted_tokens == 3 + 1


def test_sequences_belong_to_the_user_of_their_document() -> None:
    sequences = pack([[5] * 5, [6] * 2], sequence_length=3, packing="chunks", end_id=END).with_users(["ann", "bob"])
    assert sequences.users == ("ann", "ann", "bob")


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
def test_every_pass_over_the_data_takes_each_sequence_once(rows: int, batch: int, seed: int) -> None:
    order = RoundOrder(rows, batch, seed)
    taken = [row for round_no in range(1, 3 * rows + 1) for row in order.rows(round_no)]
    for start in range(0, len(taken) - rows + 1, rows):
        assert sorted(taken[start : start + rows]) == list(range(rows))


def test_order_depends_on_the_seed_and_the_round_alone() -> None:
    a, b, other = (RoundOrder(100, 8, seed) for seed in (3, 3, 4))
    assert [a.rows(at) for at in (6, 1, 14)] == [b.rows(at) for at in (6, 1, 14)]
    assert a.rows(1) != other.rows(1)
    passes = RoundOrder(100, 100, 3)
    assert passes.rows(1) != passes.rows(2), "each pass has its own order"
    assert a.rows(1) != list(range(8))


def test_a_batch_that_is_no_multiple_of_the_micro_batch_ends_with_a_smaller_one() -> None:
    order = RoundOrder(50, 10, 0)
    groups = order.micro_batches(2, 4)
    assert [len(group) for group in groups] == [4, 4, 2]
    assert [row for group in groups for row in group] == order.rows(2)
    assert order.micro_batches(2, 64) == [order.rows(2)]
