"""The page of a run of `coterie train` or of a party: losses, budget, load, time, memory and bytes over its rounds.

For the owner's eyes: losses, lot sizes and tokens are un-noised facts about private text, and are marked so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie import pages
from coterie.dp.accounting.digits import epsilon_digits
from coterie.errors import CheckpointError
from coterie.pages import Series, Table
from coterie.pages.amounts import data_size
from coterie.storage import json_object
from coterie.training.folders import no_run, private_folder
from coterie.training.metrics import read_metrics

_LOSSES = {"loss": "training", "loss_not_private": "training", "test_loss": "held-out"}
_LOADS = {
    "tokens": "tokens in a round",
    "drawn_not_private": "records in the lot",
    "lot_size_not_private": "records in the lot",  # of the versions before this one
}
_RELEASED = {
    "load_most": "the most used expert",
    "load_least": "the least used expert",
}
"""Expert loads under `balance: private_load` or `bias`; other runs measure none."""
_TIMES = {
    "agree_seconds": "agreeing on the round",
    "fetch_seconds": "fetching weights",
    "waited_first_seconds": "waiting for layers, forward",
    "waited_later_seconds": "waiting for layers, later",
    "sums_seconds": "sums of clipped gradients",
    "noise_seconds": "noise",
    "spool_seconds": "spool",
    "push_seconds": "pushing",
}
"""Parts of a round's time, as metrics.jsonl names them."""
FOOTER = (
    "Made by `coterie report` from what the run left in its folder. Losses, lot sizes and loads were computed on "
    "private text without noise: this page is for its owner."
)

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class TrainingRecord:
    """What a run left, as far as it came.

    Attributes:
        rows: lines of metrics.jsonl.
        result: result.json, empty while the run is not finished.
        marker: run.json.
        status: status.json of a party, else empty.
    """

    rows: Sequence[Row]
    result: Mapping[str, Any]
    marker: Mapping[str, Any]
    status: Mapping[str, Any]

    @classmethod
    def read(cls, run_folder: Path) -> TrainingRecord:
        """What lies in a run folder.

        Raises:
            CheckpointError: no run is there (``run-dir-none``), or it has made no round yet (``run-no-round``).
        """
        marker = _json(run_folder / "run.json")
        if not marker:
            raise no_run(run_folder)
        try:
            rows = read_metrics(private_folder(run_folder))
        except FileNotFoundError:
            rows = []
        if not rows:
            raise CheckpointError(
                f"The run in {run_folder} has made no round yet.",
                code="run-no-round",
                fix="wait for its first round; `coterie status` shows where a federation is",
            )
        result = _json(private_folder(run_folder) / "result.json")
        return cls(rows, result, marker, _json(run_folder / "status.json"))

    def course(self, name: str) -> list[tuple[float, float]]:
        """(finished rounds, value) wherever the figure stands."""
        found = []
        for row in self.rows:
            value, at = row.get(name), row.get("round")
            if value is not None and at is not None:
                found.append((float(at), float(value)))
        return found

    @property
    def rounds(self) -> int:
        """Rounds that were made."""
        return int(max(float(row.get("round") or 0) for row in self.rows))

    @property
    def privacy(self) -> Mapping[str, Any]:
        """What was spent; empty without a budget."""
        return self.result.get("privacy") or self.status.get("privacy") or {}

    @property
    def party(self) -> str:
        """Empty for a run of one party alone."""
        return str(self.marker.get("party", ""))

    def as_json(self) -> dict[str, Any]:
        """The figures of the page."""
        return {
            "party": self.party or None,
            "run": self.marker.get("run"),
            "rounds": self.rounds,
            "finished": bool(self.result.get("finished")),
            "not_private": {name: self.course(name) for name in (*_LOSSES, *_LOADS) if self.course(name)},
            "expert_load": {name: self.course(name) for name in _RELEASED if self.course(name)},
            "epsilon": self.course("epsilon"),
            "seconds": self.course("seconds"),
            "memory": {name: self.result.get(name) for name in ("model_state_bytes", "peak_rss_bytes")},
            "wire": self.result.get("wire") or self.status.get("wire") or {},
        }


def training_page(run: TrainingRecord) -> str:
    """The page as one HTML file."""
    whose = f"{run.party}'s part in a federation" if run.party else "a run of one party alone"
    return pages.page(
        f"coterie report: {whose}",
        [_headline(run)],
        [
            pages.warning(
                "For the owner alone",
                [
                    "Losses, lot sizes and tokens on this page were computed on private text without noise. "
                    "Sending it on reveals facts that no budget covers."
                ],
            ),
            training_charts(run),
            load_charts(run),
            _time(run),
            _memory(run),
            _bytes(run),
            pages.section("What was run", pages.pairs(_known(run))),
            _statement(run),
        ],
        footer=FOOTER,
    )


def training_charts(run: TrainingRecord) -> str:
    """Losses and budget over the rounds; empty while there is neither."""
    drawn = [part for part in (_losses(run), _budget(run)) if part]
    return pages.beside(*drawn) if drawn else ""


def load_charts(run: TrainingRecord) -> str:
    """Tokens and lot sizes over the rounds, marked as the owner's, and expert loads where a budget releases them."""
    return pages.section("Load, private to the owner", *_charts(run, _LOADS)) + _expert_load(run)


