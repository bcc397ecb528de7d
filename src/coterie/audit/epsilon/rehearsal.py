"""Rounds of a run's own settings that are never applied, spooled, counted or sent.

`coterie.dp.open_run.OpenRun` computes them, as in the run itself: the same lots, engine, clipping and noise. What it
would release stays in memory; the lot and the sums before the noise, which no run keeps, are noted beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from coterie.dp.accounting.ledger import Ledger
from coterie.dp.accounting.lots import Lot
from coterie.dp.accounting.releases import Pending, Releases
from coterie.dp.accounting.spool import Durable, Release, Spool
from coterie.dp.lot_sums import LotSums
from coterie.dp.noise.past_noise import PastNoise
from coterie.dp.noise.randomness import random_source
from coterie.dp.open_run import OpenRun
from coterie.dp.per_sample.engine import Engine
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.dp.session import PrivateSession
from coterie.dp.shared_releases import SharedReleases
from coterie.models import seam
from coterie.ranks.ranks import Alone


@dataclass(frozen=True)
class Round:
    """One round as only its owner could know it.

    Attributes:
        sums: float32 by name, before the noise.
        noised: float32 by name, what would leave, times what a session divides it by.
    """

    sums: Mapping[str, Tensor]
    noised: Mapping[str, Tensor]

    def noise(self) -> dict[str, Tensor]:
        """What was added."""
        return {name: self.noised[name] - value for name, value in self.sums.items()}


class Rehearsal:
    """A run in memory.

    Args:
        model: left as it was.
        data: what lots are drawn from.
        plan: with a seed for tests; else randomness is the operating system's.
        options: how to compute.

    Attributes:
        opened: the run.
        engine: its engine.
    """

    def __init__(self, model: nn.Module, data: PrivateData, plan: PrivacyPlan, options: ComputeOptions) -> None:
        self.model = model
        self.data = data
        lots = plan.lots(data.units.count)
        mechanism = plan.mechanism(lots)
        if seam.expert_layers(model):
            seam.select(model)
        balancer = plan.balancer(model)
        self.engine: Engine = options.engine(plan, model, balancer)
        self.engine.compared = True  # before a run its set-up compares it, on records made for that
        source = random_source(plan.seed)
        ranks = Alone()
        self._sums = _Noted(
            model, data, self.engine, balancer, plan, options, plan.own_noise(mechanism), source, ranks
        )
        self._releases = _Kept()
        self.opened = OpenRun(
            "rehearsal", plan, options, data, lots, mechanism, ranks, SharedReleases(ranks, self._releases),
            self._sums, source, "", (), None if plan.bands is None else PastNoise(plan.bands),
        )  # fmt: skip

    @property
    def balance_bound(self) -> float:
        """Largest contribution of one unit to the released loads; 0 where none are."""
        balancer = self._sums.balancer
        return balancer.load_bound if balancer is not None and balancer.balance.releases_loads else 0.0

    @property
    def balance_values(self) -> int:
        """How many loads are released."""
        return sum(self._sums.balancer.sizes) if self._sums.balancer is not None and self.balance_bound else 0

    def draw(self, number: int) -> Lot:
        """The lot of a round, from 1: each number is another draw."""
        begun = self.opened.begin(number, {})
        assert isinstance(begun, Pending)
        return begun.lot

    def round(self, number: int, lot: Lot) -> Round:
        """Compute and noise a lot, as `OpenRun.publish` does for a session."""
        divisor = float(self.opened.plan.lot_size)
        noised, _ = self.opened.publish(Pending(number, 0, {}, lot), divisor)
        return Round(self._sums.noted, {name: value * divisor for name, value in noised.items()})

    def sums(self, number: int, lot: Lot) -> Mapping[str, Tensor]:
        """Clipped sums of a lot, float32 by name; no noise is drawn."""
        self._sums.compute(lot, f"{number}|0")
        return self._sums.noted

    def session(self, optimizer: torch.optim.Optimizer) -> PrivateSession:
        """A session of one party, over this run."""
        return PrivateSession(self.model, optimizer, self.opened)

    @property
    def released(self) -> Mapping[str, Tensor]:
        """What the last round would have released."""
        return self._releases.noised


class _Noted(LotSums):
    """Keeps a copy of the last sums."""

    noted: Mapping[str, Tensor] = {}

    def compute(self, lot: Lot, name: str) -> dict[str, Tensor]:
        sums = super().compute(lot, name)
        steps = self.noise(sums) if any(value.dtype == torch.int64 for value in sums.values()) else None
        self.noted = {
            key: (value.detach().cpu().double() * (1.0 if steps is None else steps.step(key))).float()
            for key, value in sums.items()
        }
        return sums


class _Kept(Releases):
    """Gives every round a fresh lot, and keeps its result in memory for as long as nobody asks for the next."""

    def __init__(self) -> None:
        self.noised: Mapping[str, Tensor] = {}
        self.planned = 1 << 62
        self._used = 0
        self.ledger = cast(Ledger, _Nowhere())
        self.run = "rehearsal"
        self.spool = cast(Spool, _NoSpool())

    @property
    def used(self) -> int:
        """As in a run none of whose rounds was burned."""
        return self._used

    def begin(self, round_number: int, pins: Mapping[str, str], draw: Callable[[int], Lot]) -> Pending | Release:
        self._used = round_number - 1
        return Pending(round_number, 0, dict(pins), draw(0))

    def spooled(self, pending: Pending) -> Release | None:
        self._used = pending.round - 1
        return None

    def published(self, round_number: int) -> Release | None:
        return None

    def publish(
        self,
        pending: Pending,
        noised: Mapping[str, Tensor],
        shards: Sequence[str] = (),
        durable: Durable = "first",
    ) -> Release:
        self.noised = {name: value.clone() for name, value in noised.items()}
        return Release(pending.round, pending.draw, "", pending.pins, Path())


class _NoSpool:
    """Holds nothing."""

    folder = Path()

    def releases(self) -> list[Release]:
        return []

    def nbytes(self) -> int:
        return 0

    def drop_releases(self, up_to_round: int, world: int = 1) -> None:
        pass


class _Nowhere:
    """Stands where a run has its ledger: nothing of a rehearsal is counted."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"a rehearsal has no ledger, and was asked for `{name}`")
