"""One private run, opened: the same for a session of one party and for a party of a federation.

Opening checks the lots against the data, finds the noise that the budget needs, writes the run into the ledger (or
holds a resumed one to its entry), takes up what was spooled, and joins sums, noise and releases. From then on a round
is `OpenRun.begin` and `OpenRun.publish`; what is done with a release is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.budget import Spent
from coterie.dp.accounting.ledger import Ledger, open_ledger
from coterie.dp.accounting.lots import LotPlan, draw_lot
from coterie.dp.accounting.provenance import Artefact, not_covered
from coterie.dp.accounting.releases import Pending, Releases
from coterie.dp.accounting.run_entry import RunStart
from coterie.dp.accounting.spool import Release, Spool
from coterie.dp.accounting.statement import Statement, make_statement
from coterie.dp.balance import Balancer
from coterie.dp.lot_sums import LotSums
from coterie.dp.noise.randomness import RandomSource, random_source
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.dp.sum_engine import ConstantShape, SumEngine


@dataclass(frozen=True)
class RunEntry:
    """Where a run is counted, and what its entry says beside the plan.

    Attributes:
        ledger: root of the ledgers; None: the user's data folder.
        run: identifier; the same after a restart.
        artefacts: what the start was made from.
        record: what one record is, in public words and numbers.
        self_check: the engine was compared with one record at a time.
        gaps: lines for what the statement lists as not covered, beside those of the artefacts.
        resumed: the entry exists, and the run is held to it.
    """

    ledger: Path | str | None
    run: str
    artefacts: Sequence[Artefact] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    self_check: bool = False
    gaps: Sequence[str] = ()
    resumed: bool = False


@dataclass
class OpenRun:
    """A run whose ledger is open; `open_run` makes it.

    Attributes:
        name: identifier in the ledger.
        plan, options, data: as given.
        lots: how lots are drawn.
        mechanism: what one round costs.
        ledger: of the dataset.
        releases: what this run released.
        lot_sums: from a lot to its sums.
        source: of everything random.
        not_covered: lines of the statement about this run's own gaps.
        seconds: how long the parts of the last round took in this process; owner-only.
    """

    name: str
    plan: PrivacyPlan
    options: ComputeOptions
    data: PrivateData
    lots: LotPlan
    mechanism: Mechanism
    ledger: Ledger
    releases: Releases
    lot_sums: LotSums
    source: RandomSource
    not_covered: Sequence[str]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def noise_multiplier(self) -> float:
        """Sigma of every round."""
        return self.mechanism.noise_multiplier

    def begin(self, round_no: int, pins: Mapping[str, str]) -> Pending | Release:
        """What to do for a round; see `Releases.begin`.

        Args:
            round_no: from 1.
            pins: digests of everything that the sums are computed from.

        Raises:
            BudgetError: no release is left.
        """
        self.seconds = {}
        return self.releases.begin(
            round_no, pins, lambda draw: draw_lot(round_no, self.lots, self.data.units, self.source, draw)
        )

    def publish(self, pending: Pending, divisor: float = 1.0) -> tuple[dict[str, Tensor], Release]:
        """Compute a pending lot, noise it, spool and count the result; the model is not changed.

        Args:
            pending: of `begin`.
            divisor: public; what is released is the noised sums over it.

        Returns:
            Float32 tensors on the CPU by parameter name, and the release that holds them.
        """
        earlier = self.releases.spooled(pending)
        if earlier is not None:
            return earlier.tensors(), earlier
        began = time.monotonic()
        sums = self.lot_sums.compute(pending.lot, pending.name)
        summed = time.monotonic()
        noised = self.lot_sums.noise(sums).add(sums, self.source, f"noise|{pending.name}", divisor=divisor)
        del sums  # with isolation: exact they take twice the memory of what is spooled
        drawn = time.monotonic()
        release = self.releases.publish(pending, noised)
        self.seconds = {"sums": summed - began, "noise": drawn - summed, "spool": time.monotonic() - drawn}
        return noised, release

    def spent(self) -> Spent:
        """What this run has spent so far, at the budget's delta; infinite for a seeded run."""
        return self.ledger.spent(self.name, self.plan.budget.delta)

    def statement(self) -> Statement:
        """What is promised about the records, as of now."""
        return make_statement(self.ledger, self.name, self.plan.budget, self.plan.clip_norm, self.not_covered)

    def close(self) -> None:
        """Let another process go on with this run."""
        self.releases.spool.close()


def open_run(
    plan: PrivacyPlan,
    options: ComputeOptions,
    data: PrivateData,
    model: nn.Module,
    engine: SumEngine,
    balancer: Balancer | None,
    entry: RunEntry,
    shape: ConstantShape | None = None,
) -> OpenRun:
    """Open a run, before anything is released.

    Args:
        plan: what bounds its cost.
        options: how it computes.
        data: what lots are drawn from.
        model: every parameter that requires a gradient is released with noise, also those whose values are elsewhere
            (the engine was told their shapes).
        engine: sums clipped gradients as the plan says.
        balancer: adds the lot's expert loads to the release where the plan's balance needs them.
        entry: where the run is counted.
        shape: fills every batch up to one shape.

    Raises:
        BudgetError: an impossible budget or lot.
        ProvenanceError: the start was made from private records.
        LedgerError: the ledger is damaged, in use, or knows the run with other numbers.
    """
    gaps = [*not_covered(entry.artefacts), *entry.gaps]
    lots = plan.lots(data.units.count)
    if not entry.resumed:
        plan.check_secrecy()
        plan.budget.warn_for(data.units.count, "record" if data.units.starts is None else "user")
    mechanism = plan.mechanism(lots)
    ledger = open_ledger(data.digest(), entry.ledger)
    start = RunStart(plan, mechanism, data.units, engine)
    if entry.resumed:
        start.check(ledger, entry.run)
    else:
        start.open(ledger, entry.run, entry.artefacts, entry.record, entry.self_check, data.originals())
    source = random_source(plan.seed)
    sums = LotSums(model, data, engine, balancer, plan, options, mechanism.noise_multiplier, source, shape)
    releases = Releases(ledger, Spool(ledger.folder / "spool" / entry.run), entry.run)
    return OpenRun(entry.run, plan, options, data, lots, mechanism, ledger, releases, sums, source, gaps)
