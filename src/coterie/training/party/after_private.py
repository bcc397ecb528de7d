"""Text that was trained on privately does not go through `tokens` by accident.

An expert host reads nearly all of it there, so whatever epsilon the earlier runs promised would be worth nothing.
"""

from __future__ import annotations

from coterie.config import FederationConfig, PartyConfig
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.ledger import default_root, open_ledger
from coterie.dp.accounting.lifetime import ledger_folders, private_runs_on
from coterie.dp.accounting.texts import Originals
from coterie.errors import LedgerError
from coterie.training.data.documents import Documents


def check_after_private(party: PartyConfig, federation: FederationConfig, documents: Documents) -> None:
    """Refuse `tokens` for text of which some was trained on privately, or record that no epsilon holds any more.

    Called before anything is sent; where nothing was ever trained on privately, no ledger is made.

    Args:
        party: says where its ledgers lie.
        federation: names the exchange.
        documents: the training text.

    Raises:
        LedgerError: ``tokens-after-private``.
    """
    root = (party.ledger or default_root(party.run_dir)).expanduser()
    if federation.exchange != "tokens" or not ledger_folders(root):
        return
    originals, digest = Originals(documents.texts, documents.users), dataset_digest(documents.texts)
    runs = private_runs_on(root, originals, digest)
    if not runs:
        return
    if party.after_private == "refuse":
        raise LedgerError(
            f"Some of the training text of {party.party} was trained on privately before "
            f"({len(runs)} run{'s' if len(runs) > 1 else ''}), and `exchange: tokens` lets the hosts read it.",
            code="tokens-after-private",
            where=f"ledger {root}",
            why="what those runs promised about these records would no longer hold against the other parties",
            fix="train with `exchange: experts` and a budget, take other text, or write `after_private: reveal` in "
            "party.yaml: the ledger then says for good that no epsilon holds for this text",
        )
    ledger, name = open_ledger(digest, root), f"{federation.name}-{party.party}"
    ledger.record_texts(name, originals)
    ledger.record_revealed(name, "tokens")
