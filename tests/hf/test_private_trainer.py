"""`PrivateTrainer` is a Trainer: same arguments, private steps, and it refuses what would break the promise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    OlmoeForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import WandbCallback

from coterie.dp.accounting.budget import PrivacyWarning
from coterie.errors import CheckpointError, DataError, LedgerError, PrivacyError, ProvenanceError
from coterie.hf import PrivacyArguments, PrivateTrainer
from coterie.hf.arguments import check_arguments
from coterie.models.split.trainings import read_trainings
from coterie.models.zoo.tiny import tiny_model


class Reports(WandbCallback):
    """A reporting callback under another name."""


PRIVACY = {"epsilon": 6.0, "delta": 1e-3, "lot_size": 8, "clip_norm": 0.5, "provenance": {"weights": "public"}}


@pytest.fixture
def data() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (32, 7), generator=generator).tolist()
    return datasets.Dataset.from_list(
        [{"input_ids": row, "labels": row, "note": "kept out", "user": f"u{i % 8}"} for i, row in enumerate(ids)]
    )


@pytest.fixture
def make(tmp_path: Path, data: datasets.Dataset) -> Callable[..., PrivateTrainer]:
    def build(
        privacy: dict[str, Any] | None = None, model: PreTrainedModel | None = None, data_: Any = None, **options: Any
    ) -> PrivateTrainer:
        trainer = {
            name: options.pop(name)
            for name in ("callbacks", "data_collator", "compute_loss_func", "cls")
            if name in options
        }
        cls = trainer.pop("cls", PrivateTrainer)
        defaults = {
            "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
            "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0,
        }  # fmt: skip
        return cls(
            model or tiny_model("olmoe", num_hidden_layers=1),
            TrainingArguments(str(tmp_path / "out"), **defaults | options),
            train_dataset=data if data_ is None else data_,
            eval_dataset=data.select(range(6)),
            privacy=PRIVACY | {"ledger": tmp_path / "ledger"} | (privacy or {}),
            **trainer,
        )

    return build


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_it_trains_evaluates_and_states_what_it_spent(make: Callable[..., PrivateTrainer]) -> None:
    trainer = make(eval_strategy="steps", eval_steps=2)
    with pytest.raises(PrivacyError, match="nothing was trained yet"):
        trainer.spent()
    before = weights(trainer)
    trainer.train()
    assert isinstance(trainer, Trainer)
    assert trainer.state.global_step == trainer.session.round == 4
    assert all((value != before[name]).all() for name, value in weights(trainer).items())
    assert 0 < trainer.spent().epsilon <= 6
    assert "adding or removing one record" in str(trainer.statement())
    logs = trainer.state.log_history
    assert sum("eval_loss" in entry for entry in logs) == 2
    assert not any("loss" in entry or "train_loss" in entry for entry in logs)
    spent = [entry["epsilon"] for entry in logs if "loss_not_private" in entry]
    assert spent == sorted(spent)
    assert len(spent) == 4
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_rounds_of_noise_alone_are_no_loss_of_zero(make: Callable[..., PrivateTrainer]) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.forward = lambda *given, _forward=model.forward, **named: broken(_forward(*given, **named))

    def broken(out: Any) -> Any:
        out.logits = out.logits * math.nan
        return out

    trainer = make(max_steps=3, callbacks=[Breaks()])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss_not_private" in entry]
    assert [math.isnan(entry["loss_not_private"]) for entry in logs] == [False, True, True]
    assert [entry.get("rounds_of_noise_alone_not_private") for entry in logs] == [None, 1, 1]


@pytest.mark.parametrize(("max_steps", "epochs", "rounds"), [(-1, 1.0, 4), (-1, 1.5, 6), (3, 9.0, 3)])
def test_steps_and_epochs_fix_the_number_of_rounds(
    make: Callable[..., PrivateTrainer], max_steps: int, epochs: float, rounds: int
) -> None:
    trainer = make(max_steps=max_steps, num_train_epochs=epochs)
    trainer.train()
    assert trainer.session.privacy_plan.rounds == trainer.session.round == rounds


def test_gradients_and_schedule_are_those_of_the_session(make: Callable[..., PrivateTrainer], tmp_path: Path) -> None:
    """Trainer only steps: with SGD at a constant rate it equals the session on its own."""
    from coterie import dp

    options = {"optim": "sgd", "lr_scheduler_type": "constant"}
    trainer = make({"seed": 3, "method": "book_keeping"}, **options)
    trainer.train()
    model = tiny_model("olmoe", num_hidden_layers=1)
    records = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]
    session = dp.make_private(
        model, torch.optim.SGD(model.parameters(), 1e-2), records, budget=dp.Budget(6.0, 1e-3), lot_size=8,
        clip_norm=0.5, rounds=4, physical_batch=4, method="book_keeping", seed=3, ledger=tmp_path / "other",
    )  # fmt: skip
    for lot in session:
        session.step(lot)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, weights(trainer)[name], atol=1e-6), name


class Killed(BaseException):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            raise Killed


@pytest.mark.parametrize("killed_at", [3, 4])
def test_resume_goes_through_the_session_and_spends_nothing_twice(
    make: Callable[..., PrivateTrainer], tmp_path: Path, killed_at: int
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = make({"seed": 5, "digest": "whole"}, **options)
    whole.train()
    with pytest.raises(Killed):
        make({"seed": 5, "digest": "parts"}, callbacks=[KillAt(killed_at)], **options).train()
    saved = tmp_path / "out/checkpoint-2"
    assert (saved / "private_session/manifest.json").exists()
    assert not list(saved.glob("rng_state*"))
    trainer = make({"seed": 5, "digest": "parts"}, **options)
    trainer.train(resume_from_checkpoint=str(saved))
    assert trainer.session.releases.used == trainer.session.round == 4
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(trainer).items())


def test_experts_come_back_from_a_checkpoint(make: Callable[..., PrivateTrainer], tmp_path: Path) -> None:
    """Trainer itself leaves stacked experts as the model was built (transformers 5.23), with a warning."""
    trainer = make(save_strategy="steps", save_steps=4)
    trainer.train()
    fresh = make()
    assert any(not torch.equal(value, weights(trainer)[name]) for name, value in weights(fresh).items())
    fresh._load_from_checkpoint(str(tmp_path / "out/checkpoint-4"))
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(fresh).items())


def test_resume_with_another_number_of_steps_or_a_lost_ledger_is_refused(
    make: Callable[..., PrivateTrainer], tmp_path: Path
) -> None:
    make(save_strategy="steps", save_steps=2).train()
    with pytest.raises(CheckpointError, match="9 steps are asked for, the run was started for 4"):
        make(max_steps=9).train(resume_from_checkpoint=True)
    with pytest.raises(LedgerError, match="not in this dataset's ledger"):
        make({"ledger": tmp_path / "elsewhere"}).train(resume_from_checkpoint=True)


def test_resume_without_a_checkpoint_is_refused(make: Callable[..., PrivateTrainer], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        make().train(resume_from_checkpoint=True)


def test_users_can_be_the_unit(make: Callable[..., PrivateTrainer]) -> None:
    trainer = make({"user_column": "user", "lot_size": 2, "records_per_user": 3}, max_steps=2)
    trainer.train()
    assert "one user;" in str(trainer.statement())
    assert trainer.statement().units == 8


def test_the_user_is_never_shown_to_collator_and_model(make: Callable[..., PrivateTrainer]) -> None:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all("user" not in item for item in items)
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    rows = [{"input_ids": [3, 4, 5 + i], "labels": [3, 4, 5], "user": f"u{i % 8}"} for i in range(32)]
    privacy = {"user_column": "user", "lot_size": 2}
    for data in (rows, datasets.Dataset.from_list(rows)):
        trainer = make(privacy, data_=data, data_collator=collate, remove_unused_columns=False, max_steps=1)
        trainer.train()
        assert trainer.statement().units == 8
    with pytest.raises(DataError, match="by a list"):
        make(privacy | {"users": [i % 4 for i in range(32)]})


def test_classification_models_train_as_in_trainer(make: Callable[..., PrivateTrainer]) -> None:
    config = BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    rows = [{"input_ids": [1, 5 + i, 7], "attention_mask": [1, 1, 1], "label": i % 3} for i in range(32)]
    trainer = make(model=BertForSequenceClassification(config), data_=datasets.Dataset.from_list(rows), max_steps=2)
    trainer.train()
    assert trainer.session.round == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2"),
        ({"max_grad_norm": 0.5}, "max_grad_norm is 0.5"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is set"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1,
          "eval_steps": 1}, "load_best_model_at_end is set"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is set"),
        ({"torch_compile": True}, "torch_compile is set"),
        ({"report_to": ["wandb"]}, "report_to is wandb"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen is set"),
        ({"optim": "lomo"}, "optim is lomo"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is set"),
        ({"callbacks": [Reports.__new__(Reports)]}, "Reports reports to somewhere else"),
        ({"callbacks": [EarlyStoppingCallback()]}, "EarlyStoppingCallback stops by a metric"),
        ({"compute_loss_func": lambda outputs, labels, **_: outputs.loss}, "compute_loss_func is given"),
    ],
)  # fmt: skip
def test_options_that_break_the_guarantee_are_refused_in_one_sentence(
    make: Callable[..., PrivateTrainer], options: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda report_to: [])
    with pytest.raises(PrivacyError, match=sentence) as caught:
        make(**options)
    assert caught.value.why
    assert caught.value.fix


def test_early_stopping_is_fine_on_public_evaluation_data(make: Callable[..., PrivateTrainer]) -> None:
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    trainer = make({"evaluation_is_public": True}, callbacks=[EarlyStoppingCallback(1)], **options)
    trainer.train()
    trainer = make()
    with pytest.raises(PrivacyError, match="EarlyStoppingCallback"):
        trainer.add_callback(EarlyStoppingCallback())


def test_invariant_2_tf32_is_refused(make: Callable[..., PrivateTrainer]) -> None:
    trainer = make()
    trainer.args.tf32 = True  # transformers refuses it by itself where no GPU has it
    with pytest.raises(PrivacyError, match="tf32 is set"):
        check_arguments(trainer.args, trainer.privacy)


class OwnStep(PrivateTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return super(PrivateTrainer, self).training_step(model, inputs, num_items_in_batch)


def test_invariant_6_an_overridden_training_step_is_refused(make: Callable[..., PrivateTrainer]) -> None:
    with pytest.raises(PrivacyError, match="OwnStep overrides training_step"):
        make(cls=OwnStep)


def test_invariant_6_reporting_callbacks_cannot_be_added_later(make: Callable[..., PrivateTrainer]) -> None:
    trainer = make()
    for callback in (Reports, Reports.__new__(Reports)):
        with pytest.raises(PrivacyError, match="Reports reports to somewhere else"):
            trainer.add_callback(callback)


class OwnLoss(PrivateTrainer):
    def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
        return model(**inputs).loss


def test_a_loss_over_the_batch_is_refused(make: Callable[..., PrivateTrainer]) -> None:
    with pytest.raises(PrivacyError, match="compute_loss is overridden"):
        make(cls=OwnLoss)


def test_collator_that_packs_records_is_refused(make: Callable[..., PrivateTrainer]) -> None:
    with pytest.raises(PrivacyError, match=r"packs several records|made 1 rows|how many records"):
        make(data_collator=DataCollatorWithFlattening(), max_steps=6).train()


def test_trainer_s_own_default_of_max_grad_norm_is_replaced_with_a_warning(
    make: Callable[..., PrivateTrainer],
) -> None:
    with pytest.warns(PrivacyWarning, match="max_grad_norm is not used"):
        assert make(max_grad_norm=1.0).args.max_grad_norm == 0


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield {"input_ids": [1, 2], "labels": [1, 2]}


def test_streams_and_unknown_settings_are_refused(make: Callable[..., PrivateTrainer]) -> None:
    with pytest.raises(DataError, match="Stream has no length"):
        make(data_=Stream()).train()
    with pytest.raises(PrivacyError, match="`noise` is not a privacy setting"):
        make({"noise": 1})
    with pytest.raises(PrivacyError, match="`epsilon` is missing"):
        PrivacyArguments.of({"delta": 1e-5})


def test_logs_hold_nothing_that_json_cannot(make: Callable[..., PrivateTrainer]) -> None:
    trainer = make(max_steps=2)
    trainer.train()
    json.dumps(trainer.state.log_history)
    json.dumps(trainer.statement().to_json(), allow_nan=False)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_saved_model_says_what_it_was_trained_under_and_is_held_to_it(
    make: Callable[..., PrivateTrainer], tmp_path: Path, seed: int | None
) -> None:
    trainer = make({"seed": seed}, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    (training,) = read_trainings(tmp_path / "saved")
    assert (training.privacy, training.run) == ("budget" if seed is None else "seeded", trainer.session.run)
    again = make(model=OlmoeForCausalLM.from_pretrained(tmp_path / "saved"), max_steps=1)
    if seed is not None:
        with pytest.raises(ProvenanceError, match=r"declared public, but run .* with noise from a seed"):
            again.train()
        return
    again.train()
    assert f"counted in ledger {training.ledger}" in str(again.statement())


@pytest.mark.parametrize(
    ("options", "asked", "expected"),
    [({"bf16": True}, None, "exact"), ({"bf16": True}, "fast", "fast"), ({}, None, "fast"), ({}, "exact", "exact")],
)
def test_autocast_of_the_trainer_counts_as_half_precision(
    make: Callable[..., PrivateTrainer], options: dict[str, Any], asked: str | None, expected: str
) -> None:
    trainer = make({"isolation": asked}, max_steps=1, **options)
    trainer.train()
    statement = trainer.statement()
    assert statement.isolation == expected
    assert ("0.05 to 0.25 C" in str(statement)) == (expected == "fast" and "bf16" in options)
