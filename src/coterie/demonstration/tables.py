"""The closing tables; the same on the screen and in the report."""

from __future__ import annotations

from coterie.demonstration.plan import ARMS, Arm
from coterie.demonstration.results import Results
from coterie.demonstration.screen import megabytes
from coterie.dp.accounting.digits import epsilon_digits
from coterie.pages import Table

IMPORTS_MB = 370, 500
"""Resident size of a process that has only imported torch and transformers, and with datasets and gRPC, too."""


def tables(results: Results) -> list[Table]:
    """The closing tables in their order."""
    found = [
        loss_table(results),
        difference_table(results),
        privacy_table(results),
        memory_table(results),
        wire_table(results),
    ]
    return [table for table in found if table is not None]


def loss_table(results: Results) -> Table:
    """Held-out loss and perplexity of every arm, per party."""
    rows = [
        (ARMS[arm].title, *(f"{f.loss:.3f} ({f.evaluation.perplexity:.1f})" for f in by_party.values()))
        for arm, by_party in results.arms.items()
    ]
    title = "loss on each party's own held-out text, nats per token (perplexity); lower is better"
    return Table(title, ("", *results.parties), tuple(rows))


def difference_table(results: Results) -> Table | None:
    """Each federation against training alone and pooled text, under the same rules; None if neither was run."""
    rows = []
    for arm in results.wire:
        for other, words in ((ARMS[arm].alone, "alone"), (ARMS[arm].pooled, "in one place")):
            found = [results.difference(arm, other, party) for party in results.parties]
            cells = [f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})" for d in found if d is not None]
            if cells:
                rows.append((f"{ARMS[arm].title}, against {words}", *cells))
    title = "difference in loss, paired on the same held-out sequences, with its 95 % interval; below zero is better"
    return Table(title, ("", *results.parties), tuple(rows)) if rows else None


def privacy_table(results: Results) -> Table | None:
    """What each private arm spent at each party; None when there was none."""
    rows, delta = [], results.plan.private.delta
    for arm, by_party in results.arms.items():
        cells = [
            f"epsilon {epsilon_digits(p.epsilon)} (noise {p.noise_multiplier:.2f}, {p.rounds} rounds)"
            for p in (figures.promise for figures in by_party.values())
            if p is not None
        ]
        if cells:
            rows.append((ARMS[arm].title, *cells))
    title = f"privacy spent per record at delta {delta:g}, noise as a multiple of the clip norm"
    return Table(title, ("", *results.parties), tuple(rows)) if rows else None


def memory_table(results: Results) -> Table:
    """Model state and peak memory of every arm's processes."""
    rows = []
    for arm, by_party in results.arms.items():
        state = _range([f.model_state_bytes for f in by_party.values()])
        peak = _range([f.peak_rss_bytes for f in by_party.values()])
        rows.append((ARMS[arm].title, _processes(ARMS[arm], len(by_party)), state, peak))
    title = "memory of one process; of the peak, importing torch and transformers alone takes about {} MB, with "
    title = (title + "datasets and gRPC about {} MB").format(*IMPORTS_MB)
    return Table(title, ("", "processes", "model state", "peak memory"), tuple(rows))


def wire_table(results: Results) -> Table | None:
    """Bytes that the parties of each federation sent; None when none was run."""
    rows = [
        (ARMS[arm].title, megabytes(wire.payload_bytes), megabytes(wire.tensor_bytes), f"{wire.ratio:.3f}")
        for arm, wire in results.wire.items()
    ]
    title = "sent by all parties together, over mutual TLS"
    return Table(title, ("", "sent", "tensors in it", "ratio"), tuple(rows)) if rows else None


def _processes(arm: Arm, parties: int) -> str:
    counts = {
        "public": "1 (not trained)",
        "alone": f"{parties}",
        "pooled": "1",
        "federation": f"{parties} and a coordinator",
    }
    return counts[arm.kind]


def _range(values: list[int]) -> str:
    low, high = megabytes(min(values)), megabytes(max(values))
    return low if low == high else f"{low.removesuffix(' MB')} to {high}"
