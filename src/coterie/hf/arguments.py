"""What `PrivateTrainer` is told about privacy, and which of `TrainingArguments` would break it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SaveStrategy

from coterie.dp.accounting.budget import Budget
from coterie.dp.accounting.provenance import Artefact
from coterie.dp.accounting.users import check_one_naming
from coterie.dp.balance import Balance
from coterie.dp.clipping import Clipping
from coterie.dp.isolation.exact_engine import Isolation, chosen, computes_in_half
from coterie.dp.losses import LossFunction
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.numbers import check_fields
from coterie.dp.per_sample.memory_choice import Method
from coterie.dp.plan import PrivacyPlan
from coterie.errors import PrivacyError

_LOCAL_REPORTS = {"none", "tensorboard"}
_DEFAULT_MAX_GRAD_NORM = 1.0
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
_REMOTE_CALLBACKS = tuple(
    callback for name, callback in INTEGRATION_TO_CALLBACK.items() if name not in _LOCAL_REPORTS
)


@dataclass(frozen=True)
class PrivacyArguments:
    """The ``privacy=`` of `coterie.hf.PrivateTrainer`; see `coterie.dp.make_private` for what each does.

    The number of rounds follows from ``max_steps`` or ``num_train_epochs``, the records computed at once are
    ``per_device_train_batch_size``; neither changes what is promised, ``lot_size`` is the batch of the optimizer.

    Attributes:
        epsilon, delta: the budget.
        lot_size: expected records in one optimizer step.
        clip_norm: C; there is no default for the gradient of the whole batch, as each record is clipped by itself.
        loss_fn: ``loss_fn(model, batch) -> [B]``; default: the model's own loss of each record.
        evaluation_is_public: the evaluation set is public, so that stopping and choosing checkpoints may use it.
        seed: for tests only; the run is then NOT private. ``TrainingArguments.seed`` never seeds anything secret.
    """

    epsilon: float
    delta: float
    lot_size: int = 256
    clip_norm: float = 1.0
    clipping: str | Clipping = "flat"
    method: Method = "auto"
    isolation: Isolation | None = None
    adaptive_quantile: float | None = None
    sampler: str = "poisson"
    max_lot: int | None = None
    user_column: str | None = None
    users: Sequence[Hashable] | None = None
    records_per_user: int = 16
    balance: Balance | None = None
    noise_bands: int = 1
    tensor_cores: bool = False
    provenance: Mapping[str, str] | Iterable[Artefact] | None = None
    ledger: str | Path | None = None
    digest: str | None = None
    loss_fn: LossFunction | None = None
    evaluation_is_public: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            "epsilon",
            "delta",
            "lot_size",
            "clip_norm",
            "adaptive_quantile",
            "max_lot",
            "records_per_user",
            "noise_bands",
            "seed",
        )
        check_one_naming(self.user_column, self.users)

    def plan(self, model: nn.Module, rounds: int, half_precision: bool, momentum: float = 0.0) -> PrivacyPlan:
        """What these settings bound.

        Args:
            model: tells whether it computes in half precision.
            rounds: optimizer steps planned.
            half_precision: it does under autocast, which the model itself does not show.
            momentum: of the optimizer, for noise in bands.
        """
        half = half_precision or computes_in_half(model)
        return PrivacyPlan(
            Budget(self.epsilon, self.delta),
            rounds,
            self.lot_size,
            clip_norm=self.clip_norm,
            clipping=self.clipping,
            adaptive_quantile=self.adaptive_quantile,
            sampler=self.sampler,  # type: ignore[arg-type]
            max_lot=self.max_lot,
            records_per_user=self.records_per_user,
            balance=self.balance or Balance(),
            isolation=chosen(self.isolation, half),
            half_precision=half,
            seed=self.seed,
            bands=NoiseBands.of(self.noise_bands, rounds, momentum),
        )

    @classmethod
    def of(cls, given: PrivacyArguments | Mapping[str, Any]) -> PrivacyArguments:
        """From a mapping, too.

        Raises:
            PrivacyError: a name that is not a setting.
        """
        if isinstance(given, PrivacyArguments):
            return given
        unknown = sorted(given.keys() - cls.__dataclass_fields__.keys())
        missing = sorted({"epsilon", "delta"} - given.keys())
        if unknown or missing:
            problem = f"`{unknown[0]}` is not a privacy setting" if unknown else f"`{missing[0]}` is missing"
            raise PrivacyError(
                f"{problem}.",
                code="hf-privacy-argument",
                why="an ignored privacy setting would train without what it asks for",
                fix="the settings are: " + ", ".join(cls.__dataclass_fields__),
            )
        return cls(**given)


def check_arguments(args: TrainingArguments, privacy: PrivacyArguments) -> None:
    """Refuse the options under which the statement would be untrue, or which would do something else than they say.

    Raises:
        PrivacyError: code hf-option; one sentence on the option, and what to use instead.
    """
    if args.gradient_accumulation_steps != 1:
        _refuse(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}",
            "it rescales and adds up batches, while a private step is one lot drawn as a whole",
            "set privacy lot_size to the size you want; per_device_train_batch_size only decides what fits in memory",
        )
    if args.max_grad_norm not in (None, 0.0, _DEFAULT_MAX_GRAD_NORM):
        _refuse(
            f"max_grad_norm is {args.max_grad_norm}",
            "it would clip the sum that is already noised, while privacy comes from clipping each record",
            "set privacy clip_norm, and max_grad_norm=0",
        )
    if args.train_sampling_strategy != "random":
        _refuse(
            f"train_sampling_strategy is {args.train_sampling_strategy}",
            "records must join a batch independently of each other and of their length",
            "leave it at random; lots are drawn by Poisson sampling",
        )
    if args.label_smoothing_factor:
        _refuse(
            "label_smoothing_factor is set",
            "Trainer's smoothed loss is a mean over the batch's tokens, which ties records to each other",
            "pass a privacy loss_fn that smooths each record's loss",
        )
    _check_selection(args, privacy)
    _check_machine(args)
    remote = sorted(set(args.report_to or ()) - _LOCAL_REPORTS)
    if remote or args.push_to_hub:
        _refuse(
            f"report_to is {remote[0]}" if remote else "push_to_hub is set",
            "training losses are computed on private records without noise and must not leave this machine",
            "use report_to='tensorboard' or 'none', and call push_to_hub() when the model is finished",
        )


def _check_selection(args: TrainingArguments, privacy: PrivacyArguments) -> None:
    """Stopping, and choosing a checkpoint, by a metric."""
    if privacy.evaluation_is_public:
        return
    best = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    if args.metric_for_best_model is not None and not best and args.lr_scheduler_type not in _BY_METRIC:
        _refuse(
            "metric_for_best_model is set",
            "the checkpoint that is kept would be chosen by looking at private records",
            "leave it out; save_total_limit then keeps the newest",
        )
    if best or args.lr_scheduler_type in _BY_METRIC:
        _refuse(
            "load_best_model_at_end is set" if best else f"lr_scheduler_type is {args.lr_scheduler_type}",
            "a choice made by looking at private records reveals them, and no noise was added to it",
            "fix the number of steps in advance, or evaluate on public data and set evaluation_is_public",
        )


def _check_machine(args: TrainingArguments) -> None:
    refused = {
        "auto_find_batch_size": "it starts the run anew when memory runs out, which depends on the records drawn",
        "fp16": "its loss scaling depends on the batch and would rescale the noised gradient",
        "tf32": "its products are rounded more coarsely than what a record contributes is bounded for; privacy "
        "tensor_cores uses tensor cores for norms and sums, within a bound",
        "torch_compile": "compiled code hides the operations that have to be clipped per record",
        "use_liger_kernel": "its fused kernels hide the operations that have to be clipped per record",
        "neftune_noise_alpha": "it scales noise by the length that a batch is padded to, which other records decide",
        "deepspeed": "it splits and scales gradients in ways the clipping cannot see",
        "fsdp": "it splits parameters in ways the clipping cannot see",
    }
    if args.include_num_input_tokens_seen != "no":
        _refuse(
            "include_num_input_tokens_seen is set",
            "how many tokens a lot has is private",
            "leave it at 'no'",
        )
    if "lomo" in str(getattr(args.optim, "value", args.optim)):
        _refuse(
            f"optim is {getattr(args.optim, 'value', args.optim)}",
            "it steps each parameter inside the backward, before anything is clipped or noised",
            "use adamw_torch or another optimizer that steps after the backward",
        )
    for name, why in refused.items():
        if getattr(args, name):
            _refuse(f"{name} is set", why, f"leave {name} off; bf16 and activation checkpointing are fine")
    if args.n_gpu > 1:
        _refuse(
            f"{args.n_gpu} devices of one process would share a batch",
            "torch would split each batch among them without saying which record went where",
            "train on one device (CUDA_VISIBLE_DEVICES=0)",
        )
    if args.save_on_each_node and args.world_size > 1:
        _refuse(
            "save_on_each_node is set",
            "a checkpoint holds what rank 0 knows of the run, and all ranks go on from the same one",
            "leave it off, and let output_dir be a folder that all nodes see",
        )


def check_accelerator(accelerator: Any) -> None:
    """Refuse what is in effect and was not asked for in the arguments: a launcher's variables, plugins.

    Raises:
        PrivacyError: fp16, accumulation, compiled or sharded models.
    """
    state = accelerator.state
    parallel = getattr(accelerator, "parallelism_config", None)
    found = {
        "fp16 or fp8 (ACCELERATE_MIXED_PRECISION)": state.mixed_precision in ("fp16", "fp8")
        or getattr(accelerator, "scaler", None) is not None,
        "gradient accumulation": accelerator.gradient_accumulation_steps != 1,
        "a parallelism_config": parallel is not None and parallel.total_size > 1,
        "DeepSpeed": getattr(state, "deepspeed_plugin", None) is not None,
        "FSDP": getattr(state, "fsdp_plugin", None) is not None,
        "Megatron": getattr(state, "megatron_lm_plugin", None) is not None,
        "torch.compile (ACCELERATE_DYNAMO_BACKEND)": str(getattr(state.dynamo_plugin, "backend", "NO"))
        .rpartition(".")[2]
        .upper()
        != "NO",
    }
    for what, in_effect in found.items():
        if in_effect:
            _refuse(
                f"accelerate is set up with {what}",
                "it changes what the clipping sees or what is stepped, whatever the training arguments say",
                "unset the ACCELERATE_ variables, or start with plain python instead of a launcher's configuration",
            )


def check_callbacks(callbacks: Iterable[TrainerCallback | type[TrainerCallback]], privacy: PrivacyArguments) -> None:
    """Refuse stopping by a metric on private records, and reporting to somewhere else.

    Raises:
        PrivacyError: an `EarlyStoppingCallback` without ``evaluation_is_public``; one of transformers' reporting
            callbacks, TensorBoard's apart, or a subclass of one.
    """
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if issubclass(kind, _REMOTE_CALLBACKS):
            _refuse(
                f"{kind.__name__} reports to somewhere else",
                "training losses are computed on private records without noise and must not leave this machine",
                "use report_to='tensorboard' or 'none', and read the figures here",
            )
        if issubclass(kind, EarlyStoppingCallback) and not privacy.evaluation_is_public:
            _refuse(
                f"{kind.__name__} stops by a metric",
                "when a run stops would depend on private records, and no noise was added to it",
                "fix the number of steps in advance, or evaluate on public data and set evaluation_is_public",
            )


def _refuse(what: str, why: str, fix: str) -> None:
    raise PrivacyError(f"{what}; private training cannot use it.", code="hf-option", why=why, fix=fix)
