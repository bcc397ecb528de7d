"""From a lot to the sums that are released: physical batches, clipping, and the statistics released beside them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coterie.dp.accounting.lots import Lot
from coterie.dp.balance import Balancer
from coterie.dp.checks.watched import Watched
from coterie.dp.clipping import quantile_update
from coterie.dp.noise.joint_noise import LOAD, WITHIN, RoundNoise
from coterie.dp.noise.lot_noise import LotNoise
from coterie.dp.noise.randomness import RandomSource
from coterie.dp.per_sample.gradient_groups import Diagnostics
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.dp.refusals import value_changed
from coterie.dp.sum_engine import ConstantShape, OnGrid, SumEngine
from coterie.errors import CheckpointError, PrivacyError
from coterie.ranks.ranks import Ranks


@dataclass(frozen=True)
class RoundFigures:
    """What a round looked like. For the owner's eyes: NOT private, and never to leave the party.

    Attributes:
        round: its number.
        drawn: records drawn into the lot; not the public `lot_size` that sums are divided by.
        loss: mean loss of the records that were finite; NaN where there is none, see `nothing_learnt`.
        clipped: share of units whose gradient was clipped.
        masked: records that were not finite and contributed zero.
    """

    round: int
    drawn: int
    loss: float
    clipped: float
    masked: int

    @property
    def nothing_learnt(self) -> str | None:
        """Why the round's gradient was noise alone, for the owner's eyes; None where it was not."""
        if self.drawn == 0:
            return "the lot was empty"
        if math.isnan(self.loss):
            return f"none of the lot's {self.drawn} records gave a finite loss and gradient"
        return None


class _Figures:
    """Adds up what the physical batches of one lot looked like."""

    def __init__(self) -> None:
        self.within: list[Tensor] = []
        self._losses: list[float] = []
        self._masked = self._clipped = 0

    def add(self, diagnostics: Diagnostics) -> None:
        usable = ~diagnostics.masked
        self._losses += diagnostics.losses[usable].tolist()
        self.within.append(torch.where(usable, diagnostics.within.double() - 0.5, 0.0).T)
        self._clipped += int((usable & ~diagnostics.within.all(0)).sum())
        self._masked += int(diagnostics.masked.sum())

    def to_json(self) -> dict[str, Any]:
        """What figures of several ranks are made from."""
        count, loss = len(self._losses), math.fsum(self._losses)
        return {"count": count, "loss": loss, "clipped": self._clipped, "masked": self._masked}


def _joined(lot: Lot, ranks: Sequence[Mapping[str, Any]]) -> RoundFigures:
    """The figures of a whole lot, from those of its parts."""
    count, clipped, masked = (sum(each[name] for each in ranks) for name in ("count", "clipped", "masked"))
    mean = math.fsum(each["loss"] for each in ranks) / count if count else math.nan
    return RoundFigures(lot.round, len(lot), mean, clipped / max(count, 1), masked)


class LotSums:
    """Computes what a round releases, before the noise, and how much noise that needs.

    Args:
        model: trained parameters are those that require a gradient.
        data: what lots are drawn from.
        engine: adds up clipped gradients.
        balancer: None without balance.
        plan: what bounds a unit's contribution.
        options: how to compute.
        noise_multiplier: as accounted.
        source: of dropout's randomness.
        ranks: share a lot's units.
        shape: fills every batch up to one shape; None: batches are as the collator makes them.

    Attributes:
        data, engine, balancer: as given.
        last: figures of the last lot, owner-only; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        data: PrivateData,
        engine: SumEngine,
        balancer: Balancer | None,
        plan: PrivacyPlan,
        options: ComputeOptions,
        noise_multiplier: float,
        source: RandomSource,
        ranks: Ranks,
        shape: ConstantShape | None = None,
    ) -> None:
        self.data = data
        self.engine = engine
        self.balancer = balancer
        self.last: RoundFigures | None = None
        self._model = model
        self._plan = plan
        self._source = source
        self._ranks = ranks
        self._shape = shape
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._exact = plan.isolation == "exact"
        self._at_once = 1 if self._exact else options.physical_batch
        self._noise = LotNoise(plan, noise_multiplier, engine, balancer)
        self._on_grid: RoundNoise | None = None

    def compute(self, lot: Lot, name: str) -> dict[str, Tensor]:
        """Clipped sums of this rank's part of a lot, for every trained parameter, and the extra parts of the release.

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
        sums: dict[str, Tensor] = {}

        def own() -> dict[str, Any]:
            self.data.check_length()
            self._model.train()
            with _unchanged(self._model), self._secret_torch_randomness(name) as key:
                found, figures = self._compute(lot.share(self._ranks.rank, self._ranks.world), key)
            sums.update(found)
            return figures.to_json()

        self.last = _joined(lot, self._ranks.together(f"lot {name}", own))
        return sums

    def noise(self, sums: Mapping[str, Tensor]) -> RoundNoise:
        """The noise of the lot that was computed last: one Gaussian over gradient groups, loads and indicators."""
        if self._on_grid is not None:
            return self._on_grid
        return self._noise.of({name: tensor.numel() for name, tensor in sums.items()})

    def _compute(self, lot: Lot, key: int) -> tuple[dict[str, Tensor], _Figures]:
        self.engine.take()  # what an interrupted step left
        if self._exact:
            self._on_grid = self._noise.of({})
            assert isinstance(self.engine, OnGrid)
            self.engine.use_grid(self._on_grid.step)
        figures, loads = _Figures(), list[Tensor]()
        for diagnostics in self._accumulate(lot, loads, key):
            figures.add(diagnostics)
        sums = self.engine.take()
        if self.balancer is not None and self.balancer.balance.releases_loads:
            sums[LOAD] = self._total(LOAD, self._unit_loads(self.balancer, loads, torch.from_numpy(lot.units)))
        if self._plan.adaptive_quantile is not None:
            sums[WITHIN] = self._total(WITHIN, torch.cat([torch.zeros(0, len(self.engine.groups)), *figures.within]))
        missing = self._trained.keys() - sums.keys()
        if missing:
            raise PrivacyError(
                f"the engine gave no sum for `{min(missing)}`.",
                code="dp-no-sum",
                why="every trainable parameter gets noise every round, also one that no record used",
                fix="freeze the parameter, or report this with the model's family",
            )
        return sums, figures

    def _unit_loads(self, balancer: Balancer, loads: list[Tensor], units_R: Tensor) -> Tensor:
        """[U, S] loads of the lot's units; with `isolation: exact` each unit's are computed without the others."""
        loads_RS = torch.cat([torch.zeros(0, sum(balancer.sizes), dtype=torch.float64), *loads])
        if not self._exact:
            return balancer.unit_loads(loads_RS, units_R)
        each = [loads_RS[units_R == unit] for unit in torch.unique(units_R)]
        alone = [balancer.unit_loads(own, torch.zeros(own.shape[0], dtype=torch.int64)) for own in each]
        return torch.cat([balancer.unit_loads(loads_RS[:0], units_R[:0]), *alone])

    def _total(self, name: str, units_UN: Tensor) -> Tensor:
        """[N] the sum over units of something that is released beside the gradients, rounded as these are."""
        if self._on_grid is None:
            return units_UN.double().sum(0)
        return (units_UN.double() / self._on_grid.step(name)).to(torch.int64).sum(0)

    # -- physical batches --------------------------------------------------------------------------------------------

    def _accumulate(self, lot: Lot, loads: list[Tensor], key: int) -> Iterator[Diagnostics]:
        """Run the physical batches of a lot, one unit at a time where units are users."""
        if self.data.units.starts is None:
            for records, _ in lot.physical_batches(self._at_once):
                self._own_randomness(key, records)
                diagnostics = self._batch_sums(self._batch(records), len(records))
                loads += self._loads(~diagnostics.masked)
                yield diagnostics
            return
        for unit in range(lot.num_units):
            own = lot.records[lot.units == unit]
            self._own_randomness(key, own)
            yield self.engine.accumulate_user(self._user_batches(own, loads))

    def _batch_sums(self, batch: dict[str, Any], records: int) -> Diagnostics:
        """Figures of a batch's records, whatever else it was filled up with."""
        if self._shape is None:
            return self.engine.accumulate(batch)
        return self.engine.accumulate(self._shape.fill(batch), counted=records).first(records)

    def _batch(self, records: np.ndarray) -> dict[str, Any]:
        return self.data.batch(records, next(iter(self._trained.values())).device)

    def _own_randomness(self, key: int, records: np.ndarray) -> None:
        """With `isolation: exact`, let torch draw next what this unit draws in whatever company."""
        if self._exact:
            digest = hashlib.sha256(f"{key}|{records.min()}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "little"))

    def _user_batches(self, records: np.ndarray, loads: list[Tensor]) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(records), self._at_once):
            yield self._batch(records[start : start + self._at_once])
            loads += self._loads(None)

    def _loads(self, keep: Tensor | None) -> list[Tensor]:
        if self.balancer is None or self.balancer.latest is None:
            return []
        latest = self.balancer.latest
        if keep is None:
            return [latest]
        # In constant-work mode the model saw rows behind the records that only filled up the batch.
        return [torch.where(keep[:, None], latest[: keep.shape[0]], 0.0)]

    # -- after a release ---------------------------------------------------------------------------------------------

    def take_released(self, means: Mapping[str, Tensor]) -> None:
        """Post-processing of the extra parts of a release: routing loads and clip thresholds of later rounds.

        Args:
            means: a release's tensors, over the expected units in a lot.
        """
        if self.balancer is not None and LOAD in means:
            self.balancer.take_released(means[LOAD])
        if WITHIN in means and self._plan.adaptive_quantile is not None:
            fraction = (means[WITHIN].double() + 0.5).clamp(0, 1)
            self.engine.thresholds = quantile_update(self.engine.thresholds, fraction, self._plan.adaptive_quantile)

    def shaped(self, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A release's tensors in the shapes of the parameters; several ranks put them on disk as plain values."""
        return {
            name: value.view(self._trained[name].shape) if name in self._trained else value
            for name, value in released.items()
        }

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
        if not fits or (self._plan.adaptive_quantile is None and not torch.allclose(saved, own, 1e-12, 0.0)):
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
            torch.manual_seed(key + self._ranks.rank)  # a seeded source has one key for all ranks
            yield key


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what changes inside in a model's values, and refuse it.

    Raises:
        NoRuleError: something changed.
    """
    before = Watched(model, sampled=True)
    try:
        yield
    finally:
        changed = before.changed()
        if changed:
            lost = before.restore()
            error = value_changed(model, changed[0])
            if lost:
                error.add_note(f"`{lost[0]}` could not be put back: load the model anew, and do not share this one.")
            raise error
