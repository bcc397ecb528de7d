"""One party's private contributions to the rounds of a federation: clipped, noised, spooled, in its own ledger.

The half of a private session that makes a release. Applying it is the hosts' business: they add up every party's
release and divide by public numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coterie.dp.accounting import epsilon, noise_multiplier
from coterie.dp.balance import Balancer
from coterie.dp.budget import Budget, Spent
from coterie.dp.dataset import dataset_digest
from coterie.dp.isolation import Isolation
from coterie.dp.ledger import Head, open_ledger
from coterie.dp.lot_sums import Collate, LotSums, RoundFigures, Settings, SumEngine
from coterie.dp.lots import Lot, LotPlan, Units, draw_lot
from coterie.dp.numbers import check_fields
from coterie.dp.provenance import Artefact, not_covered
from coterie.dp.randomness import random_source
from coterie.dp.releases import Releases
from coterie.dp.run_facts import RunStart
from coterie.dp.spool import SPOOL_LIMIT_BYTES, Release, Spool
from coterie.dp.statement import Statement, make_statement
from coterie.dp.texts import Originals
from coterie.errors import BudgetError


@dataclass(frozen=True)
class Plan:
    """A party's mechanism in public numbers, fixed before the first round.

    Attributes:
        budget: what this party may spend in the run.
        rounds: releases planned; failed ones count.
        lot_size: expected units in a lot.
        clip_norm: C.
        physical_batch: records computed at once.
        sampler, max_lot: how lots are drawn.
        records_per_user: cap, where units are users.
        seed: for tests; the run is then not private.
        sigma: noise multiplier; default: calibrated to the budget. Another value is for tests, with a seed.
        isolation, half_precision: see `coterie.dp.lot_sums.Settings`.
    """

    budget: Budget
    rounds: int
    lot_size: int
    clip_norm: float = 1.0
    physical_batch: int = 16
    sampler: str = "poisson"
    max_lot: int | None = None
    records_per_user: int = 16
    seed: int | None = None
    sigma: float | None = None
    isolation: Isolation = "fast"
    half_precision: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "rounds", "lot_size", "clip_norm", "physical_batch", "max_lot", "records_per_user", "seed")


class Contributor:
    """Makes at most one release for each round and pins, within a budget.

    Args:
        model: the party's model; every parameter that requires a gradient is released with noise, also those whose
            values are elsewhere (the engine was told their shapes).
        dataset: records by index.
        collate: list of items to a batch of tensors [B, ...].
        engine: sums clipped gradients.
        plan: see `Plan`.
        ledger: root of the ledgers, or None for the user's data folder.
        digest: names the dataset in the ledger; default: its records' content.
        run: identifier in the ledger; the same after a restart.
        users: the user of each record, where units are users.
        artefacts: what the start was made from.
        balancer: adds the lot's expert loads to the release; it is told what follows from them by `Balancer.follow`.
        record: what one record is, in public words and numbers, for ledger and statement.
        originals: the documents that the records were made from; default: the records.
        self_check: the engine was compared with one record at a time.
        gaps: lines for what the statement lists as not covered, beside those of the artefacts.
        drawn: told of every lot before it is computed; for the owner alone, since a lot is secret.

    Raises:
        BudgetError: an impossible budget or lot.
        LedgerError: the ledger is damaged, in use, or knows the run with other numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        collate: Collate,
        engine: SumEngine,
        plan: Plan,
        *,
        ledger: Path | str | None,
        run: str,
        digest: str | None = None,
        users: Sequence[Hashable] | None = None,
        artefacts: Sequence[Artefact] = (),
        balancer: Balancer | None = None,
        record: Mapping[str, Any] | None = None,
        originals: Originals | None = None,
        self_check: bool = False,
        gaps: Sequence[str] = (),
        drawn: Callable[[Lot], None] = lambda lot: None,
    ) -> None:
        units = Units.of_records(len(dataset)) if users is None else Units.of_users(users, plan.records_per_user)
        lots = LotPlan.of(units.count, plan.lot_size, plan.sampler, plan.max_lot)  # type: ignore[arg-type]
        unit = "record" if users is None else "user"
        plan.budget.warn_for(units.count, unit)
        mechanism = lots.mechanism(1.0)
        sigma = plan.sigma or noise_multiplier(
            plan.budget, lots.rate, plan.rounds, lots.sampler, mechanism.units, mechanism.limit
        )
        if plan.sigma is not None and plan.seed is None:
            raise BudgetError("a noise multiplier of one's own is for seeded tests.", code="dp-sigma")
        books = open_ledger(digest or dataset_digest(dataset), ledger)
        settings = Settings(
            plan.budget, sigma, plan.clip_norm, plan.rounds, plan.physical_batch, seed=plan.seed,
            isolation=plan.isolation, half_precision=plan.half_precision,
        )  # fmt: skip
        RunStart(lots, settings, units, engine).open(
            books, run, artefacts, record or {}, self_check, originals or Originals(dataset, units.owners())
        )
        self.seconds: dict[str, float] = {}
        self._drawn = drawn
        self._source = random_source(plan.seed)
        self._units, self._lots, self._plan, self._run, self._ledger = units, lots, plan, run, books
        self._sigma, self._not_covered = sigma, [*not_covered(artefacts), *gaps]
        self._sums = LotSums(model, dataset, collate, engine, balancer, units, settings, self._source)
        self._releases = Releases(books, Spool(books.folder / "spool" / run), run)

    @property
    def noise_multiplier(self) -> float:
        """Sigma of every round."""
        return self._sigma

    @property
    def isolation(self) -> Isolation:
        """Whether rounding may let one record move what others contribute."""
        return self._plan.isolation

    @property
    def expected_lot(self) -> int:
        """What sums are divided by, added up over the parties; public."""
        return self._lots.expected_size

    @property
    def largest_lot(self) -> int | None:
        """Bound of a truncated lot; None for plain Poisson sampling."""
        return self._lots.limit

    @property
    def last(self) -> RoundFigures | None:
        """Owner-only figures of the last lot that was computed in this process."""
        return self._sums.last

    def release(self, round_number: int, pins: Mapping[str, str]) -> tuple[Mapping[str, Tensor], Release] | None:
        """The noised sums of a round; the same bytes again for the same pins, until `forget`.

        Args:
            round_number: from 1.
            pins: digests of everything that the sums are computed from. Where they differ from those of an earlier
                try, that one is burned: its cost stays in the ledger, lot and noise are drawn anew.

        Returns:
            Float32 sums by parameter name, spooled and counted; None when the budget allows no further round.
        """
        try:
            begun = self._releases.begin(round_number, pins, lambda draw: self._draw(round_number, draw))
        except BudgetError as error:
            if error.code != "dp-budget-spent":
                raise
            return None
        self.seconds = {}
        if isinstance(begun, Release):
            return begun.tensors(), begun
        began = time.monotonic()
        self._drawn(begun.lot)
        sums = self._sums.compute(begun.lot, begun.name)
        summed = time.monotonic()
        noised = self._sums.noise(sums).add(sums, self._source, f"noise|{begun.name}")
        del sums  # with isolation: exact they take twice the memory of what is spooled
        drawn = time.monotonic()
        release = self._releases.publish(begun, noised)
        self.seconds = {"sums": summed - began, "noise": drawn - summed, "spool": time.monotonic() - drawn}
        return noised, release

    def forget(self, up_to_round: int, beyond_limit: int) -> None:
        """Drop spooled results that nobody will need again.

        Args:
            up_to_round: the newest round that every checkpoint to go back to includes.
            beyond_limit: drop up to this round where the spool takes more than `SPOOL_LIMIT_BYTES`. Going back to
                before it then draws those rounds anew, and counts them again.
        """
        spool = self._releases.spool
        spool.drop_releases(up_to_round)
        if spool.nbytes() > SPOOL_LIMIT_BYTES:
            spool.drop_releases(beyond_limit)

    def head(self) -> Head:
        """The ledger's newest entry, for a checkpoint."""
        return self._ledger.head()

    def check_contains(self, head: Head) -> None:
        """Compare the ledger with what it was when a checkpoint was written.

        Raises:
            LedgerError: it is an older copy, also one that knows the newest round but not every draw of it.
        """
        self._ledger.check_contains(head)

    def check_not_behind(self, applied_rounds: int) -> None:
        """Compare the ledger with what the hosts say they received.

        Args:
            applied_rounds: the newest round that the hosts applied in this run.

        Raises:
            LedgerError: they received more than the ledger knows: it was put back to an older copy.
        """
        self._ledger.check_not_behind(self._run, applied_rounds)

    def spent(self) -> Spent:
        """What this party spent in this run so far."""
        return self._ledger.spent(self._run, self._plan.budget.delta)

    def planned_epsilon(self) -> float:
        """Epsilon after all planned rounds, at the budget's delta."""
        mechanism = self._lots.mechanism(self.noise_multiplier)
        return epsilon([(mechanism, self._plan.rounds)], self._plan.budget.delta)

    def rounds_left(self) -> int:
        """Releases that the plan still allows."""
        return self._releases.remaining

    def rounds_released(self) -> int:
        """Releases counted so far, burned ones included."""
        return self._releases.used

    def statement(self) -> Statement:
        """What is promised about this party's records."""
        return make_statement(self._ledger, self._run, self._plan.budget, self._plan.clip_norm, self._not_covered)

    def close(self) -> None:
        """Let another process go on with this run."""
        self._releases.spool.close()

    def _draw(self, round_number: int, draw: int) -> Lot:
        return draw_lot(round_number, self._lots, self._units, self._source, draw)
