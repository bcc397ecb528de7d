"""Private figures decide nothing and go nowhere: through objects and launchers as little as through names."""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback

from coterie.errors import PrivacyError
from coterie.hf import PrivateTrainer
from coterie.hf.arguments import check_accelerator
from coterie.hf.choices import check_scheduler
from coterie.models.zoo.tiny import tiny_model


def rows(count: int = 24) -> list[dict[str, Any]]:
    ids = torch.randint(3, 90, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


def trainer(
    tmp_path: Path, privacy: dict[str, Any] | None = None, cls: Any = PrivateTrainer, model: Any = None, **more: Any
) -> PrivateTrainer:
    arguments = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0,
    }  # fmt: skip
    given = {name: more.pop(name) for name in ("callbacks", "optimizers") if name in more}
    return cls(
        model or tiny_model("olmoe", num_hidden_layers=1),
        TrainingArguments(str(tmp_path / "out"), **arguments | more),
        train_dataset=rows(),
        eval_dataset=rows(6),
        privacy={"epsilon": 8.0, "delta": 1e-3, "lot_size": 6, "ledger": tmp_path / "l"} | (privacy or {}),
        **given,
    )


# -- schedules ------------------------------------------------------------------------------------------------------


class Holds:
    """A schedule around another one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def step(self) -> None:
        self.inner.step()


class OwnPlateau:
    def step(self, loss: float) -> None:
        """Changes the rate by what it is told."""


def plateau() -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def test_schedules_that_look_at_a_metric_are_refused_however_they_are_wrapped() -> None:
    from accelerate.scheduler import AcceleratedScheduler

    for made in (
        plateau(),
        Holds(plateau()),
        Holds([Holds(plateau())]),
        AcceleratedScheduler(plateau(), []),
        OwnPlateau(),
    ):
        with pytest.raises(PrivacyError, match="looks at a metric"):
            check_scheduler(made)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer)
    for made in (None, linear, Holds(linear), torch.optim.lr_scheduler.ChainedScheduler([linear])):
        check_scheduler(made)


class OwnSchedule(PrivateTrainer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = plateau()
        return super().create_scheduler(num_training_steps, optimizer)


def test_a_schedule_that_a_subclass_makes_is_looked_at(tmp_path: Path) -> None:
    made = trainer(tmp_path, cls=OwnSchedule)
    with pytest.raises(PrivacyError, match="looks at a metric"):
        made.train()
    assert made.session.releases.used == 0


# -- callbacks and checkpoints --------------------------------------------------------------------------------------


class Patience(TrainerCallback):
    """Early stopping under another name."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> Any:
        control.should_training_stop = metrics["eval_loss"] > 0
        return control


