"""One party's private contributions to the rounds of a federation: clipped, noised, spooled, in its own ledger.

The half of a private session that makes a release. Applying it is the hosts' business: they add up every party's
release and divide by public numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from coterie.dp.accounting.lots import Lot
from coterie.dp.accounting.spool import SPOOL_LIMIT_BYTES, Release
from coterie.dp.open_run import OpenRun
from coterie.errors import BudgetError


class Contributor:
    """Makes at most one release for each round and pins, within a budget.

    Where several ranks share the run, all of them call `release` and `forget`.

    Args:
        run: opened for the party.
        drawn: given every lot before it is computed; for the owner alone, since a lot is secret.
        as_integers: releases are int64 on the noise's grid; see `OpenRun.publish`.

    Attributes:
        run: its plan, ledger, releases and statement.
    """

    def __init__(
        self, run: OpenRun, drawn: Callable[[Lot], None] = lambda lot: None, *, as_integers: bool = False
    ) -> None:
        self.run, self._drawn, self._as_integers = run, drawn, as_integers

    def release(
        self, round_no: int, pins: Mapping[str, str], *, may_draw: bool = True
    ) -> tuple[Mapping[str, Tensor], Release] | None:
        """The noised sums of a round; the same bytes again for the same pins, until `forget`.

        Args:
            round_no: from 1.
            pins: digests of everything that the sums are computed from. Where they differ from those of an earlier
                try, that one is burned: its cost stays in the ledger, lot and noise are drawn anew.
            may_draw: see `OpenRun.begin`.

        Returns:
            Sums by the names that they have in files, spooled and counted, each at one of the ranks that share the
            run (but what is released beside gradients may be at all); None when the budget allows no further round.

        Raises:
            LedgerError: see `OpenRun.begin`.
        """
        try:
            begun = self.run.begin(round_no, pins, may_draw=may_draw)
        except BudgetError as error:
            if error.code != "dp-budget-spent":
                raise
            return None
        if isinstance(begun, Release):
            return self.run.own_tensors(begun), begun
        self._drawn(begun.lot)
        noised, release = self.run.publish(begun, as_integers=self._as_integers, to_all=False)
        return self.run.lot_sums.holdings.stored(noised), release

    def held(self, round_no: int, pins: Mapping[str, str], name: str) -> dict[str, str] | None:
        """All pins of what is kept for a round, a release or its lot alone, which has these pins and one of that
        name; None where nothing is kept. `release` with all of them draws nothing new.
        Rank 0 is asked."""
        spool, stored = self.run.releases.spool, self.run.releases.spool.stored_lot()
        kept = [each.pins for each in spool.releases_of(round_no) if self.run.shared.is_here(each)]
        if stored is not None and stored.lot.round == round_no:
            kept.append(stored.pins)
        for each in kept:
            if name in each and pins.items() <= each.items():
                return each
        return None

    def forget(self, up_to_round: int, beyond_limit: int) -> None:
        """Drop spooled results that nobody will need again.

        Args:
            up_to_round: the newest round that every checkpoint to go back to includes.
            beyond_limit: drop up to this round where the spool takes more than `SPOOL_LIMIT_BYTES`. Going back to
                before it then draws those rounds anew, and counts them again.
        """
        shared = self.run.shared
        shared.drop(up_to_round)
        if self.run.ranks.tell("room for results", lambda: shared.nbytes() > SPOOL_LIMIT_BYTES):
            shared.drop(beyond_limit)
