"""What exists outside a process that makes releases: its folder, and all that it computed on or sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.ledger import open_ledger
from coterie.dp.accounting.lots import LotPlan, Units, draw_lot
from coterie.dp.accounting.releases import Pending, Releases
from coterie.dp.accounting.spool import Durable, Spool
from coterie.dp.noise.discrete_gaussian import add_noise
from coterie.dp.noise.randomness import SystemRandom

DATASET, RUN, ROUNDS = "d" * 64, "run", 50
UNITS, PLAN = Units.of_records(40), LotPlan.of(40, 20)
PINS = {"weights": "w1"}


@dataclass
class ReleasesWorld:
    """What exists outside the process: its folder, and everything it ever computed on or sent."""

    folder: Path
    durable: Durable = "first"
    computed: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    sent: list[tuple[int, str]] = field(default_factory=list)

    @contextmanager
    def open(self, rounds: int = ROUNDS) -> Iterator[Releases]:
        spool = Spool(self.folder / "spool")
        try:
            ledger = open_ledger(DATASET, self.folder / "ledger")
            ledger.start_run(RUN, Mechanism(1.0, PLAN.rate), rounds)
            yield Releases(ledger, spool, RUN)
        finally:
            spool.close()

    def work(self, number: int, pins: dict[str, str] | None = None) -> None:
        """One round in one life of the process."""
        with self.open() as releases:
            step = releases.begin(number, pins or PINS, lambda _: draw_lot(number, PLAN, UNITS, SystemRandom()))
            if isinstance(step, Pending):
                self.computed.append((number, step.draw, tuple(step.lot.records.tolist())))
                noised = add_noise({"w": torch.zeros(8)}, 1.0, SystemRandom())
                step = releases.publish(step, noised, durable=self.durable)
            self.sent.append((number, step.digest))
            releases.spool.settle()
            assert step.tensors()["w"].shape == (8,)

    def check(self) -> None:
        """What must hold at any moment, in any history."""
        spool = Spool(self.folder / "spool")
        spool.close()
        ledger = open_ledger(DATASET, self.folder / "ledger")
        counted = {r.digest for r in ledger.releases(RUN)}
        assert {digest for _, digest in self.sent} <= counted, "sent without being counted"
        by_draw: dict[tuple[int, int], set] = {}
        for number, draw, lot in self.computed:
            by_draw.setdefault((number, draw), set()).add(lot)
        assert all(len(lots) == 1 for lots in by_draw.values()), "a retry computed another lot"
        keys = [(r.round, r.draw) for r in ledger.releases(RUN)]
        assert len(keys) == len(set(keys)), "two results for one lot"