class Remembers(TrainerCallback):
    """Sees the loss in one event and decides in another."""

    seen = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen = logs.get("loss_not_private", 1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.seen:
            optimizer.param_groups[0]["lr"] = 0.5


class Keeps(TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        control.should_save = True


class ReadsTheLog(TrainerCallback):
    """Is shown nothing, and looks at the state; in another event it decides."""

    found = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.found = any(entry.get("loss_not_private", 0.0) > 0 for entry in reversed(state.log_history))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.found


class ReadsTheLast(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if len(state.log_history) > 1 and state.log_history[-1]:
            optimizer.param_groups[0]["lr"] = 0.5


@pytest.mark.parametrize(
    "callback",
    [Patience(), Remembers(), Keeps(), ReadsTheLog(), ReadsTheLast()],
    ids=lambda c: type(c).__name__,
)
def test_callbacks_that_decide_by_private_figures_are_undone_and_refused(tmp_path: Path, callback: Any) -> None:
    made = trainer(tmp_path, callbacks=[callback], eval_strategy="steps", eval_steps=1)
    with pytest.raises(PrivacyError, match=f"{type(callback).__name__} decides by what it is shown"):
        made.train()
    assert not made.control.should_training_stop
    assert made.optimizer.param_groups[0]["lr"] != 0.5
    assert not list((tmp_path / "out").glob("checkpoint-*"))


class Stops(TrainerCallback):
    """By a fixed step, without looking."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


class Prints(TrainerCallback):
    shown = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        type(self).shown += 1


def test_callbacks_that_only_look_or_only_stop_are_fine(tmp_path: Path) -> None:
    made = trainer(tmp_path, callbacks=[Stops(), Prints()], eval_strategy="steps", eval_steps=1)
    made.train()
    assert made.state.global_step == 2
    assert Prints.shown == 2
    with pytest.raises(PrivacyError, match="stops by a metric"):
        made.add_callback(EarlyStoppingCallback())


@pytest.mark.parametrize("callback", [Remembers(), ReadsTheLog()], ids=lambda c: type(c).__name__)
def test_training_losses_decide_nothing_where_the_evaluation_is_public(tmp_path: Path, callback: Any) -> None:
    public = {"evaluation_is_public": True}
    made = trainer(tmp_path, public, callbacks=[callback])
    with pytest.raises(PrivacyError, match=f"{type(callback).__name__} decides by what it is shown"):
        made.train()
    made = trainer(tmp_path, public, callbacks=[Patience()], eval_strategy="steps", eval_steps=1)
    made.train()
    assert made.state.global_step == 1


def test_the_training_set_is_no_public_evaluation_set(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"evaluation_is_public": True})
    for data in (made.train_dataset, {"a": made.train_dataset}):
        made.eval_dataset = data
        with pytest.raises(PrivacyError, match="the evaluation set is the training set"):
            made.train()


def test_no_checkpoint_is_kept_for_its_private_metric(tmp_path: Path) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
    }
    with pytest.raises(PrivacyError, match="metric_for_best_model is set"):
        trainer(tmp_path, metric_for_best_model="eval_loss", **options)
    made = trainer(tmp_path, **options)
    made.args.metric_for_best_model = "eval_loss"  # after it was looked at
    with pytest.raises(PrivacyError, match="metric_for_best_model is set"):
        made.train()
    assert not made._determine_best_metric({"eval_loss": 0.1}, None)
    assert made.state.best_metric is None


def test_trials_are_not_chosen_by_a_metric(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="hyperparameter_search chooses among trials"):
        trainer(tmp_path).hyperparameter_search(n_trials=2)


# -- what is in effect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mixed_precision", "fp16", "fp16"),
        ("deepspeed_plugin", object(), "DeepSpeed"),
        ("fsdp_plugin", object(), "FSDP"),
        ("scaler", object(), "fp16"),
        ("parallelism_config", ParallelismConfig(tp_size=2), "a parallelism_config"),
        ("gradient_accumulation_steps", 4, "gradient accumulation"),
    ],
)
def test_what_a_launcher_set_up_is_refused(tmp_path: Path, name: str, value: Any, words: str) -> None:
    class Plugin:
        backend = "NO"

    class State:
        mixed_precision, deepspeed_plugin, fsdp_plugin, dynamo_plugin = "no", None, None, Plugin()

    class Accelerator:
        state, scaler, parallelism_config, gradient_accumulation_steps = State(), None, None, 1

    check_accelerator(Accelerator())
    setattr(Accelerator.state if hasattr(State, name) else Accelerator, name, value)
    with pytest.raises(PrivacyError, match=f"accelerate is set up with {words}"):
        check_accelerator(Accelerator())


def test_a_launcher_s_fp16_variable_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    made = trainer(tmp_path)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    with pytest.raises(PrivacyError, match="accelerate is set up with fp16"):
        made.train()
    assert made.session is None


class OwnLoader(PrivateTrainer):
    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=2)


class OwnSampler(PrivateTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("cls", [OwnLoader, OwnSampler])
def test_own_samplers_and_loaders_are_refused(tmp_path: Path, cls: Any) -> None:
    with pytest.raises(PrivacyError, match=f"{cls.__name__} overrides"):
        trainer(tmp_path, cls=cls)


def test_methods_replaced_on_the_object_are_refused(tmp_path: Path) -> None:
    for name in ("get_train_dataloader", "training_step", "compute_loss"):
        made = trainer(tmp_path)
        setattr(made, name, lambda *_, **__: None)
        with pytest.raises(PrivacyError, match=name):
            made.train()


# -- what is sent up ------------------------------------------------------------------------------------------------


class Hub:
    """Stands for the hub: keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: dict[str, bytes] = {}

    def create_repo(self, *_: Any, **__: Any) -> Any:
        return type("Repo", (), {"repo_id": "me/model"})()

    def upload_folder(self, folder_path: str, **_: Any) -> str:
        files = (path for path in Path(folder_path).rglob("*") if path.is_file())
        self.sent = {str(path.relative_to(folder_path)): path.read_bytes() for path in files}
        return "sent"


@pytest.mark.parametrize("way", ["push_to_hub", "create_model_card"])
def test_model_card_and_statement_are_all_that_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: hub, raising=False)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    made = trainer(tmp_path, report_to=["tensorboard"], **options)
    with pytest.raises(PrivacyError, match="nothing was trained yet"):
        getattr(made, way)()
    made.train()
    made.evaluate()
    made.save_metrics("eval", {"eval_loss": 1.25})
    (tmp_path / "out/notes.txt").write_text("the owner's")
    getattr(made, way)()
    public = tmp_path / "out/public"
    files = {path.name for path in public.iterdir()}
    assert {"README.md", "statement.txt", "config.json", "model.safetensors"} <= files
    files -= {"README.md", "statement.txt", "config.json", "model.safetensors", "generation_config.json"}
    assert files <= {"coterie.json"}
    if way == "push_to_hub":
        assert set(hub.sent) == {path.name for path in public.iterdir()}
    card = (public / "README.md").read_text()
    assert "adding or removing one record" in card
    for entry in made.state.log_history:
        for name in ("eval_loss", "loss_not_private"):
            if math.isfinite(entry.get(name, math.nan)):  # the loss of an empty lot is none
                assert f"{entry[name]:.4f}" not in card
    assert "adding or removing one record" in (public / "statement.txt").read_text()
    events = list((tmp_path / "out").rglob("*tfevents*"))
    assert events
    assert all(path.is_relative_to(tmp_path / "out/private") for path in events)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in public.iterdir())


def test_a_seeded_run_has_nothing_to_publish(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"seed": 3})
    made.train()
    with pytest.raises(PrivacyError, match="its model is not private"):
        made.push_to_hub()
    assert not (tmp_path / "out/public").exists()


def test_checkpoints_are_never_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: hub, raising=False)
    made = trainer(tmp_path, save_strategy="steps", save_steps=1)
    made.args.push_to_hub = True
    made._push_from_checkpoint(str(tmp_path))
    with pytest.raises(PrivacyError, match="push_to_hub is set"):
        made.train()
    assert not hub.sent
