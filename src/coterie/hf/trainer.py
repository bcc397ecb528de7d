"""`transformers.Trainer` with differential privacy: the same arguments, and ``privacy=``."""

from __future__ import annotations

import inspect
import math
import shutil
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers.trainer
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint

from coterie.dp.accounting.budget import PrivacyWarning, Spent
from coterie.dp.accounting.dataset import checked_length, dataset_digest
from coterie.dp.accounting.statement import Statement
from coterie.dp.accounting.users import user_column, user_ids
from coterie.dp.numbers import checked_number
from coterie.dp.plan import ComputeOptions
from coterie.dp.private_data import Collate, PrivateData
from coterie.dp.session import PrivateSession
from coterie.dp.setup import start_session
from coterie.dp.stepping import momentum_of
from coterie.errors import CheckpointError, PrivacyError
from coterie.hf.arguments import PrivacyArguments, check_accelerator, check_arguments, check_callbacks
from coterie.hf.choices import WatchedCallbacks, check_scheduler, refusal
from coterie.hf.shared import (
    STATE,
    Cost,
    begun_checkpoint,
    failing_together,
    hand_out_weights,
    note_run,
    was_started_again,
)
from coterie.models.split.trainings import trainings_of, write_trainings
from coterie.ranks.processes import join_ranks
from coterie.ranks.ranks import Ranks, ranks_or_alone
from coterie.training.folders import close_to_others, kept_private, public_folder

_DRAWN_HERE = (
    "get_train_dataloader", "_get_train_sampler", "_get_dataloader", "get_batch_samples", "_prepare_inputs",
    "_prepare_input", "_run_epoch", "_inner_training_loop", "_clip_grad_norm", "compute_loss_context_manager",
    "autocast_smart_context_manager",
)  # fmt: skip
"""Methods of Trainer that a private round does not call, or that would change which records it uses."""


class _Rounds(Dataset[dict[str, Tensor]]):
    """Stands for one epoch of lots in Trainer's loop, which counts batches; the lots themselves stay secret."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"round": torch.tensor(index)}


class _StopWhenSpent(TrainerCallback):  # type: ignore[misc]
    """Ends training when no release is left, which is early where rounds were burned."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        session = self._trainer.session
        if session is not None and session.remaining <= 0 and session.round < session.privacy_plan.rounds:
            control.should_training_stop = not session.has_release()
        return control


class PrivateTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` whose training is (epsilon, delta)-differentially private.

    Every optimizer step uses one Poisson lot of ``privacy.lot_size`` expected records, each record's gradient
    clipped, and noise from the operating system; the privacy ledger counts it. Evaluation, prediction, saving,
    checkpoints, callbacks and schedules work as in Trainer. Losses in the logs are called ``loss_not_private``.

    Under ``torchrun`` or ``accelerate launch`` all processes share every lot: ``per_device_train_batch_size`` is the
    physical batch of one, ``lot_size`` is of all together. Processes that the launcher starts again go on from the
    newest checkpoint.

    Args:
        privacy: `PrivacyArguments`, or a mapping of them.
        args: as for Trainer.
        kwargs: as for Trainer.

    Raises:
        PrivacyError: an option that would make the statement untrue.

    Example::

        trainer = PrivateTrainer(model, TrainingArguments("run"), train_dataset=data,
                                 privacy={"epsilon": 8.0, "delta": 1e-5, "lot_size": 256})
        trainer.train()
        print(trainer.statement())
    """

    state: Any
    callback_handler: Any

    def __init__(self, *args: Any, privacy: PrivacyArguments | Mapping[str, Any], **kwargs: Any) -> None:
        self.privacy = PrivacyArguments.of(privacy)
        self.session: PrivateSession | None = None
        self._cost: Cost | None = None
        self._logged_losses: list[float] = []
        super().__init__(*args, **kwargs)
        self._check_again()
        self.callback_handler = WatchedCallbacks.of(self.callback_handler, self.privacy.evaluation_is_public)
        if self.args.max_grad_norm:
            warnings.warn(
                "max_grad_norm is not used in private training: privacy clip_norm clips each record's gradient.",
                PrivacyWarning,
                stacklevel=2,
            )
            self.args.max_grad_norm = 0.0
        self.callback_handler.add_callback(_StopWhenSpent(self))

    def _check_again(self) -> None:
        """What may have changed since the trainer was made: arguments, callbacks, schedule, methods of the object."""
        check_arguments(self.args, self.privacy)
        check_accelerator(self.accelerator)
        check_callbacks(self.callback_handler.callbacks, self.privacy)
        if not self.privacy.evaluation_is_public:
            check_scheduler(self.lr_scheduler)
        self._check_evaluation()
        self._check_hooks()
        self._check_loaders()

    def _check_evaluation(self) -> None:
        held = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if self.privacy.evaluation_is_public and any(data is self.train_dataset for data in held):
            raise refusal(
                "evaluation_is_public is set, and the evaluation set is the training set",
                "stopping and choosing by it would reveal the records that are to be protected",
                "evaluate on data that is public, or leave evaluation_is_public out",
            )

    def _check_loaders(self) -> None:
        for name in _DRAWN_HERE:
            if getattr(type(self), name, None) is not getattr(PrivateTrainer, name, None) or name in vars(self):
                raise PrivacyError(
                    f"{type(self).__name__} overrides {name}.",
                    code="hf-loader",
                    why="records are drawn by Poisson sampling in secret; another sampler or loader would be ignored",
                    fix="change the train_dataset or the data_collator, or pass privacy sampler and lot_size",
                )

    def _check_hooks(self) -> None:
        problems = {
            "compute_loss_func is given": self.compute_loss_func is not None,
            "compute_loss is overridden": type(self).compute_loss is not Trainer.compute_loss
            or "compute_loss" in vars(self),
        }
        for problem, found in problems.items():
            if found:
                raise PrivacyError(
                    f"{problem}, and its loss is a mean over the batch.",
                    code="hf-loss",
                    why="num_items_in_batch and batch means tie each record's gradient to the other records",
                    fix="pass privacy loss_fn=..., a function of (model, batch) that returns one loss per record",
                )
        if type(self).training_step is not PrivateTrainer.training_step or "training_step" in vars(self):
            raise PrivacyError(
                f"{type(self).__name__} overrides training_step.",
                code="hf-loss",
                why="training_step is where a lot is clipped and noised; another one would step with raw gradients",
                fix="pass privacy loss_fn=..., and use callbacks for what happens around a step",
            )
        if self.model_init is not None:
            raise PrivacyError(
                "model_init is given.",
                code="hf-option",
                why="a model made anew inside train() could not be checked before it sees private records",
                fix="pass the model itself; trials are runs of their own, and the ledger adds them up",
            )

    # -- what Trainer calls ----------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; no model is wrapped to add up gradients, as ranks meet in the session."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def add_callback(self, callback: Any) -> None:
        check_callbacks([callback], self.privacy)
        super().add_callback(callback)

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """One item for each round of an epoch; the records are drawn by the session."""
        return DataLoader(_Rounds(self._rounds_per_epoch()), batch_size=1)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train within the budget, or go on from a checkpoint: nothing that was released is computed again.

        Where a launcher starts the processes again after one has failed, and nothing else is asked for, this goes on
        with the run that they had begun.
        """
        output_dir = Path(self.args.output_dir)
        self._check_again()
        ranks: Ranks = join_ranks() if self.args.world_size > 1 else ranks_or_alone(None)
        with ranks, failing_together(ranks), ExitStack() as opened:
            with ranks.all_well("the output folder"):
                private = opened.enter_context(kept_private(output_dir))
            found = ranks.tell("where to begin", lambda: self._beginning(resume_from_checkpoint, private))
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is None:
                    callback.logging_dir = str(private / "tensorboard")
            self.session = opened.enter_context(self._open(Path(found) if found else None, ranks))
            self._cost = Cost(ranks, self.session)
            ranks.tell("the run's note", partial(note_run, private, self.session))
            result = super().train(found, *args, **kwargs)
            self._cost.tell_statement()
            self._cost.tell_spent()
            return result

    def _beginning(self, asked: str | bool | None, private: Path) -> str | None:
        """The checkpoint to go on from; None for a new run."""
        if isinstance(asked, str):
            return asked
        if asked is None and was_started_again():
            return begun_checkpoint(private)
        if not asked:
            note_run(private, None)
            return None
        found: str | None = get_last_checkpoint(self.args.output_dir)
        if found is None:
            raise CheckpointError(
                f"{self.args.output_dir} holds no checkpoint.",
                code="hf-no-checkpoint",
                fix="start with train(), or name a checkpoint folder",
            )
        return found

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; a schedule of a subclass's own is looked at too."""
        made = super().create_scheduler(*args, **kwargs)
        if not self.privacy.evaluation_is_public:
            check_scheduler(made)
        return made

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        private = not self.privacy.evaluation_is_public
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler or private)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """No checkpoint is the best by private figures: the newest are kept."""
        return self.privacy.evaluation_is_public and bool(super()._determine_best_metric(metrics, trial))

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the best trial would be chosen by private figures, and trials are runs of their own."""
        raise refusal(
            "hyperparameter_search chooses among trials by a metric",
            "each trial spends budget of its own, and the choice reveals private records",
            "choose settings on public data; the ledger adds up runs that you start yourself",
        )

    # -- what leaves this machine ----------------------------------------------------------------------------------

    def publish(self, model_name: str | None = None, **card: Any) -> Path:
        """Write what may be given away into ``output_dir/public``: model, tokenizer, card without losses, statement.

        Args:
            model_name: as for ``create_model_card``.
            card: as for ``create_model_card``.

        Returns:
            The folder; nothing else is in it. Of several processes the first one writes it.

        Raises:
            PrivacyError: nothing was trained, or the run was seeded and is not private.
        """
        statement = self.statement()
        folder = public_folder(Path(self.args.output_dir))
        if not statement.private:
            raise PrivacyError(
                "the run was seeded, so its model is not private.",
                code="hf-not-private",
                why="whoever knows the seed can take the noise away",
                fix="train without a seed before publishing",
            )
        if not self.is_world_process_zero():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        self._save(str(folder))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # names folders of this machine, and tokens
        self._write_card(folder, model_name or Path(self.args.output_dir).absolute().name, card)
        (folder / "statement.txt").write_text(f"{statement}\n", encoding="utf-8")
        with (folder / "README.md").open("a", encoding="utf-8") as file:
            file.write(f"\n## Privacy\n\n```\n{statement}\n```\n")
        close_to_others(folder)
        return folder

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card in ``output_dir/public``, without losses; see `publish`."""
        names = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
        names.pop("self")
        self.publish(names.pop("model_name", None), **names)

    def _write_card(self, folder: Path, model_name: str, card: dict[str, Any]) -> None:
        state, output_dir = self.state, self.args.output_dir
        # Trainer writes the card from the logs, which hold every round's exact loss, into the output folder.
        self.state, self.args.output_dir = copy(state), str(folder)
        self.state.log_history = []
        try:
            super().create_model_card(model_name=model_name, **card)
        finally:
            self.state, self.args.output_dir = state, output_dir

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None,
        revision: str | None = None, private: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Send up ``output_dir/public`` and nothing else; see `publish`. Arguments and result are Trainer's.

        Raises:
            PrivacyError: as `publish`.
        """
        folder = self.publish(**kwargs)
        if not self.is_world_process_zero():
            return None
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        api: Any = getattr(transformers.trainer, "hf_api", HfApi)()
        return api.upload_folder(
            repo_id=self.hub_model_id, folder_path=str(folder), commit_message=commit_message, token=token,
            run_as_future=not blocking, revision=revision if revision is not None else self.args.hub_revision,
        )  # fmt: skip

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: checkpoints hold the logs."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One round: noisy mean gradients are in ``.grad`` afterwards; Trainer steps the optimizer."""
        session = self._opened()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        session.put_gradients()
        figures = session.last
        loss = figures.loss if figures is not None else math.nan
        self._logged_losses.append(loss)
        return torch.tensor(loss, device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; the training loss is named for what it is, and epsilon goes with it.

        Rounds whose lot was empty, or had no finite record, have no loss: Trainer would put an average or 0.0 there.
        """
        if "loss" in logs and self._logged_losses:
            finite = [loss for loss in self._logged_losses if math.isfinite(loss)]
            if len(finite) < len(self._logged_losses):
                logs["loss"] = math.fsum(finite) / len(finite) if finite else math.nan
                logs["rounds_of_noise_alone_not_private"] = len(self._logged_losses) - len(finite)
            self._logged_losses = []
        for name in ("loss", "train_loss"):
            if name in logs:
                logs[f"{name}_not_private"] = logs.pop(name)
        if self.is_in_train and self._cost is not None and ("learning_rate" in logs or "train_runtime" in logs):
            logs["epsilon"] = self._cost.tell_spent().epsilon
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in Trainer, with what the model was trained under beside it, for whoever starts from it."""
        super()._save(output_dir, state_dict)
        if self.session is not None and self.args.should_save:
            trainings = (*trainings_of(self.model), self.session.training())
            write_trainings(Path(output_dir or self.args.output_dir), trainings)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.session is not None:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            self.session.save_state(folder / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in Trainer, except that stacked experts are loaded too.

        transformers 5 writes experts one by one and Trainer reads them back by name into a model that has them
        stacked: it warns of missing keys and goes on with the weights the model was built with.
        """
        model = model if model is not None else self.model
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(model).from_pretrained(resume_from_checkpoint, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """The best checkpoint, experts included; see `_load_from_checkpoint`."""
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it would depend on the lot."""
        return 0

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: lots, dropout and noise come from keys that are never kept, and nothing else is random here."""

    # -- what it cost ----------------------------------------------------------------------------------------------

    def spent(self) -> Spent:
        """What this run has spent so far.

        Raises:
            PrivacyError: before `train`.
        """
        return self._cost_so_far().spent()

    def statement(self) -> Statement:
        """The privacy statement as of now; ``str()`` of it is for people.

        Raises:
            PrivacyError: before `train`.
        """
        return self._cost_so_far().statement()

    def _cost_so_far(self) -> Cost:
        return self._cost if self._cost is not None else _untrained()

    def _opened(self) -> PrivateSession:
        return self.session if self.session is not None else _untrained()

    # -- setting up ------------------------------------------------------------------------------------------------

    def _rounds_per_epoch(self) -> int:
        return max(1, round(self._units() / self.privacy.lot_size))

    def _units(self) -> int:
        users = self._users()
        return len(set(user_ids(users))) if users is not None else checked_length(self.train_dataset)

    def _users(self) -> Any:
        if self.privacy.user_column is not None:
            return user_column(self.train_dataset, self.privacy.user_column)
        return self.privacy.users

    def _rounds(self) -> int:
        per_epoch = self._rounds_per_epoch()
        if self.args.max_steps > 0:
            return int(checked_number("rounds", self.args.max_steps))
        return math.ceil(float(checked_number("epochs", self.args.num_train_epochs)) * per_epoch)

    def _in_half(self) -> bool:
        """Whether accelerate runs the model under autocast, which the model itself does not show."""
        return self.args.bf16 or self.accelerator.mixed_precision in ("bf16", "fp16")

    def _records(self) -> Any:
        columns = getattr(self.train_dataset, "column_names", None)
        return self.train_dataset if columns is None else self._remove_unused_columns(self.train_dataset, "training")

    def _collator(self) -> Collate:
        """The collator, which sees no column that names the user."""
        collate: Collate = self._get_collator_with_removed_columns(self.data_collator, "training")
        column = self.privacy.user_column
        if column is None:
            return collate
        return lambda items: collate([{k: v for k, v in item.items() if k != column} for item in items])

    def _open(self, checkpoint: Path | None, ranks: Ranks) -> PrivateSession:
        """The session of this run, new or as a checkpoint left it; makes the optimizer that it watches."""
        privacy, args = self.privacy, self.args
        checked_length(self.train_dataset)
        self._move_model_to_device(self.model, args.device)
        hand_out_weights(self.model, ranks)
        self.create_optimizer()
        records = self._records()
        collate = self._collator()
        digest = privacy.digest or dataset_digest(self.train_dataset)
        if checkpoint is None:
            plan = privacy.plan(self.model, self._rounds(), self._in_half(), momentum_of(self.optimizer))
            data = PrivateData.of(
                records, collate, users=self._users(), records_per_user=plan.records_per_user, digest=digest
            )
            options = ComputeOptions(
                privacy.method, args.per_device_train_batch_size, tensor_cores=privacy.tensor_cores
            ).repeatable(plan.seed)
            return start_session(
                self.model, self.optimizer, data, plan, options, loss_fn=privacy.loss_fn,
                provenance=privacy.provenance, ledger=privacy.ledger, ranks=ranks,
            )  # fmt: skip
        session = PrivateSession.resume(
            checkpoint / STATE, self.model, self.optimizer, records, collate, privacy.loss_fn, ledger=privacy.ledger,
            digest=digest, users=self._users(), clipping=privacy.clipping, method=privacy.method, state_only=True,
            ranks=ranks,
        )  # fmt: skip
        if session.privacy_plan.rounds != self._rounds():
            session.close()
            raise CheckpointError(
                f"{self._rounds()} steps are asked for, the run was started for {session.privacy_plan.rounds}.",
                code="hf-rounds-changed",
                why="noise was calibrated to the number of steps",
                fix="keep max_steps, num_train_epochs and lot_size as they were, or start a new run",
            )
        return session


def _untrained() -> NoReturn:
    raise PrivacyError(
        "nothing was trained yet, so nothing was spent.", code="hf-not-trained", fix="call train() first"
    )
