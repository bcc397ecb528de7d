"""What is wrong with a record is said before the first lot; a record is the same each time it is read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForQuestionAnswering

from coterie import dp
from coterie.dp.accounting.dataset import dataset_digest
from coterie.errors import DataError, PrivacyError
from coterie.models.zoo.tiny import tiny_model

BAD = 17
SIZES = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16
}  # fmt: skip


def rows(count: int = 24, length: int = 6) -> list[dict[str, Any]]:
    ids = torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def padded(items: list[Any]) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad([item[name] for item in items], True, -100 if name == "labels" else 0) for name in items[0]}


def start(tmp_path: Path, data: Any, model: Any = None, **more: Any) -> Any:
    model = model if model is not None else tiny_model("olmoe", num_hidden_layers=1)
    options: dict[str, Any] = {"budget": dp.Budget(8.0, 1e-3), "lot_size": 4, "rounds": 3, "ledger": tmp_path / "l"}
    return dp.make_private(model, torch.optim.SGD(model.parameters(), 0.1), data, **options | more)


def classifier(**more: Any) -> Any:
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **SIZES | more))


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize("physical_batch", [1, 4])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda row: without(row, "labels"), "has no `labels`|collator|parts"),
        (lambda row: without(row, "input_ids"), "collator|parts"),
        (lambda row: row | {"input_ids": row["input_ids"] + 90}, "has input_ids outside"),
        (lambda row: row | {"input_ids": row["input_ids"] - 99}, "has input_ids outside"),
        (lambda row: row | {"labels": row["labels"] + 90}, "has labels outside"),
        (lambda row: row | {"labels": -row["labels"]}, "has labels outside"),
        (lambda row: "text", "collator"),
    ],
)
def test_a_record_that_cannot_be_computed_is_refused_before_the_first_lot(
    tmp_path: Path, change: Any, sentence: str, physical_batch: int
) -> None:
    data = rows()
    data[BAD] = change(data[BAD])
    with pytest.raises(DataError, match=f"record {BAD} .*({sentence})|a record is a str"):
        start(tmp_path, data, physical_batch=physical_batch)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_a_class_that_the_head_lacks_is_refused(tmp_path: Path, label: int) -> None:
    data = [row | {"labels": torch.tensor(i % 3)} for i, row in enumerate(rows())]
    data[BAD]["labels"] = torch.tensor(label)
    with pytest.raises(DataError, match=f"record {BAD} has labels outside the model's 3 outputs"):
        start(tmp_path, data, classifier(num_labels=3))


def test_targets_that_are_not_finite_and_answers_outside_the_text_are_refused(tmp_path: Path) -> None:
    data = [row | {"labels": torch.tensor(float(i))} for i, row in enumerate(rows())]
    data[BAD]["labels"] = torch.tensor(float("nan"))
    with pytest.raises(DataError, match=f"record {BAD} has labels that are not finite"):
        start(tmp_path, data, classifier(num_labels=1))
    ends = [without(row, "labels") | {"start_positions": 1, "end_positions": 2} for row in rows()]
    ends[BAD]["end_positions"] = 6
    with pytest.raises(DataError, match=f"record {BAD} has end_positions outside"):
        start(tmp_path, ends, BertForQuestionAnswering(BertConfig(**SIZES)))


def test_records_that_do_not_fit_one_batch_are_refused(tmp_path: Path) -> None:
    data = rows()
    data[BAD] = {name: value[:4] for name, value in data[BAD].items()}
    with pytest.raises(DataError, match=f"record {BAD} does not go through the collator"):
        start(tmp_path, data)


def test_a_record_longer_than_the_model_s_positions_is_refused(tmp_path: Path) -> None:
    data = [row | {"labels": torch.tensor(1)} for row in rows(length=6)]
    data[BAD] |= {"input_ids": torch.full((20,), 5), "attention_mask": torch.ones(20, dtype=torch.long)}

    def pad(items: list[Any]) -> dict[str, Tensor]:
        sequences = {name: [item[name] for item in items] for name in ("input_ids", "attention_mask")}
        made = {name: torch.nn.utils.rnn.pad_sequence(value, True) for name, value in sequences.items()}
        return made | {"labels": torch.stack([item["labels"] for item in items])}

    with pytest.raises(PrivacyError, match="as long as the longest of the data, 20 tokens"):
        start(tmp_path, data, classifier(num_labels=3, max_position_embeddings=16), collate_fn=pad)


def test_data_without_any_label_is_refused_and_single_records_without_contribute_zero(tmp_path: Path) -> None:
    data = rows()
    data[BAD]["labels"] = torch.full((6,), -100)
    start(tmp_path, data).close()
    for row in data:
        row["labels"] = torch.full((6,), -100)
    with pytest.raises(DataError, match="none of the 24 records has a label"):
        start(tmp_path, data)


def long_one(value: Tensor) -> Tensor:
    """1,200 values in the range of some that repeat nowhere, so that two crops differ unless they begin alike."""
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(int(value.min()), int(value.max()) + 1, (1200,), generator=drawn, dtype=value.dtype)


class Reads:
    """Records that change when they are read, in a way of their choice."""

    def __init__(self, way: str) -> None:
        self.base, self.way, self.reads = rows(40, 12), way, 0

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        row = self.base[index]
        if self.way == "python":
            at = random.randrange(6)
        elif self.way == "numpy":
            at = int(np.random.randint(6))
        elif self.way == "torch":
            at = int(torch.randint(6, ()))
        elif self.way == "counter":
            at = self.reads % 5
        elif self.way == "long ones":  # one record is longer than the crop
            at = random.randrange(1000) if index == 33 else 0
            row = {name: long_one(value) if index == 33 else value[:5] for name, value in row.items()}
        else:  # a choice that belongs to the record
            at = index % 6
        return {name: value[at : at + 6] for name, value in row.items()}


@pytest.mark.parametrize("way", ["python", "numpy", "torch", "counter", "long ones"])
def test_records_that_change_when_they_are_read_need_a_digest(tmp_path: Path, way: str) -> None:
    with pytest.raises(DataError, match="differs each time it is read") as caught:
        start(tmp_path, Reads(way), collate_fn=padded)
    assert caught.value.code == "dp-record-changes"
    runs = []
    for _ in range(2):
        with start(tmp_path, Reads(way), collate_fn=padded, digest="the text", rounds=2) as session:
            for lot in session:
                session.step(lot)
        runs.append(session)
    assert runs[1].lifetime().epsilon > 1.2 * runs[1].spent().epsilon


def test_the_same_records_keep_their_digest_and_the_caller_s_random_numbers() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert dataset_digest(Reads("own")) == dataset_digest(Reads("own"))
    found = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert found == (random.random(), float(np.random.rand()), float(torch.rand(())))


class Shrinks(list):
    """Says more records than it has."""

    def __len__(self) -> int:
        return super().__len__() + 1


@pytest.mark.parametrize("change", [lambda data: data.pop(), lambda data: data.append(data[0])])
def test_a_dataset_that_shrinks_or_grows_after_set_up_is_refused(tmp_path: Path, change: Any) -> None:
    data = rows()
    with start(tmp_path, data) as session:
        session.step(session.next_lot())
        change(data)
        with pytest.raises(DataError, match=r"it had 24 records and now has 2[35]"):
            session.step(session.next_lot())
        assert session.releases.used == 1
    with pytest.raises(DataError, match="record 23 is not there"):
        start(tmp_path, Shrinks(rows(23)))
