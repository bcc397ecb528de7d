"""From a lot to the sums that are released: physical batches, clipping, and the statistics released beside them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from coterie.dp.balance import Balancer
from coterie.dp.budget import Budget
from coterie.dp.clipping import Clipping, quantile_update
from coterie.dp.dataset import check_length, read_record
from coterie.dp.engine import Diagnostics
from coterie.dp.isolation import Isolation
from coterie.dp.losses import IGNORED
from coterie.dp.lots import Lot, Units
from coterie.dp.mechanism import LOAD, WITHIN, Part, RoundNoise
from coterie.dp.numbers import check_fields
from coterie.dp.randomness import RandomSource
from coterie.dp.refusals import check_rows, value_changed
from coterie.dp.watched import Watched
from coterie.errors import CheckpointError, PrivacyError

Collate = Callable[[list[Any]], Mapping[str, Any]]


class SumEngine(Protocol):
    """What a lot needs of an engine; `coterie.dp.engine.Engine` is the one for models in memory."""

    thresholds: Tensor

    @property
    def groups(self) -> list[str]: ...

    def group_of(self, name: str) -> str: ...

    @property
    def eta(self) -> float: ...

    @property
    def clipping(self) -> Clipping: ...

    @property
    def sensitivity(self) -> float: ...

    def accumulate(self, batch: Mapping[str, Any]) -> Diagnostics: ...

    def accumulate_user(self, batches: Any) -> Diagnostics: ...

    def take(self) -> dict[str, Tensor]: ...


@runtime_checkable
class OnGrid(Protocol):
    """A `SumEngine` that sums integers, which `isolation: exact` needs."""

    def use_grid(self, step_of: Callable[[str], float]) -> None: ...


@dataclass(frozen=True)
class Settings:
    """A session's public numbers, fixed in advance and kept with its checkpoints.

    Attributes:
        budget: what the run may spend.
        noise_multiplier: sigma.
        clip_norm: C.
        rounds: releases planned.
        physical_batch: records computed at once.
        adaptive_quantile: share of records that adaptive clipping keeps unclipped; None for fixed thresholds.
        adaptive_share: the part of the clip norm, in (0, 1), that the released clip indicators take.
        user_column: left out of what the model sees.
        seed: for tests; None in private runs.
        isolation: how records are kept from changing each other's rounding; see `coterie.dp.isolation`.
        half_precision: the model computes in a half-precision format.
    """

    budget: Budget
    noise_multiplier: float
    clip_norm: float
    rounds: int
    physical_batch: int
    adaptive_quantile: float | None = None
    adaptive_share: float = 0.1
    user_column: str | None = None
    seed: int | None = None
    isolation: Isolation = "fast"
    half_precision: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "clip_norm", "rounds", "physical_batch", "adaptive_quantile", "seed")


@dataclass(frozen=True)
class RoundFigures:
    """What a round looked like. For the owner's eyes: NOT private, and never to leave the party.

    Attributes:
        round: its number.
        lot_size: records drawn.
        loss: mean loss of the records that were finite; NaN where there is none, see `nothing_learnt`.
        clipped: share of units whose gradient was clipped.
        masked: records that were not finite and contributed zero.
    """

    round: int
    lot_size: int
    loss: float
    clipped: float
    masked: int

    @property
    def nothing_learnt(self) -> str | None:
        """Why the round's gradient was noise alone, for the owner's eyes; None where it was not."""
        if self.lot_size == 0:
            return "the lot was empty"
        if math.isnan(self.loss):
            return f"none of the lot's {self.lot_size} records gave a finite loss and gradient"
        return None


class LotSums:
    """Computes what a round releases, before the noise, and how much noise that needs.

    Args:
        model: trained parameters are those that require a gradient.
        dataset: records by index.
        collate: list of items to a batch of tensors, one row a record.
        engine: adds up clipped gradients.
        balancer: None without balance.
        units: which records belong together.
        settings: public numbers.
        source: of dropout's randomness.

    Attributes:
        last: figures of the last lot, owner-only; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        collate: Collate,
        engine: SumEngine,
        balancer: Balancer | None,
        units: Units,
        settings: Settings,
        source: RandomSource,
    ) -> None:
        self.engine = engine
        self.balancer = balancer
        self.last: RoundFigures | None = None
        self._model = model
        self._dataset = dataset
        self._collate = collate
        self._units = units
        self._settings = settings
        self._source = source
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._exact = settings.isolation == "exact"
        self._on_grid: RoundNoise | None = None

    def compute(self, lot: Lot, name: str) -> dict[str, Tensor]:
        """Clipped sums of a lot, a tensor for every trained parameter, and the extra parts of the release.

        With `isolation: exact` all of them are int64, in steps of the grid of `noise`.

        What the model holds (see `Watched`) is compared before and after, and put back where a record changed it.

        Args:
            lot: may be empty; the model is then not run.
            name: of this draw; names a seeded source's streams.

        Raises:
            DataError: the dataset has another number of records than the run was set up with.
            PrivacyError: the collator packs records, or the engine leaves out a parameter.
            NoRuleError: the lot changed a parameter, a buffer or another tensor of the model.
        """
        check_length(self._dataset, self._units.records)
        self._model.train()
        before = Watched(self._model, sampled=True)
        try:
            with self._secret_torch_randomness(name) as key:
                return self._compute(lot, key)
        finally:
            changed = before.changed()
            if changed:
                self._put_back(before, changed[0])

    def _put_back(self, before: Watched, name: str) -> None:
        lost = before.restore()
        error = value_changed(self._model, name)
        if lost:
            error.add_note(f"`{lost[0]}` could not be put back: load the model anew, and do not share this one.")
        self.engine.take()
        raise error

    def _compute(self, lot: Lot, key: int) -> dict[str, Tensor]:
        self.engine.take()  # what an interrupted step left
        if self._exact:
            self._on_grid = self._round_noise({})
            assert isinstance(self.engine, OnGrid)
            self.engine.use_grid(self._on_grid.step)
        losses: list[float] = []
        within: list[Tensor] = []
        masked = clipped = 0
        loads: list[Tensor] = []
        for figures in self._accumulate(lot, loads, key):
            usable = ~figures.masked
            losses += figures.losses[usable].tolist()
            within.append(torch.where(usable, figures.within.double() - 0.5, 0.0).T)
            clipped += int((usable & ~figures.within.all(0)).sum())
            masked += int(figures.masked.sum())
        sums = self.engine.take()
        if self.balancer is not None and self.balancer.balance.releases_loads:
            sums[LOAD] = self._total(LOAD, self._unit_loads(self.balancer, loads, torch.from_numpy(lot.units)))
        if self._settings.adaptive_quantile is not None:
            sums[WITHIN] = self._total(WITHIN, torch.cat([torch.zeros(0, len(self.engine.groups)), *within]))
        missing = self._trained.keys() - sums.keys()
        if missing:
            raise PrivacyError(
                f"the engine gave no sum for `{min(missing)}`.",
                code="dp-no-sum",
                why="every trainable parameter gets noise every round, also one that no record used",
                fix="freeze the parameter, or report this with the model's family",
            )
        mean = math.fsum(losses) / len(losses) if losses else math.nan
        self.last = RoundFigures(lot.round, len(lot), mean, clipped / max(len(losses), 1), masked)
        return sums

    def _unit_loads(self, balancer: Balancer, loads: list[Tensor], units_R: Tensor) -> Tensor:
        """[U, S] loads of the lot's units; with `isolation: exact` each unit's are computed without the others."""
        loads_RS = torch.cat([torch.zeros(0, sum(balancer.sizes), dtype=torch.float64), *loads])
        if not self._exact:
            return balancer.unit_loads(loads_RS, units_R)
        each = [loads_RS[units_R == unit] for unit in units_R.unique()]
        alone = [balancer.unit_loads(own, torch.zeros(own.shape[0], dtype=torch.int64)) for own in each]
        return torch.cat([balancer.unit_loads(loads_RS[:0], units_R[:0]), *alone])

    def _total(self, name: str, units_UN: Tensor) -> Tensor:
        """[N] the sum over units of something that is released beside the gradients, rounded as these are."""
        if self._on_grid is None:
            return units_UN.double().sum(0)
        return (units_UN.double() / self._on_grid.step(name)).to(torch.int64).sum(0)

    def _accumulate(self, lot: Lot, loads: list[Tensor], key: int) -> Iterator[Diagnostics]:
        """Run the physical batches of a lot, one unit at a time where units are users."""
        size = 1 if self._exact else self._settings.physical_batch
        if self._units.starts is None:
            for records, _ in lot.physical_batches(size):
                self._own_randomness(key, records)
                figures = self.engine.accumulate(self._batch(records))
                loads += self._loads(~figures.masked)
                yield figures
            return
        for unit in range(lot.num_units):
            own = lot.records[lot.units == unit]
            self._own_randomness(key, own)
            yield self.engine.accumulate_user(self._user_batches(own, size, loads))

    def _own_randomness(self, key: int, records: np.ndarray) -> None:
        """With `isolation: exact`, let torch draw next what this unit draws in whatever company."""
        if self._exact:
            digest = hashlib.sha256(f"{key}|{records.min()}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "little"))

    def _user_batches(self, records: np.ndarray, size: int, loads: list[Tensor]) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(records), size):
            yield self._batch(records[start : start + size])
            loads += self._loads(None)

    def _loads(self, keep: Tensor | None) -> list[Tensor]:
        if self.balancer is None or self.balancer.latest is None:
            return []
        latest = self.balancer.latest
        if keep is None:
            return [latest]
        # In constant-work mode the model saw rows behind the records that only filled up the batch.
        return [torch.where(keep[:, None], latest[: keep.shape[0]], 0.0)]

    def _batch(self, records: np.ndarray) -> dict[str, Any]:
        items = [read_record(self._dataset, int(i)) for i in records]
        column = self._settings.user_column
        if column is not None:
            items = [{name: value for name, value in item.items() if name != column} for item in items]
        device = next(iter(self._trained.values())).device
        collated = self._collate(items)
        check_rows(collated, len(items))
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in collated.items()}
        return {name: with_a_token(name, value) for name, value in batch.items()}

    def noise(self, sums: Mapping[str, Tensor]) -> RoundNoise:
        """The noise of the lot that was computed last: one Gaussian over gradient groups, loads and indicators."""
        if self._on_grid is not None:
            return self._on_grid
        return self._round_noise({name: tensor.numel() for name, tensor in sums.items()})

    def _round_noise(self, rounded: Mapping[str, int]) -> RoundNoise:
        """This round's noise, where so many values of each sum are rounded to the grid after adding up."""
        extra: dict[str, Part] = {}
        if self.balancer is not None and self.balancer.balance.releases_loads:
            share = self.balancer.balance.load_share**2
            extra[LOAD] = Part(self.balancer.load_bound * (1 + 1e-6), share, rounded.get(LOAD, 0))
        if self._settings.adaptive_quantile is not None:
            bound = 0.5 * math.sqrt(len(self.engine.groups))
            extra[WITHIN] = Part(bound, self._settings.adaptive_share**2, rounded.get(WITHIN, 0))
        rest = 1 - sum(part.share for part in extra.values())
        gradients = {name: count for name, count in rounded.items() if name not in extra}
        sigma = self._settings.noise_multiplier
        if self._settings.adaptive_quantile is None:
            parts = {"gradients": Part(self.engine.sensitivity, rest, sum(gradients.values()))}
            return RoundNoise.of(sigma, parts | extra, lambda name: name if name in extra else "gradients")
        # Adaptive thresholds differ between groups and rounds: each group's noise follows its own threshold.
        group_of = self.engine.group_of
        values = dict.fromkeys(self.engine.groups, 0)
        for name, count in gradients.items():
            values[group_of(name)] += count
        bounds = dict(zip(self.engine.groups, self.engine.thresholds.tolist(), strict=True))
        parts = {
            group: Part(bounds[group] * (1 + self.engine.eta), rest / len(values), count)
            for group, count in values.items()
        }
        return RoundNoise.of(sigma, parts | extra, lambda name: name if name in extra else group_of(name))

    def take_released(self, means: Mapping[str, Tensor]) -> None:
        """Post-processing of the extra parts of a release: routing loads and clip thresholds of later rounds.

        Args:
            means: a release's tensors, over the expected units in a lot.
        """
        if self.balancer is not None and LOAD in means:
            self.balancer.take_released(means[LOAD])
        if WITHIN in means and self._settings.adaptive_quantile is not None:
            fraction = (means[WITHIN].double() + 0.5).clamp(0, 1)
            self.engine.thresholds = quantile_update(
                self.engine.thresholds, fraction, self._settings.adaptive_quantile
            )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: made from releases alone."""
        return {"thresholds": self.engine.thresholds} | (self.balancer.state() if self.balancer else {})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`.

        Raises:
            CheckpointError: its thresholds are of other gradient groups, or moved although they are fixed.
        """
        saved, own = state["thresholds"], self.engine.thresholds
        fits = saved.shape == own.shape and bool((torch.isfinite(saved) & (saved > 0)).all())
        if not fits or (self._settings.adaptive_quantile is None and not torch.allclose(saved, own, 1e-12, 0.0)):
            raise CheckpointError(
                f"the checkpoint has clip norms for {saved.numel()} gradient groups that are not those of the "
                f"{own.numel()} groups here.",
                code="dp-resume-clipping",
                why="noise is calibrated to the clip norms, so a record would contribute more than it covers",
                fix="resume with the clipping policy that the run was started with",
            )
        self.engine.thresholds = saved
        if self.balancer is not None:
            self.balancer.restore(state)

    @contextmanager
    def _secret_torch_randomness(self, name: str) -> Iterator[int]:
        """Dropout, and whatever else draws from torch, from a key that is not kept; the caller's state comes back."""
        key = self._source.stream(f"dropout|{name}").integer(56)
        devices = {p.device for p in self._trained.values() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(key)
            yield key


def with_a_token(name: str, value: Any) -> Any:
    """Records without any token, alone in their batch, as beside longer ones: padding. Models fail on no tokens."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] > 0:
        return value
    return value.new_full((value.shape[0], 1), IGNORED if name == "labels" else 0)
