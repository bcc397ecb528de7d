"""How long and how fast to train; the file of `coterie train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from coterie.config.base import LocalPath, Spec
from coterie.config.data import DataSpec
from coterie.config.model import LoraSpec, ModelSpec
from coterie.config.numbers import Count, NotNegative, Positive, Smoothing
from coterie.config.privacy import PreconditionerSpec, PrivacyRules, PrivacySpec, undeclared_artefacts
from coterie.config.report import ReportSpec
from coterie.ranks.world import auto_devices

Device = Literal["auto", "cpu", "cuda"]
Devices = Count | Literal["auto"]


PRIVATE_BETAS = (0.5, 0.99)
"""Long averages of noisy gradients lag behind, and hold hardly less noise over a run: docs/decisions/0077."""


class OptimSpec(Spec):
    """The learning rate is a function of the round alone, so all parties agree on it without talking."""

    later_keys = frozenset({"kind", "momentum", "noise_floor"})

    kind: Literal["adamw", "adamw_corrected", "sgd"] = Field(
        default="adamw",
        description="`adamw_corrected`, for private training of one party: what the privacy noise adds to AdamW's "
        "second moment is taken off (DP-AdamBC); needs a smaller `lr`. `sgd` adds up gradients with `momentum`; it "
        "needs a much larger one.",
    )
    noise_floor: Positive = Field(
        default=1.0,
        description="Of `adamw_corrected`: least second moment that is divided by, over the variance of the noise.",
    )
    momentum: Smoothing = Field(
        default=0.9, description="Of `sgd`: share of the last step that is added to the next."
    )
    lr: float = Field(default=3e-4, gt=0, description="Highest learning rate.")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95),
        description="Decay of the two running averages, each in [0, 1). With a budget, where nothing is given: "
        "`[0.5, 0.99]`, which learns more from noisy gradients.",
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay, applied to every parameter.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="Course of the rate after warm-up; `linear` falls in a straight line to zero."
    )
    warmup_rounds: int = Field(default=0, ge=0, description="Rounds over which the rate rises linearly from zero.")
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="Where `cosine` ends, as a share of `lr`.")

    def under_a_budget(self) -> OptimSpec:
        """With the `betas` of private training, unless some are given."""
        if "betas" in self.model_fields_set or self.kind == "sgd":
            return self
        return self.model_copy(update={"betas": PRIVATE_BETAS})

    @property
    def added_momentum(self) -> float:
        """Share of the last step that is added to the next, where steps are sums of gradients; else 0."""
        return self.momentum if self.kind == "sgd" else 0.0

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimSpec:
        if self.kind != "adamw_corrected" and self.noise_floor != OptimSpec.model_fields["noise_floor"].default:
            raise ValueError("`noise_floor` is for `kind: adamw_corrected`")
        if self.kind != "sgd" and self.momentum != OptimSpec.model_fields["momentum"].default:
            raise ValueError("`momentum` is for `kind: sgd`; AdamW has `betas`")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"each of `betas` must be in [0, 1), got {list(self.betas)}")
        return self


def check_adds_up(optim: OptimSpec, privacy: PrivacyRules) -> None:
    """Hold noise in bands to an optimiser that gains by it.

    Raises:
        ValueError: it is not one.
    """
    if privacy.noise_bands > 1 and optim.kind != "sgd":
        raise ValueError(
            f"`privacy.noise_bands` needs `optim.kind: sgd`: `{optim.kind}` divides by the size of single rounds' "
            "gradients, which hold more noise so that their sum holds less"
        )


def check_groups(devices: int, spread_by: str, over: int) -> None:
    """Hold processes to whole groups of those that hold every expert once.

    Raises:
        ValueError: a group would lack some.
    """
    if devices > 1 and devices % over:
        raise ValueError(
            f"`{spread_by}` is {over} and `devices` {devices}: experts are spread over groups of devices; give "
            f"`devices` a multiple of `{spread_by}`, or leave it out"
        )


class TrainSpec(Spec):
    """How much is trained. One round is one optimiser step."""

    rounds: Count = Field(description="Number of optimiser steps; fixed in advance.")
    batch_size: Count = Field(default=32, description="Sequences per round (per party in a federation).")
    micro_batch: int = Field(
        default=8, gt=0, description="Sequences computed at once; the last group may be smaller."
    )
    seed: NotNegative = Field(default=0, description="Starting weights and data order. Never used for privacy noise.")
    eval_every: int = Field(default=50, ge=0, description="Rounds between evaluations; 0: only after the last round.")
    checkpoint_every: int = Field(
        default=100, ge=0, description="Rounds between checkpoints; 0: only after the last round."
    )


class TrainConfig(Spec):
    """train.yaml: one party trains by itself."""

    later_keys = frozenset({"experts_over", "layers_over", "lora", "report_to"})

    model: ModelSpec = Field(description="The model.")
    data: DataSpec = Field(description="The text.")
    optim: OptimSpec = Field(default=OptimSpec(), description="The optimiser.")
    train: TrainSpec = Field(description="Length and batch.")
    privacy: PrivacySpec | None = Field(default=None, description="Differential privacy; absent: trained without.")
    lora: LoraSpec | None = Field(
        default=None,
        description="Train adapters only, of a checkpoint (`model.path` or `model.hub`) and in one process; the run "
        "ends with a peft adapter.",
    )
    run_dir: LocalPath = Field(description="Folder for metrics, checkpoints and the final model.")
    device: Device = Field(default="auto", description="`auto` takes the GPU when there is one.")
    devices: Devices = Field(
        default=1,
        description="Processes that share every round, each with the whole model, or as `experts_over` or "
        "`layers_over` says; on GPUs each with its own; only with `privacy`. `auto`: one for each GPU of the "
        "machine, in whole groups; one where there is none, with `device: cpu`, with `lora`, and without `privacy`.",
    )
    experts_over: Count = Field(
        default=1,
        description="Processes that the experts of every layer are spread over; tokens travel to them. Where "
        "`devices` is a multiple of it, there are several such groups; only with `privacy`.",
    )
    layers_over: Count = Field(
        default=1,
        description="In place of `experts_over`: processes that the experts of every layer are spread over; weights "
        "travel, and each process gathers a layer's before it computes it, and lets go of them after.",
    )
    report_to: ReportSpec | None = Field(
        default=None, description="Trackers that hear the figures that may be public; absent: none."
    )

    @property
    def spread_over(self) -> int:
        """Processes that hold every expert once, together; 1: each holds all of them."""
        return max(self.experts_over, self.layers_over)

    @property
    def spread_by(self) -> str:
        """The setting that says so."""
        return "layers_over" if self.layers_over > 1 else "experts_over"

    @property
    def preconditioner(self) -> PreconditionerSpec | None:
        """`privacy.preconditioner`; None also without `privacy`."""
        return None if self.privacy is None else self.privacy.preconditioner

    @property
    def ranks(self) -> int:
        """Processes that share every round."""
        return max(self.device_count, self.spread_over)

    @property
    def device_count(self) -> int:
        """`devices`, where `auto` counts the GPUs of this machine."""
        if self.devices != "auto":
            return self.devices
        if self.privacy is None or self.lora is not None or self.device == "cpu":
            return 1
        return auto_devices(self.spread_over)

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainConfig:
        if self.optim.kind == "adamw_corrected" and self.privacy is None:
            raise ValueError("`optim.kind: adamw_corrected` takes off privacy noise: add `privacy`, or use `adamw`")
        if self.ranks > 1 and self.privacy is None:
            name = "devices" if self.device_count > 1 else self.spread_by
            raise ValueError(f"`{name}` above 1 is for private training: add `privacy`, or leave it out")
        if self.lora is not None:
            self._check_adapters(self.lora)
        if self.experts_over > 1 and self.layers_over > 1:
            raise ValueError(
                "`experts_over` and `layers_over` are two ways: tokens travel to experts, or weights to tokens; "
                "give one of them"
            )
        if self.devices != "auto":
            check_groups(self.devices, self.spread_by, self.spread_over)
        if self.privacy is not None:
            check_adds_up(self.optim, self.privacy)
            object.__setattr__(self, "optim", self.optim.under_a_budget())
            self._check_preconditioner()
            problems = undeclared_artefacts(self.model, self.data, self.preconditioner)
            if self.data.packing == "documents":
                problems.append("packing `documents` mixes records in a sequence; use `chunks` or `records`")
            if problems:
                raise ValueError("; ".join(problems))
        return self

    def _check_preconditioner(self) -> None:
        if self.preconditioner is None:
            return
        if self.lora is not None:
            raise ValueError(
                "`privacy.preconditioner` is for training all weights: leave it out, or leave out `lora`"
            )
        if self.spread_over > 1:
            raise ValueError(
                f"`privacy.preconditioner` needs whole models: leave it out, or leave out `{self.spread_by}`"
            )

    def _check_adapters(self, lora: LoraSpec) -> None:
        if not (lora.experts or lora.modules):
            raise ValueError("`lora` names nothing that gets an adapter: fill `experts` or `modules`")
        if self.ranks > 1:
            name = "devices" if self.device_count > 1 else self.spread_by
            raise ValueError(
                f"`{name}` above 1 is for training all weights: adapters (`lora`) are trained in one process"
            )
        if self.model.family is not None:
            raise ValueError(
                "`lora` leaves all weights as they are, and those of `model.family` are random: an adapter fits no "
                "others; name a checkpoint with `model.path` or `model.hub`, or leave out `lora`"
            )


def due(done: int, every: int) -> bool:
    """Whether something that happens every so many rounds comes after ``done`` of them; 0: never."""
    return every > 0 and done % every == 0
