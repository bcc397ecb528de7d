"""What the figures mean, in plain sentences; the same on the screen and in the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from coterie.demonstration.plan import ARMS, Arm
from coterie.demonstration.results import ALONE, POOLED, Results
from coterie.demonstration.screen import megabytes
from coterie.training.evaluate import Difference

NEAR = 0.03
"""How far above pooled training still counts as near it."""
IMPORTS_MB = 370, 500
"""Resident size of a process that has only imported torch and transformers, and with datasets and gRPC, too."""


@dataclass(frozen=True)
class Table:
    """Rows under column names, for screen and page."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def loss_table(results: Results) -> Table:
    """Held-out loss and perplexity of every arm, per party."""
    rows = [
        (ARMS[arm].title, *(f"{f.loss:.3f} ({f.evaluation.perplexity:.1f})" for f in by_party.values()))
        for arm, by_party in results.arms.items()
    ]
    title = "loss on each party's own held-out text, nats per token (perplexity); lower is better"
    return Table(title, ("", *results.parties), tuple(rows))


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


def tables(results: Results) -> list[Table]:
    """The closing tables in their order."""
    found = [loss_table(results), memory_table(results), wire_table(results)]
    return [table for table in found if table is not None]


def headline(results: Results) -> str:
    """The outcome in one sentence."""
    together = [arm for arm in results.wire if ALONE in results.arms]
    if not together:
        return "The demo ran; a comparison needs both `isolated` and `tokens`."
    arm, parties = together[0], results.parties
    if results.plan.quick:
        return f"Every step works; {results.plan.rounds} rounds on so little text say nothing about the losses."
    better = [p for p in parties if (d := results.difference(arm, ALONE, p)) and d.high < 0]
    worse = [p for p in parties if (d := results.difference(arm, ALONE, p)) and d.low > 0]
    ties = [p for p in parties if p not in better and p not in worse]
    if len(better) == len(parties):
        return f"All {len(parties)} parties got a better model together than alone{_near(results, arm)}."
    counts = [(better, "better"), (ties, "no different beyond chance"), (worse, "worse")]
    told = [f"{_names(some)} {words}" for some, words in counts if some]
    return f"Together against alone: {'; '.join(told)}."


def meaning(results: Results) -> list[str]:
    """What the tables say, one sentence after the other."""
    sentences: list[str] = []
    for arm in results.wire:
        if not results.plan.quick:
            sentences += [*_against_alone(results, arm), *_against_pooled(results, arm)]
        sentences += _state(results, arm)
        wire = results.wire[arm]
        sentences.append(
            f"The parties sent {megabytes(wire.payload_bytes)}, training and measuring together; headers and control "
            f"messages were {100 * (wire.ratio - 1):.1f} % on top of the tensors that had to move."
        )
    plan = results.plan
    if plan.quick:
        return [*sentences, "This was a quick demo: it shows every step, and its losses show nothing."]
    sentences.append(
        f"Every arm took {plan.rounds} rounds from the same public model, with the same seed and learning rates, "
        f"{plan.batch} sequences of {plan.sequence_length} tokens per party and round. Each party has little text on "
        "purpose; with plenty of its own it would gain less. A model this small shows the direction, not the size, "
        "of what a large one would gain."
    )
    return sentences


def not_protected(results: Results) -> list[str]:
    """What no figure above shows: who can read what."""
    if not any(ARMS[arm].exchange == "tokens" for arm in results.wire):
        return []
    return [
        "`tokens` does NOT keep the text from the other parties. For every token a hidden vector goes to the hosts "
        "of its experts, and a host that knows the public model can turn nearly all of them back into the text "
        "(99.9 % of tokens in a measurement on a small model). The gradients that follow give away the next token.",
        "TLS keeps everybody outside the federation out, and the coordinator sees no tensor; nothing here hides text "
        "from the parties inside. Use `tokens` only among parties that may read each other's text.",
        "For parties that may not: `exchange: experts`, where experts travel to the text, with a privacy budget.",
    ]


def _against_alone(results: Results, arm: str) -> Iterator[str]:
    for party in results.parties:
        difference = results.difference(arm, ALONE, party)
        if difference is None:
            return
        ours, alone = results.arms[arm][party].loss, results.arms[ALONE][party].loss
        if difference.is_tie:
            told = f"{party} ties with itself alone: {ours:.3f} and {alone:.3f}"
        else:
            word = "better" if difference.mean < 0 else "worse"
            told = f"{party} is {word} together than alone: {ours:.3f} against {alone:.3f}"
        yield f"{told} ({_interval(difference)})."
        at, lowest = results.best[ALONE][party]
        if lowest < alone - 0.005 and at < results.plan.rounds:
            beats = "still above" if lowest > ours else "below"
            yield (
                f"Alone, {party} was best after round {at} ({lowest:.3f}, {beats} the loss together) and then began "
                "to learn its little text by heart."
            )


def _excess(results: Results, arm: str) -> dict[str, float]:
    """How far each party's loss is above that of pooled training, as a share; empty when that was not run."""
    if POOLED not in results.arms:
        return {}
    return {p: results.arms[arm][p].loss / results.arms[POOLED][p].loss - 1 for p in results.parties}


def _near(results: Results, arm: str) -> str:
    excess = _excess(results, arm).values()
    return f", within {100 * NEAR:.0f} % of pooling all text" if excess and max(excess) <= NEAR else ""


def _against_pooled(results: Results, arm: str) -> Iterator[str]:
    excess = _excess(results, arm)
    if not excess:
        return
    near = [party for party, share in excess.items() if share <= NEAR]
    told = ", ".join(f"{party} {100 * share:+.1f} %" for party, share in excess.items())
    far = "" if len(near) == len(excess) else f", so {len(excess) - len(near)} of {len(excess)} did not get there"
    yield f"Against one process with all text: {told} (within {100 * NEAR:.0f} % counts as near{far})."


def _state(results: Results, arm: str) -> Iterator[str]:
    if ALONE not in results.arms:
        return
    whole = max(f.model_state_bytes for f in results.arms[ALONE].values())
    part = max(f.model_state_bytes for f in results.arms[arm].values())
    yield (
        f"A party held {megabytes(part)} of model, gradients and optimiser state instead of {megabytes(whole)} "
        f"({100 * (1 - part / whole):.0f} % less): the other experts live with the other parties. At this size the "
        "libraries hide it in the peak memory; with a large model it decides what fits."
    )


def _interval(difference: Difference) -> str:
    return f"difference {difference.mean:+.3f}, 95 % interval {difference.low:+.3f} to {difference.high:+.3f}"


def _names(parties: Iterable[str]) -> str:
    *most, last = parties
    return f"{', '.join(most)} and {last}" if most else last


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
