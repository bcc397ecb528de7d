"""Where a private run starts, and which dataset its ledger is kept for."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import numpy as np
import pytest
import torch

from coterie.config import DataSpec, ModelSpec
from coterie.dp.accounting.dataset import checked_length, dataset_digest, record_digest
from coterie.dp.accounting.provenance import Artefact, declared, not_covered
from coterie.dp.accounting.users import user_column
from coterie.errors import DataError, ProvenanceError
from coterie.training.provenance import artefacts


def test_invariant_6_private_start_is_refused_unless_its_records_are_listed() -> None:
    with pytest.raises(ProvenanceError, match="the weights was made from private records"):
        not_covered([Artefact.parse("weights", "private")])
    lines = not_covered([Artefact("weights", "private", uncovered="2,000 notes of 2019")])
    assert lines == ["records behind the starting weights: 2,000 notes of 2019"]


def test_public_start_leaves_nothing_uncovered_and_others_are_named() -> None:
    assert not_covered(declared({"weights": "public", "tokenizer": "public"})) == []
    assert "ledger abc" in not_covered(declared({"weights": "dp:abc"}))[0]
    assert "not declared" in not_covered(declared(None))[0]


@pytest.mark.parametrize("word", ["dp", "dp:", "maybe", ""])
def test_unknown_provenance_is_refused(word: str) -> None:
    with pytest.raises(ProvenanceError, match="provenance is"):
        Artefact.parse("tokenizer", word)


def test_digest_names_content_not_order_or_container() -> None:
    records = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    tensors = [{name: torch.tensor(value) for name, value in reversed(record.items())} for record in records]
    base = dataset_digest(records)
    assert base == dataset_digest(records[::-1]) == dataset_digest(tensors)
    assert base == dataset_digest(datasets.Dataset.from_list(records))
    assert base != dataset_digest([*records, records[0]])
    assert base != dataset_digest([records[0], {"input_ids": [5], "labels": [4]}])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": "xy", "b": ""}, {"a": "x", "b": "y"}),
        ([1, 2], [[1], [2]]),
        ({"a": 1}, {"a": 1.0}),
        ("1", 1),
        ([[1, 2], [3, 4]], [[1, 2, 3, 4]]),
        (None, ""),
        (np.array([1, 2]), np.array([[1, 2]])),
    ],
)
def test_different_records_have_different_digests(one: object, other: object) -> None:
    assert record_digest(one) != record_digest(other)


def test_bfloat16_and_bool_records_have_digests() -> None:
    assert record_digest(torch.ones(2, dtype=torch.bfloat16)) == record_digest(torch.ones(2))
    assert record_digest([True, False]) == record_digest([1, 0])
    with pytest.raises(DataError, match="a record holds a object"):
        record_digest(object())


class Stream:
    def __iter__(self) -> Iterator[int]:
        return iter([1])


def test_dataset_without_length_or_records_is_refused() -> None:
    with pytest.raises(DataError, match="Stream has no length"):
        checked_length(Stream())
    with pytest.raises(DataError, match="set has no length or cannot be indexed"):
        checked_length({1, 2})
    with pytest.raises(DataError, match="has no records"):
        checked_length([])


def test_user_column_is_read_or_missed_in_one_sentence() -> None:
    records = [{"user": "a", "x": 1}, {"user": "b", "x": 2}]
    assert list(user_column(records, "user")) == ["a", "b"]
    assert list(user_column(datasets.Dataset.from_list(records), "user")) == ["a", "b"]
    with pytest.raises(DataError, match="no column `patient`"):
        user_column(records, "patient")


def test_invariant_6_settings_can_name_the_records_behind_a_private_start() -> None:
    model = {"path": "/weights", "provenance": "private"}
    data = DataSpec(train=("a.txt",))
    with pytest.raises(ProvenanceError, match="made from private records"):
        not_covered(artefacts(ModelSpec(**model), data))
    lines = not_covered(artefacts(ModelSpec(**model, not_covered="the 2023 letters"), data))
    assert lines == [f"records behind the starting {kind}: the 2023 letters" for kind in ("weights", "tokenizer")]
