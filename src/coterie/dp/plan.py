"""What a private run is, in two halves: what bounds its cost, and what cannot change it.

Settings files, `coterie.dp.make_private` and `coterie.hf` build both; `coterie.dp.open_run` is given both, for a
session of one party and for a party of a federation alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import nn

from coterie.config import PrivacySpec
from coterie.dp.accounting.accountant import Mechanism, Sampler, needed_noise
from coterie.dp.accounting.budget import Budget
from coterie.dp.accounting.lots import LotPlan
from coterie.dp.balance import Balance, Balancer
from coterie.dp.clipping import Clipping, policy
from coterie.dp.isolation.exact_engine import Isolation, chosen, computes_in_half, make_engine
from coterie.dp.losses import LossFunction, default_loss
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.noise.pooled import PooledNoise
from coterie.dp.numbers import check_fields
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.memory_choice import Method
from coterie.errors import BudgetError, PrivacyError
from coterie.models.streaming.streamer import WeightSource


@dataclass(frozen=True)
class PrivacyPlan:
    """A run's mechanism, fixed before the first lot: all that bounds what is spent, in public numbers.

    Attributes:
        budget: what the run may spend.
        rounds: releases planned; failed ones count.
        lot_size: expected units in a lot, by which noisy sums are divided.
        clip_norm: C, the bound of one unit's gradient norm.
        clipping: name of a policy, or a policy of `coterie.dp.clipping` with the same clip norm.
        adaptive_quantile: share of records that adaptive clipping keeps unclipped; None for fixed thresholds.
        adaptive_share: the part of the clip norm, in (0, 1), that the released clip indicators take.
        sampler, max_lot: how lots are drawn; None: the limit that `LotPlan.of` chooses.
        records_per_user: most records of one user in a lot, where units are users.
        balance: how experts are kept evenly used; some ways of it are released, too.
        isolation: how records are kept from changing each other's rounding; see `coterie.dp.isolation.exact_engine`.
        half_precision: the model computes in a half-precision format.
        seed: for tests; lots, dropout and noise come from it, and the run is then not private.
        noise_multiplier: sigma; None: calibrated to the budget. Another value is for seeded tests, and for a run that
            goes on with the one it was started with.
        agreed_noise: sigma that several parties agreed on; a budget that needs more is refused.
        pooled: whose noise lies in everything that others see of this run; None: its own alone, whole.
        bands: how the noise of rounds hangs together; None: it is independent.

    Raises:
        BudgetError: a number outside its range.
        PrivacyError: a word that is none of the choices; bands of noise with what breaks them.
    """

    budget: Budget
    rounds: int
    lot_size: int
    clip_norm: float = 1.0
    clipping: str | Clipping = "flat"
    adaptive_quantile: float | None = None
    adaptive_share: float = 0.1
    sampler: Sampler = "poisson"
    max_lot: int | None = None
    records_per_user: int = 16
    balance: Balance = field(default_factory=Balance)
    isolation: Isolation = "fast"
    half_precision: bool = False
    seed: int | None = None
    noise_multiplier: float | None = None
    agreed_noise: float | None = None
    pooled: PooledNoise | None = None
    bands: NoiseBands | None = None

    def __post_init__(self) -> None:
        check_fields(
            self, "rounds", "lot_size", "clip_norm", "adaptive_quantile", "max_lot", "records_per_user", "seed"
        )
        _check_choice("sampler", self.sampler, get_args(Sampler))
        _check_choice("isolation", self.isolation, get_args(Isolation))
        if self.bands is not None:
            self._check_bands()

    def _check_bands(self) -> None:
        """Refuse what the proof for noise in bands does not cover."""
        for what, there, why in (
            ("`sampler: truncated_poisson`", self.sampler != "poisson",
             "each lot has to be drawn by coins from one fixed block of units, and a cut lot keeps units out by who "
             "else was drawn"),
            ("`adaptive_quantile`", self.adaptive_quantile is not None,
             "what a unit adds to a round stands in later rounds, too, whose noise would have another size"),
            ("`aggregation: masked`", self.pooled is not None,
             "a masked sum can be decoded only if all parties took back the same earlier rounds, and one that "
             "restarts has lost its own"),
        ):  # fmt: skip
            if there:
                raise PrivacyError(
                    f"noise in bands (`noise_bands`) excludes {what}.", code="dp-bands", why=why,
                    fix="leave out one of the two",
                )  # fmt: skip

    @classmethod
    def of_settings(
        cls,
        spec: PrivacySpec,
        model: nn.Module,
        rounds: int,
        *,
        lot_size: int | None = None,
        seed: int | None = None,
        against_hosts: bool = False,
        noise_multiplier: float | None = None,
        agreed_noise: float | None = None,
        pooled: PooledNoise | None = None,
        momentum: float = 0.0,
    ) -> PrivacyPlan:
        """What a settings file asks for.

        Args:
            spec: the `privacy` block.
            model: tells whether it computes in half precision.
            rounds: of the run.
            lot_size: where the block names none.
            seed: for tests.
            against_hosts: others choose the weights; see `coterie.dp.isolation.exact_engine.chosen`.
            noise_multiplier: for seeded tests.
            agreed_noise: see the attribute.
            pooled: see the attribute.
            momentum: of the optimizer, for the coefficients of noise in bands.
        """
        if spec.lot_size == "auto":
            raise BudgetError(
                "`lot_size: auto` is still to be chosen.",
                code="dp-lot-auto",
                why="lots and noise follow from a number",
                fix="start from train.yaml with `coterie train`, or write what `coterie plan train.yaml` chooses",
            )
        half = computes_in_half(model)
        return cls(
            Budget(spec.epsilon, spec.delta),
            rounds,
            spec.lot_size or lot_size or 1,
            clip_norm=spec.clip_norm,
            clipping=spec.clipping,
            adaptive_quantile=spec.adaptive_quantile,
            sampler=spec.sampler,
            max_lot=spec.max_lot,
            records_per_user=spec.records_per_user,
            balance=Balance(spec.balance, spec.balance_coefficient, spec.load_share, spec.load_smoothing),
            isolation=chosen(spec.isolation, half, against_hosts),
            half_precision=half,
            seed=seed,
            noise_multiplier=noise_multiplier,
            agreed_noise=agreed_noise,
            pooled=pooled,
            bands=NoiseBands.of(spec.noise_bands, rounds, momentum),
        )

    def lots(self, units: int) -> LotPlan:
        """How lots of so many records or users are drawn.

        Raises:
            BudgetError: lots larger than the data, or truncated below their own size.
        """
        return LotPlan.of(
            units, self.lot_size, self.sampler, self.max_lot, 1 if self.bands is None else self.bands.count
        )

    def own_noise(self, mechanism: Mechanism, parties: int = 0) -> float:
        """The noise multiplier of what this run itself adds, where others' noise lies in its sums, too.

        Args:
            mechanism: of a round.
            parties: whose noise that is, this run's included; 0: of all that were agreed on.
        """
        if self.pooled is None:
            return mechanism.noise_multiplier
        return mechanism.noise_multiplier * self.pooled.among(parties or self.pooled.parties).share

    def mechanism(self, lots: LotPlan) -> Mechanism:
        """What the accountant composes for one round, with the noise that the budget needs.

        Raises:
            BudgetError: no noise reaches the budget.

        Cost: see `coterie.dp.accounting.accountant.noise_multiplier`.
        """
        if self.noise_multiplier is not None:
            return lots.mechanism(self.noise_multiplier)
        needed = needed_noise(self.budget, lots.mechanism(1.0), self.rounds)
        if self.agreed_noise is None:
            return lots.mechanism(needed)
        if needed > self.agreed_noise:
            raise BudgetError(
                f"this budget needs a noise multiplier of {needed:.6g}; {self.agreed_noise:g} was agreed.",
                code="dp-noise-below-needed",
                where="set-up; nothing has left this party",
                why="where pushes are masked all parties add the same noise, on one grid",
                fix=f"agree on `noise_multiplier: {_rounded_up(needed)}` in federation.yaml and sign again, or "
                "ask for a larger budget or a smaller lot",
            )
        return lots.mechanism(self.agreed_noise)

    def policy(self) -> Clipping:
        """How norms become factors.

        Raises:
            PrivacyError: a policy with another clip norm.
        """
        clipper = policy(self.clipping, self.clip_norm) if isinstance(self.clipping, str) else self.clipping
        if clipper.clip_norm != self.clip_norm:
            raise PrivacyError(
                f"the clipping policy has clip norm {clipper.clip_norm}, the session {self.clip_norm}.",
                code="dp-clip-norm",
                why="noise is calibrated to the clip norm",
                fix="give both the same number",
            )
        return clipper

    def balancer(self, model: nn.Module, loss_fn: LossFunction | None = None) -> Balancer | None:
        """What adds the balance term to a model's loss; None where nothing is balanced."""
        return None if self.balance.mode == "off" else Balancer(self.balance, model, loss_fn or default_loss)

    def check_secrecy(self) -> None:
        """Hold a new run to noise that fits its budget.

        Raises:
            BudgetError: a noise multiplier of one's own in a run that is private.
        """
        if self.noise_multiplier is not None and self.seed is None:
            raise BudgetError(
                "a noise multiplier of one's own is for seeded tests.",
                code="dp-sigma",
                fix="leave it out: the budget decides the noise; with a `seed`, for a test, it may be given",
            )


