"""From a lot to the sums that are released: physical batches, clipping, and the statistics released beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.accounting.lots import Lot
from coterie.dp.balance import Balancer
from coterie.dp.checks.watched import Watched
from coterie.dp.lot_batches import LotBatches
from coterie.dp.lot_figures import LotFigures, RoundFigures, joined
from coterie.dp.noise.joint_noise import LOAD, WITHIN, RoundNoise
from coterie.dp.noise.lot_noise import LotNoise
from coterie.dp.noise.randomness import RandomSource
from coterie.dp.ownership import Ownership
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.dp.refusals import value_changed
from coterie.dp.released_state import ReleasedState
from coterie.dp.sum_engine import ConstantShape, OnGrid, SumEngine
from coterie.errors import PrivacyError
from coterie.models.spread.holdings import Holdings
from coterie.ranks.ranks import Ranks


class LotSums:
    """Computes what a round releases, before the noise, and how much noise that needs.

    Args:
        model: trained parameters are those that require a gradient.
        data: what lots are drawn from.
        engine: adds up clipped gradients.
        balancer: None without balance.
        plan: what bounds a unit's contribution.
        options: how to compute.
        noise_multiplier: see the attribute.
        source: of dropout's randomness.
        ranks: share a lot's units.
        shape: fills every batch up to one shape; None: batches are as the collator makes them.

    Attributes:
        batches: run the physical batches of a lot.
        engine, balancer: as given.
        holdings: which of the released values are at this rank.
        ownership: which of them it noises and steps.
        noise_multiplier: of this party's own noise in the round that is computed: as accounted, or its share of that.
        released: what later rounds know from earlier releases.
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
        self.engine = engine
        self.balancer = balancer
        self.last: RoundFigures | None = None
        self.holdings = Holdings(model)
        self._model = model
        self._plan = plan
        self._source = source
        self._ranks = ranks
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ownership = Ownership(ranks, self.holdings, self._trained)
        self._grid = _grid(engine, plan)
        at_once = options.physical_batch if self._grid is None else 1
        self.batches = LotBatches(model, data, engine, balancer, at_once, self._grid is not None, shape)
        self.released = ReleasedState(engine, balancer, plan.adaptive_quantile)
        self.noise_multiplier = noise_multiplier
        self._noise = LotNoise(plan, engine, balancer)
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
            self.batches.data.check_length()
            self._model.train()
            with _unchanged(self._model), self._secret_torch_randomness(name) as key:
                shares = [lot.share(rank, self._ranks.world) for rank in range(self._ranks.world)]
                self.engine.begin(name)  # without what an interrupted step left
                found, figures = self._compute(shares[self._ranks.rank], self._batches_of(shares), key)
            sums.update(found)
            return figures.to_json()

        self.last = joined(lot, self._ranks.together(f"lot {name}", own))
        return sums

    def noise(self, sums: Mapping[str, Tensor]) -> RoundNoise:
        """The noise of the lot that was computed last: one Gaussian over gradient groups, loads and indicators."""
        if self._on_grid is not None:
            return self._on_grid
        rounded = {name: self.holdings.size(name, tensor) for name, tensor in sums.items()}
        return self._noise.of(self.noise_multiplier, rounded)

    def fixed_noise(self, noise_multiplier: float | None = None) -> RoundNoise:
        """The noise of a round as thresholds are now, known before its lot; where none moves, of every round.

        Args:
            noise_multiplier: of this party's own noise in that round; None: as now.
        """
        multiplier = self.noise_multiplier if noise_multiplier is None else noise_multiplier
        if self._grid is not None and self._plan.bands is None:
            return self._noise.of(multiplier, {})
        rounded = {name: self.holdings.size(name, param) for name, param in self._trained.items()}
        if self.balancer is not None and self.balancer.balance.releases_loads:
            rounded[LOAD] = sum(self.balancer.sizes)
        return self._noise.of(multiplier, rounded)

    def _batches_of(self, shares: Sequence[Lot]) -> int:
        """How many physical batches this rank runs: where experts are spread, as many as every other."""
        return max(self.batches.count(share) for share in shares) if self.holdings.spread else 0

    def _compute(self, lot: Lot, batches: int, key: int) -> tuple[dict[str, Tensor], LotFigures]:
        if self._grid is not None:
            self._on_grid = self.fixed_noise()
            self._grid.use_grid(self._on_grid.step)
        figures, loads = LotFigures(), list[Tensor]()
        device = next(iter(self._trained.values())).device
        for diagnostics in self.batches.run(lot, device, key, loads, batches):
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
        if self._grid is None:
            return balancer.unit_loads(loads_RS, units_R)
        each = [loads_RS[units_R == unit] for unit in torch.unique(units_R)]
        alone = [balancer.unit_loads(own, torch.zeros(own.shape[0], dtype=torch.int64)) for own in each]
        return torch.cat([balancer.unit_loads(loads_RS[:0], units_R[:0]), *alone])

    def _total(self, name: str, units_UN: Tensor) -> Tensor:
        """[N] the sum over units of something that is released beside the gradients, rounded as these are."""
        if self._on_grid is None:
            return units_UN.double().sum(0)
        return (units_UN.double() / self._on_grid.step(name)).to(torch.int64).sum(0)

    def shaped(self, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A release's tensors, by the names that they have in files or of this rank's parameters, in the shapes of
        parameters or their parts; several ranks put them on disk as plain values."""
        return {name: value.view(self._shape(name, value)) for name, value in released.items()}

    def _shape(self, name: str, value: Tensor) -> torch.Size:
        own = self._trained.get(name)
        if own is not None and own.numel() == value.numel():
            return own.shape
        parameter, held = self.holdings.part_of(name)
        return self.holdings.cuts[parameter].shape(held) if held else value.shape

    @contextmanager
    def _secret_torch_randomness(self, name: str) -> Iterator[int]:
        """Dropout, and whatever else draws from torch, from a key that is not kept; the caller's state comes back."""
        key = self._source.stream(f"dropout|{name}").integer(56)
        devices = {p.device for p in self._trained.values() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(key + self._ranks.rank)  # a seeded source has one key for all ranks
            yield key


def _grid(engine: SumEngine, plan: PrivacyPlan) -> OnGrid | None:
    """What sums integers, where the plan says so.

    Raises:
        PrivacyError: the engine does the other.
    """
    if (engine.on_grid is not None) is not (plan.isolation == "exact"):
        raise PrivacyError(
            f"the plan says `isolation: {plan.isolation}`, and the engine that was given does not do that.",
            code="dp-isolation-engine",
            why="the statement would promise what is not computed",
            fix="pass dp.ExactEngine for exact and dp.Engine for fast",
        )
    return engine.on_grid


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
