"""Runs of one party on some texts, and what they cost together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.ledger import Ledger, open_ledger
from coterie.dp.accounting.texts import Originals

MECHANISM = Mechanism(2.0, 0.05)


ROUNDS = 20


DELTA = 1e-5


TEXTS = [f"note number {i} about the weather" for i in range(40)]


CHUNKS = {"packing": "chunks", "sequence_length": 64}


WHOLE = {"packing": "records", "sequence_length": 64}


def spend(
    root: Path,
    run: str,
    texts: Sequence[Any],
    users: Sequence[Any] | None = None,
    *,
    record: dict[str, Any] | None = None,
    pieces: int = 1,
    hashed: bool = True,
    rounds: int = ROUNDS,
) -> Ledger:
    """A run of ``rounds`` releases on some documents."""
    ledger = open_ledger(dataset_digest(texts), root)
    if hashed:
        ledger.record_texts(run, Originals(texts, users, pieces))
    unit = "record" if users is None else "user"
    ledger.start_run(run, MECHANISM, rounds, unit=unit, units=len(texts), record=record or WHOLE, self_check=True)
    for number in range(1, rounds + 1):
        ledger.record_release(run, number, 0, f"{run} {number}", {})
    return ledger


def composed(runs: int) -> float:
    return epsilon([(MECHANISM, runs * ROUNDS)], DELTA)