@dataclass(frozen=True)
class ComputeOptions:
    """How a run computes: nothing here changes a result beyond rounding, or what is promised.

    Attributes:
        method: how the engine computes clipped sums. ``isolation: exact`` has one way only.
        physical_batch: records computed at once; one with ``isolation: exact``.
        accumulate_on: device of the sums; None: each parameter's own.
        self_check: compare the engine with one record at a time before training; the statement says where not.
        tensor_cores: norms and sums may be taken on tensor cores; see `coterie.dp.per_sample.products`.
    """

    method: Method = "auto"
    physical_batch: int = 16
    accumulate_on: torch.device | None = None
    self_check: bool = True
    tensor_cores: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "physical_batch")
        _check_choice("method", self.method, get_args(Method))

    @classmethod
    def of_settings(cls, spec: PrivacySpec, accumulate_on: torch.device | None = None) -> ComputeOptions:
        """What a settings file asks for."""
        return cls(spec.method, spec.physical_batch, accumulate_on, tensor_cores=spec.tensor_cores)

    def repeatable(self, seed: int | None) -> ComputeOptions:
        """The automatic choice of method depends on free memory; a seeded run has to repeat to the last bit."""
        fixed = seed is not None and self.method == "auto"
        return replace(self, method="book_keeping") if fixed else self

    def engine(
        self,
        plan: PrivacyPlan,
        model: nn.Module,
        loss_fn: LossFunction | None,
        expert_weights: WeightSource | None = None,
        expert_shapes: dict[str, torch.Size] | None = None,
    ) -> Engine:
        """The engine that computes what a plan bounds.

        Args:
            plan: clipping and isolation.
            model: see `Engine`.
            loss_fn: with the balance term, if there is one; default: `losses.default_loss`.
            expert_weights: of a streamed model; see `Engine`.
            expert_shapes: see `Engine`.
        """
        return make_engine(
            plan.isolation, model, loss_fn, plan.policy(), self.method, expert_weights, expert_shapes,
            self.accumulate_on, tensor_cores=self.tensor_cores,
        )  # fmt: skip


def _rounded_up(needed: float) -> float:
    return math.ceil(needed * 1000) / 1000


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PrivacyError(
            f"`{name}` is {value!r}, it must be one of {', '.join(choices)}.",
            code="dp-choice",
            why="a word that means nothing would leave the default in place, whatever was meant",
            fix=f"choose one of {', '.join(choices)}",
        )
