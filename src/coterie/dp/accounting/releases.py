"""One run's rounds: at most one noised result for each lot, and never more of them than the ledger says.

The order of a round, with the state a crash leaves after each step:

1. the lot is drawn and stored          crash: the same lot is computed again
2. the sums are computed and noised     crash: the same lot again, with new noise; nothing had been stored
3. the noised bytes are spooled         crash: `Releases` finds them, counts them, and only they are used
4. the ledger counts them               crash: only they are used
5. they are used or sent                crash: they are used or sent again, byte for byte

Where nothing leaves this process before it writes a checkpoint, the bytes of step 3 are written and not yet synced;
that happens beside step 5 and whatever follows. A process that dies at any moment leaves them to the next one just
so. A power cut may take them: then they are counted and never used again, and the round is drawn anew.

What a round is computed from is pinned (weights, roster, membership epoch, as digests). If pins change while a lot or
a result is pending, it is burned: the ledger keeps the cost of a result, and lot and noise are drawn anew.

Nothing here knows about models, devices or the network: one process calls it for `coterie.dp.session`, and each party
of a federation for its own pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from coterie.dp.accounting.ledger import Ledger
from coterie.dp.accounting.lots import Lot
from coterie.dp.accounting.spool import Durable, Release, Spool, adopt
from coterie.errors import BudgetError, LedgerError


@dataclass(frozen=True)
class Pending:
    """A lot that has to be computed and noised. ``name`` differs for every draw: it names seeded streams."""

    round: int
    draw: int
    pins: dict[str, str]
    lot: Lot

    @property
    def name(self) -> str:
        return f"{self.round}|{self.draw}"


class Releases:
    """Begin a round, publish its result, look up what was published.

    Args:
        ledger: of the dataset.
        spool: of the run.
        run: identifier; `Ledger.start_run` was called for it.

    Raises:
        LedgerError: spool and ledger contradict each other, or the run is unknown to the ledger.
    """

    def __init__(self, ledger: Ledger, spool: Spool, run: str) -> None:
        self.ledger = ledger
        self.spool = spool
        self.run = run
        self.planned = int(ledger.run(run)["rounds"])
        self._recover()

    @property
    def used(self) -> int:
        """Releases that were counted, burned ones included."""
        return len(self.ledger.releases(self.run))

    @property
    def remaining(self) -> int:
        """Releases that the plan still allows."""
        return self.planned - self.used

    def begin(self, round_no: int, pins: Mapping[str, str], draw: Callable[[int], Lot]) -> Pending | Release:
        """What to do for a round: compute a lot, or use the bytes that exist already.

        Args:
            round_no: from 1.
            pins: digests of what the round is computed from.
            draw: draws the lot; its argument is the number of this draw, which names seeded streams.

        Returns:
            A `Release` if this round has one for these pins, counted; else a `Pending` lot, stored.

        Raises:
            BudgetError: no release is left.
            LedgerError: a spooled result could not be counted; it may not be used then.
        """
        for release in self.spool.releases_of(round_no):
            if release.pins == dict(pins):
                return self._count(release)
            self.burn(release, "what the round is computed from has changed")
        known = sum(released.round == round_no for released in self.ledger.releases(self.run))
        stored = self.spool.stored_lot()
        if stored is not None:
            current = (stored.lot.round, stored.pins, stored.draw) == (round_no, dict(pins), known)
            if current:
                return Pending(round_no, stored.draw, stored.pins, stored.lot)
            self.spool.drop_lot()
        if self.remaining <= 0:
            raise BudgetError(
                f"the budget of this run is spent: {self.used} of {self.planned} rounds are released.",
                code="dp-budget-spent",
                where=f"run {self.run}, round {round_no}",
                why="noise, sampling rate and number of rounds were fixed for this budget",
                fix="use the model as it is, or start a new run with a new budget (the ledger adds both up)",
            )
        lot = draw(known)
        self.spool.store_lot(lot, known, pins)
        return Pending(round_no, known, dict(pins), lot)

    def publish(
        self,
        pending: Pending,
        noised: Mapping[str, Tensor],
        shards: Sequence[str] = (),
        durable: Durable = "first",
    ) -> Release:
        """Spool a noised result, then count it. When this returns it may be used and, where durable first, sent.

        Args:
            pending: whose result it is.
            noised: by parameter name; of several ranks' result rank 0's part.
            shards: digests of the other ranks' parts, which are on disk already.
            durable: see `coterie.dp.accounting.spool.Durable`.

        Returns:
            The release; where an earlier try had spooled one for this lot, that one, and ``noised`` is dropped: a
            lot is noised once.

        Raises:
            LedgerError: it could not be counted; it may not be used then.
        """
        found = self.spooled(pending)
        if found is not None:
            return found
        release = self.spool.write_release(pending.round, pending.draw, noised, pending.pins, shards)
        if durable == "first":
            self.spool.keep(release, durable)
            return self._count(release)
        try:
            return self._count(release)
        finally:  # also where it could not be counted: a lot is noised once
            self.spool.keep(release, durable)

    def spooled(self, pending: Pending) -> Release | None:
        """The result that an earlier try made of a pending lot, counted; None if there is none.

        Ask before computing a lot again: a second result would be the same lot with other noise.
        """
        for release in self.spool.releases_of(pending.round):
            if (release.draw, release.pins) == (pending.draw, pending.pins):
                return self._count(release)
        return None

    def _count(self, release: Release) -> Release:
        """Make sure that the ledger counts a spooled result: the process may go on after a failed ledger write."""
        self.ledger.record_release(self.run, release.round, release.draw, release.digest, release.pins)
        stored = self.spool.stored_lot()
        if stored is not None and (stored.lot.round, stored.draw) == (release.round, release.draw):
            self.spool.drop_lot()
        return release

    def burn(self, release: Release, reason: str) -> None:
        """Give up a result: it stays counted, and its round gets a new lot and new noise."""
        self._count(release)
        self.ledger.record_burned(self.run, release.round, release.draw, reason)
        self.spool.drop(release)

    def published(self, round_no: int) -> Release | None:
        """The result of a round, counted, if the spool still has it."""
        found = next(iter(self.spool.releases_of(round_no)), None)
        return None if found is None else self._count(found)

    def last_round(self) -> int:
        """The newest round that the ledger counts; 0 before the first."""
        return max((released.round for released in self.ledger.releases(self.run)), default=0)

    def _recover(self) -> None:
        counted = {(r.round, r.draw): r.digest for r in self.ledger.releases(self.run)}
        adopt(self.spool.folder, lambda *place: counted.get(place))
        for release in self.spool.releases():
            known = counted.get((release.round, release.draw))
            if known is not None and known != release.digest:
                raise LedgerError(
                    f"{release.path.name} is not what the ledger counted.",
                    code="dp-spool-digest",
                    where=str(self.spool.folder),
                    why="only the bytes that the ledger counted may be used or sent",
                    fix="remove that file: the ledger keeps its cost, and the round is drawn anew",
                )
            self._count(release)
