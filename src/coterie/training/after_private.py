"""Text that was trained on privately does not go through `tokens` by accident.

An expert host reads nearly all of it there, so whatever epsilon the earlier runs promised would be worth nothing.
"""

from __future__ import annotations

from coterie.config import FederationConfig, PartyConfig
from coterie.dp.ledger import ledger_folder, open_ledger
from coterie.errors import LedgerError


def check_after_private(party: PartyConfig, federation: FederationConfig, digest: str) -> None:
    """Refuse `tokens` for a dataset with private releases, or record in its ledger that no epsilon holds any more.

    Called before anything is sent; a dataset without a ledger gets none.

    Args:
        digest: of the training documents, as ledgers are named.

    Raises:
        LedgerError: ``tokens-after-private``.
    """
    if federation.exchange != "tokens" or not ledger_folder(digest, party.ledger).is_dir():
        return
    ledger = open_ledger(digest, party.ledger)
    private = ledger.private_runs()
    if not private:
        return
    if party.after_private == "refuse":
        raise LedgerError(
            f"The training text of {party.party} was trained on privately before "
            f"({len(private)} run{'s' if len(private) > 1 else ''}), and `exchange: tokens` lets the hosts read it.",
            code="tokens-after-private",
            where=f"ledger {ledger.folder}",
            why="what those runs promised about these records would no longer hold against the other parties",
            fix="train with `exchange: experts` and a budget, take other text, or write `after_private: reveal` in "
            "party.yaml: the ledger then says for good that no epsilon holds for this text",
        )
    ledger.record_revealed(f"{federation.name}-{party.party}", "tokens")
