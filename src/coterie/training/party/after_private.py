"""Text that was trained on privately does not go through an exchange without a budget by accident.

An expert host reads nearly all of it in `tokens`, and whole records in pushed sums without noise, so whatever epsilon
the earlier runs promised would be worth nothing.
"""

from __future__ import annotations

from coterie.config import FederationConfig, PartyConfig
from coterie.config.federation import party_privacy
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.ledger import default_root, open_ledger
from coterie.dp.accounting.lifetime import ledger_folders, private_runs_on
from coterie.dp.accounting.texts import Originals
from coterie.errors import LedgerError
from coterie.training.data.documents import Documents


def check_after_private(
    party: PartyConfig, federation: FederationConfig, documents: Documents, *, what: str = "the training text"
) -> None:
    """Refuse an exchange without a budget for text of which some was trained on privately, or record what it costs.

    Called before anything is sent; where nothing was ever trained on privately, no ledger is made.

    Args:
        party: says where its ledgers lie.
        federation: names the exchange.
        documents: text that would cross.
        what: it is, in words.

    Raises:
        LedgerError: ``tokens-after-private``, ``plain-after-private``.
    """
    root = (party.ledger or default_root(party.run_dir)).expanduser()
    if party_privacy(federation, party) is not None or not ledger_folders(root):
        return
    originals, digest = Originals(documents.texts, documents.users), dataset_digest(documents.texts)
    runs = private_runs_on(root, originals, digest)
    if not runs:
        return
    tokens = federation.exchange == "tokens"
    if party.after_private == "refuse":
        before = (
            f"Some of {what} of {party.party} was trained on privately before "
            f"({len(runs)} run{'s' if len(runs) > 1 else ''}), and "
        )
        raise LedgerError(
            before + "`exchange: tokens` lets the hosts read it."
            if tokens
            else before
            + "`experts` with `privacy: none` pushes sums from which the hosts can compute whole records.",
            code="tokens-after-private" if tokens else "plain-after-private",
            where=f"ledger {root}",
            why="what those runs promised about these records would no longer hold against the other parties",
            fix="train with `exchange: experts` and a budget, take other text, or write `after_private: reveal` in "
            "party.yaml: the ledger then says for good that no epsilon holds for this text",
        )
    ledger, name = open_ledger(digest, root), f"{federation.name}-{party.party}"
    ledger.record_texts(name, originals)
    ledger.record_revealed(name, federation.exchange)
