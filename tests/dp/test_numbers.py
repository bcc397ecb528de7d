"""Numbers of the Python API and of settings files obey the same types."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import TrainingArguments

from coterie import dp
from coterie.config import PrivacySpec
from coterie.dp.numbers import checked_number
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.errors import BudgetError, PrivacyError
from coterie.hf import PrivacyArguments, PrivateTrainer
from coterie.models.zoo.tiny import tiny_model

NO_COUNT = [-1, 0, 1.5, 2.0, math.nan, math.inf, True, "8", "", None, [8], 2**70, np.float64(8), np.True_]
NO_POSITIVE = [-1, 0, math.nan, math.inf, -math.inf, True, "8", None, [1.0], 10**400, 1j]
NO_FRACTION = [-0.5, 0, 1, 2.5, math.nan, "0.5", False, None]
COUNTS = ["physical_batch", "lot_size", "rounds", "records_per_user", "max_lot"]


def session(tmp_path: Path, **given: Any) -> Any:
    model = torch.nn.Linear(3, 1)
    data = [{"x": torch.ones(3) * i} for i in range(12)]
    options: dict[str, Any] = {"budget": dp.Budget(8.0, 1e-3), "lot_size": 4, "rounds": 2, "ledger": tmp_path}
    return dp.make_private(
        model, torch.optim.SGD(model.parameters(), 0.1), data, loss_fn=lambda m, b: m(b["x"])[:, 0], **options | given
    )


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", NO_COUNT, ids=repr)
def test_what_is_no_count_is_refused_by_the_api(tmp_path: Path, name: str, value: Any) -> None:
    more: dict[str, Any] = {}
    if name == "records_per_user":
        more["users"] = [i % 6 for i in range(12)]
    if name in ("rounds", "max_lot", "records_per_user") and value is None:
        return  # not given
    if name == "max_lot":
        more["sampler"] = "truncated_poisson"
    with pytest.raises(BudgetError, match=f"`{name}` is") as caught:
        session(tmp_path, **{name: value}, **more)
    assert caught.value.field == name
    assert caught.value.fix
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("clip_norm", NO_POSITIVE),
        ("epochs", NO_POSITIVE),
        ("adaptive_quantile", NO_FRACTION[:-1]),
        ("seed", [-1, 1.5, "8", True]),
    ],
)
def test_other_numbers_out_of_range_are_refused_by_the_api(tmp_path: Path, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(PrivacyError, match=f"`{name}` is"):
            session(tmp_path, **{name: value}, **({"rounds": None} if name == "epochs" else {}))
    for value in NO_POSITIVE if name == "clip_norm" else []:
        with pytest.raises(PrivacyError, match="`clip_norm` is"):
            dp.PerLayer(value)


def test_budget_and_balance_refuse_what_is_no_number() -> None:
    for value in NO_POSITIVE:
        with pytest.raises(BudgetError, match="`epsilon` is"):
            dp.Budget(value, 1e-5)
    for value in NO_FRACTION:
        with pytest.raises(BudgetError, match="`delta` is"):
            dp.Budget(1.0, value)
    for options in ({"load_share": 1.0}, {"smoothing": 1.0}, {"coefficient": 0}, {"load_share": "0.1"}):
        with pytest.raises(PrivacyError, match=f"`{next(iter(options))}` is"):
            dp.Balance("private_load", **options)


@pytest.mark.parametrize(
    "name",
    [
        "physical_batch",
        "lot_size",
        "records_per_user",
        "clip_norm",
        "epsilon",
        "delta",
        "adaptive_quantile",
        "max_lot",
    ],
)
def test_settings_and_api_refuse_and_take_the_same_values(name: str) -> None:
    rest = {"epsilon": 8.0, "sampler": "truncated_poisson", "max_lot": 400} | {name: None}
    for value in [*NO_COUNT, *NO_FRACTION, 8, np.int16(8), 0.25, np.float32(0.25), 1e300]:
        if value is None and name in ("lot_size", "max_lot", "adaptive_quantile"):
            continue
        outcomes = []
        for take in (lambda v: PrivacySpec(**rest | {name: v}), lambda v: checked_number(name, v)):
            try:
                take(value)
                outcomes.append(True)
            except (ValidationError, BudgetError):
                outcomes.append(False)
        assert outcomes[0] == outcomes[1], (name, value)


def test_numpy_counts_are_counts(tmp_path: Path) -> None:
    run = session(
        tmp_path, physical_batch=np.int64(3), lot_size=np.uint8(4), rounds=np.int32(2), clip_norm=np.float32(1)
    )
    with run:
        assert [type(run.privacy_plan.rounds), type(run.privacy_plan.lot_size), type(run.plan.lot_size)] == [int] * 3
        for lot in run:
            run.step(lot)
        run.save(tmp_path / "saved")  # JSON takes no numpy number


def test_parties_and_trainer_use_the_same_types(tmp_path: Path) -> None:
    for name in ("rounds", "lot_size", "max_lot", "records_per_user", "clip_norm", "adaptive_quantile"):
        with pytest.raises(BudgetError, match=f"`{name}` is 0"):
            PrivacyPlan(**{"budget": dp.Budget(1.0, 1e-5), "rounds": 1, "lot_size": 1, name: 0})
    with pytest.raises(BudgetError, match="`physical_batch` is 0"):
        ComputeOptions(physical_batch=0)
    for options in (
        {"lot_size": 0},
        {"lot_size": "8"},
        {"epsilon": math.nan},
        {"records_per_user": 1.5},
        {"seed": True},
    ):
        with pytest.raises(BudgetError, match=f"`{next(iter(options))}` is"):
            PrivacyArguments.of({"epsilon": 1.0, "delta": 1e-5} | options)
    data = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)} for _ in range(12)]
    for options, name in (
        ({"per_device_train_batch_size": 0}, "physical_batch"),
        ({"num_train_epochs": math.nan}, "epochs"),
        ({"num_train_epochs": -1}, "epochs"),
    ):
        defaults = {"use_cpu": True, "report_to": [], "save_strategy": "no", "max_grad_norm": 0}
        trainer = PrivateTrainer(
            tiny_model("olmoe", num_hidden_layers=1),
            TrainingArguments(str(tmp_path / "out"), **defaults, **options),
            train_dataset=data,
            privacy={"epsilon": 8.0, "delta": 1e-3, "lot_size": 4, "ledger": tmp_path / "l"},
        )
        with pytest.raises(BudgetError, match=f"`{name}` is"):
            trainer.train()
