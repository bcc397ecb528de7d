"""A user is named by one stated value, whatever type an id comes as; a missing id is refused in every form."""

from __future__ import annotations

import decimal
import enum
import math
import uuid
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from torch import nn

from coterie import dp
from coterie.dp.accounting.lots import Units
from coterie.dp.accounting.users import user_column, user_ids
from coterie.errors import DataError
from coterie.hf import PrivateTrainer
from coterie.models.zoo.tiny import tiny_model

SEVEN = [
    7, "7", b"7", 7.0, np.int8(7), np.uint64(7), np.float32(7), np.str_("7"), np.bytes_(b"7"), np.array(7),
    np.array([7]), np.array(["7"]), np.array([7], dtype=object), torch.tensor(7), torch.tensor([[7]]),
    torch.tensor(7.0), torch.tensor(7, dtype=torch.uint8), [7], ("7",), decimal.Decimal(7), "7.0", b"7.000",
]  # fmt: skip

MISSING = [
    None, math.nan, np.float32("nan"), np.array(math.nan), torch.tensor(math.nan), torch.tensor([math.nan]),
    pandas.NA, pandas.NaT, np.datetime64("NaT"), "", "  ", b"", "nan", np.str_("nan"), "None", "<NA>",
    [], [None], (1, None), "NA", "n/a", "#N/A", "\\N",
    np.array([]), decimal.Decimal("nan"),
]  # fmt: skip

NO_ONE_TEXT = [
    True, np.True_, torch.tensor(True), 0.5, torch.tensor(0.1), math.inf, 2.0**60, b"\xff", {"id": 1}, object(),
    np.datetime64("2020-01-01"), 1 + 2j,
]  # fmt: skip


def test_one_user_in_every_type_is_one_unit() -> None:
    assert user_ids(SEVEN) == ["7"] * len(SEVEN)
    assert Units.of_users(SEVEN, 4).count == 1
    assert user_ids([0, "0", "-0", "-0.0", -0.0, "0.0"]) == ["0"] * 6


class Member(str, enum.Enum):  # noqa: UP042, its text is not its value
    ONE = "Zo\u00eb"


def test_text_is_one_user_in_every_class_and_unicode_form() -> None:
    assert len(set(user_ids([Member.ONE, "Zo\u00eb", "Zoe\u0308", np.str_("Zoe\u0308"), "Zoe\u0308".encode()]))) == 1


@pytest.mark.parametrize(
    "users", [{0: "u", 1: "u"}, {"u", "v"}, (name for name in "uv")], ids=["dict", "set", "stream"]
)
def test_users_without_an_order_are_refused(users: Any) -> None:
    with pytest.raises(DataError, match="one after the other") as caught:
        user_ids(users)
    assert caught.value.code == "dp-users"


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_a_missing_user_is_refused_in_every_form(value: Any) -> None:
    with pytest.raises(DataError, match="record 1 names no user") as caught:
        Units.of_users(["u", value], 4)
    assert caught.value.code == "dp-no-user"


@pytest.mark.parametrize("value", NO_ONE_TEXT, ids=lambda value: type(value).__name__)
def test_an_id_that_can_be_written_in_two_ways_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match="record 0 names its user by a") as caught:
        user_ids([value])
    assert caught.value.code == "dp-user-id"


def test_different_ids_stay_apart_and_keep_what_they_are_written_as() -> None:
    made = uuid.uuid4()
    written = ["7", "07", " 7", "7.5", "7.", ".0", "7.0.0", "u", "U", 2**62, -7, made]
    written += [("a", 1), ("a", 2), ("a,1",), "('a', '1')x"]
    assert len(set(user_ids(written))) == len(written)
    assert user_ids([made, str(made)]) == [str(made)] * 2
    assert user_ids([("a", 1), ["a", np.int64(1)]]) == user_ids([("a", "1")]) * 2


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", None])
def test_a_column_names_the_same_users_in_every_format(form: str | None) -> None:
    large = [2**60 + i % 3 for i in range(9)]  # float32 of the torch format would make one user of them
    table = datasets.Dataset.from_dict(
        {"a": large, "b": [f"u{i % 3}" for i in range(9)], "c": [i % 3 for i in range(9)]}
    )
    table = table.cast_column("c", datasets.ClassLabel(names=["x", "y", "z"])).with_format(form)
    for column in "abc":
        assert Units.of_users(user_column(table, column), 4).count == 3


def test_a_column_that_only_a_transform_makes_is_read_from_the_items() -> None:
    table = datasets.Dataset.from_dict({"a": list(range(6))})
    table.set_transform(lambda rows: {"user": [torch.tensor(a % 2) for a in rows["a"]]})
    assert user_ids(user_column(table, "user")) == ["0", "1"] * 3


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.out = nn.Linear(4, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(input_ids))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model(batch["input_ids"])
    return nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none").mean(1)


def items() -> list[dict[str, Any]]:
    return [{"input_ids": torch.arange(4) + i % 4, "user": torch.tensor(float(i % 5))} for i in range(20)]


@pytest.mark.parametrize("given", ["users", "user_column"])
def test_tensors_of_ids_make_as_many_units_as_users(tmp_path: Path, given: str) -> None:
    model, data = Words(), items()
    named: dict[str, Any] = {"user_column": "user"}
    if given == "users":
        named, data = {"users": torch.arange(20) % 5}, [{"input_ids": item["input_ids"]} for item in data]

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack([row["input_ids"] for row in rows])}

    optimizer, budget = torch.optim.SGD(model.parameters(), 0.1), dp.Budget(8.0, 1e-3)
    options: dict[str, Any] = {"budget": budget, "lot_size": 2, "rounds": 1, "ledger": tmp_path} | named
    session = dp.make_private(model, optimizer, data, collate, loss, **options)
    with session:
        assert session.plan.units == 5
        for lot in session:
            session.step(lot)
            assert len(lot) <= 4 * lot.num_units


@pytest.mark.slow
def test_the_trainer_counts_the_users_of_a_torch_dataset(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    table = datasets.Dataset.from_list(
        [{"input_ids": [3, 4, 5], "labels": [3, 4, 5], "user": i % 6} for i in range(24)]
    )
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0}
    trainer = PrivateTrainer(
        tiny_model("olmoe", num_hidden_layers=1),
        TrainingArguments(str(tmp_path / "out"), num_train_epochs=1, **options),
        train_dataset=table.with_format("torch"),
        privacy={"epsilon": 8.0, "delta": 1e-3, "lot_size": 2, "user_column": "user", "ledger": tmp_path / "l"},
    )
    trainer.train()
    assert trainer.statement().units == 6
    assert trainer.session.privacy_plan.rounds == 3