def _headline(run: TrainingRecord) -> str:
    ended = "finished" if run.result.get("finished") else "not finished"
    told = f"{run.rounds} rounds, {ended}"
    spent = run.privacy.get("epsilon")
    if spent is not None:
        return f"{told}; epsilon {epsilon_digits(float(spent))} spent at delta {float(run.privacy['delta']):g}."
    return f"{told}; no privacy budget: nothing bounds what the result reveals."


def _losses(run: TrainingRecord) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for name, words in _LOSSES.items():
        if run.course(name):
            series.setdefault(words, run.course(name))
    if not series:
        return ""
    drawn = pages.lines([Series(name, points) for name, points in series.items()], x="round", y="nats per token")
    last = {words: points[-1][1] for words, points in series.items()}
    told = ", ".join(f"{words} {value:.3f}" for words, value in last.items())
    return pages.section(
        "Loss, private to the owner", pages.figure(f"nats per token; the last values: {told}", drawn)
    )


def _budget(run: TrainingRecord) -> str:
    points = run.course("epsilon")
    if not points:
        return ""
    planned = (run.privacy.get("budget") or {}).get("epsilon")
    series = [Series("spent", points)]
    high = max(value for _, value in points)
    if planned is not None:
        series.append(Series("budget", [(points[0][0], float(planned)), (points[-1][0], float(planned))], faint=True))
        high = max(high, float(planned))
    drawn = pages.lines(series, x="round", y="epsilon", y_range=(0.0, 1.06 * high))
    told = f"epsilon {epsilon_digits(points[-1][1])} in the end"
    return pages.section("Budget over the rounds", pages.figure(told, drawn))


def _charts(run: TrainingRecord, names: Mapping[str, str]) -> list[str]:
    drawn = []
    for name, words in names.items():
        points = run.course(name)
        if points:
            high = 1.06 * max(value for _, value in points)
            chart = pages.lines([Series(words, points)], x="round", y=words, y_range=(0.0, high or 1.0))
            drawn.append(pages.figure(words, chart))
    return drawn


def _expert_load(run: TrainingRecord) -> str:
    series = [Series(words, run.course(name)) for name, words in _RELEASED.items() if run.course(name)]
    if not series:
        return ""
    values = [value for each in series for _, value in each.points]
    high, low = 1.06 * max(*values, 1.0), min(0.0, 1.06 * min(values))
    drawn = pages.lines(series, x="round", y="times an even share", y_range=(low, high))
    last = ", ".join(f"{each.name} {each.points[-1][1]:.2f}" for each in series)
    return pages.section(
        "Expert load, released within the budget",
        pages.figure(f"times an even share, smoothed, noise included; the last values: {last}", drawn),
    )


def _time(run: TrainingRecord) -> str:
    whole = run.course("seconds")
    if not whole:
        return ""
    total = sum(value for _, value in whole)
    rows = []
    for name, words in _TIMES.items():
        spent = sum(value for _, value in run.course(name))
        if spent:
            rows.append((words, f"{spent / len(whole):.3f}", f"{100 * spent / total:.1f} %"))
    high = 1.06 * max(value for _, value in whole)
    drawn = pages.lines([Series("a round", whole)], x="round", y="seconds", y_range=(0.0, high))
    return pages.section(
        "Time",
        pages.figure(f"{total:.1f} s over {len(whole)} rounds", drawn),
        pages.table(Table("where it went", ("", "seconds a round", "share"), tuple(rows))),
    )


def _memory(run: TrainingRecord) -> str:
    named = {
        "model_state_bytes": "model, gradients, optimiser state",
        "peak_rss_bytes": "largest size of the process",
    }
    shown = {words: data_size(float(run.result[name])) for name, words in named.items() if name in run.result}
    return pages.section("Memory", pages.pairs(shown)) if shown else ""


def _bytes(run: TrainingRecord) -> str:
    wire: Mapping[str, Mapping[str, int]] = run.result.get("wire") or run.status.get("wire") or {}
    rows = [
        (peer, *(data_size(float(counts[name])) for name in ("sent", "tensors_sent", "received", "tensors_received")))
        for peer, counts in wire.items()
    ]
    columns = ("peer", "sent", "tensors in it", "received", "tensors in it ")
    tensors = sum(counts["tensors_sent"] for counts in wire.values())
    sent = sum(counts["sent"] for counts in wire.values())
    ratio = f"; {sent / tensors:.3f} bytes for each byte of tensors sent" if tensors else ""
    return pages.section("Bytes", pages.table(Table(f"over mutual TLS{ratio}", columns, tuple(rows)))) if rows else ""


def _known(run: TrainingRecord) -> dict[str, str]:
    known = {
        "run": run.marker.get("run"),
        "party": run.party,
        "federation": run.status.get("federation"),
        "agreement": run.marker.get("agreement"),
        "coterie": _made_by(run.marker),
        "noise multiplier": run.privacy.get("noise_multiplier"),
        "isolation": run.privacy.get("isolation"),
        "revealed": run.privacy.get("revealed"),
        "revealed to": ", ".join(run.privacy.get("revealed_to", [])),
    }
    return {
        name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in known.items() if value
    }


def _made_by(marker: Mapping[str, Any]) -> str:
    version, built = marker.get("coterie"), marker.get("revision")
    return f"{version}, commit {built}" if built else str(version or "")


def _statement(run: TrainingRecord) -> str:
    statement = str(run.result.get("statement") or "")
    return pages.section("Statement", pages.preformatted(statement)) if statement else ""


def _json(path: Path) -> dict[str, Any]:
    """Empty when the file is not there or not readable as such."""
    try:
        return dict(json_object(path.read_bytes()))
    except (OSError, ValueError):
        return {}
