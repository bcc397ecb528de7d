"""The page of `coterie dashboard`: where runs are, read from their folders, while they go on.

A federation's processes, a party's and the coordinator's, tell about themselves in status.json; a party and
`coterie train` also leave their metrics. What was computed on private text without noise is marked so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from coterie import pages
from coterie.audit.report.training_page import TrainingRecord, load_charts, training_charts
from coterie.config import TrainConfig, load_yaml
from coterie.dp.accounting.digits import epsilon_digits
from coterie.errors import CheckpointError, CoterieError
from coterie.federation.rounds.run_folder import is_running, read_status
from coterie.pages import Table
from coterie.pages.amounts import data_size, duration
from coterie.storage import json_object

FOOTER = (
    "Made by `coterie dashboard` on this machine, for whoever may read these folders; nothing is sent anywhere. "
    "Losses, lot sizes and loads were computed on private text without noise."
)
_RECENT = 10
"""Rounds whose typical length tells how long the rest will take."""


@dataclass(frozen=True)
class LiveRun:
    """One run folder as it is now.

    Attributes:
        folder: where it lies.
        status: of a federation's process; empty for a run of one party alone.
        training: losses and other metrics; None before the first round, and for a coordinator.
        planned: rounds in all; None where it is not known.
        running: a process holds the folder.
    """

    folder: Path
    status: Mapping[str, Any]
    training: TrainingRecord | None
    planned: int | None
    running: bool

    @classmethod
    def read(cls, folder: Path) -> LiveRun:
        """What a run folder says.

        Raises:
            CheckpointError: it is the folder of no run (code ``run-dir-none``).
        """
        status = _status(folder)
        try:
            training: TrainingRecord | None = TrainingRecord.read(folder)
        except CheckpointError as error:
            if error.code == "run-dir-none" and not status and not is_running(folder):
                raise
            training = None
        planned = status.get("rounds") or _planned(folder)
        return cls(folder, status, training, planned, is_running(folder))

    @property
    def title(self) -> str:
        """Who it is."""
        if self.status.get("role") == "coordinator":
            return f"{self.status.get('federation', 'federation')}, coordinator"
        if self.status:
            return f"{self.status.get('federation', 'federation')}, {self.status.get('party', 'party')}"
        return "run " + "/".join(self.folder.resolve().parts[-2:])

    @property
    def done(self) -> int:
        """Rounds that are finished."""
        made = self.training.rounds if self.training else 0
        return max(made, int(self.status.get("committed") or 0))

    @property
    def left_s(self) -> float | None:
        """Seconds that the remaining rounds will take, by the typical length of the last ones; None: not known."""
        seconds = self.training.course("seconds") if self.training else []
        if not self.running or not seconds or self.planned is None:
            return None
        return median(value for _, value in seconds[-_RECENT:]) * max(0, self.planned - self.done)

    def sentence(self) -> str:
        """Where it is, in a line."""
        of = f" of {self.planned}" if self.planned else ""
        told = f"{self.title}: {self.done}{of} rounds"
        ending = self.status.get("ending") or ("finished" if self._finished else "")
        if ending:
            return f"{told}; {ending}."
        if not self.running:
            return f"{told}; not running{self._last_seen()}."
        left = self.left_s
        rest = "" if left is None else f"; about {duration(left)} left"
        waiting = [*self.status.get("missing", []), *self.status.get("waiting_for", [])]
        late = f"; waiting for {', '.join(dict.fromkeys(waiting))}" if waiting else ""
        return f"{told}{rest}{late}."

    @property
    def _finished(self) -> bool:
        return bool(self.training and self.training.result.get("finished"))

    def _last_seen(self) -> str:
        at = self.status.get("at")
        return f", last seen {duration(max(0.0, time.time() - float(at)))} ago" if at else ""


def live_page(runs: Sequence[LiveRun], refresh_s: int) -> str:
    """All runs as one HTML page that renews itself.

    Args:
        runs: in the order in which they are shown.
        refresh_s: seconds until the browser asks again.
    """
    return pages.page(
        "coterie dashboard",
        [run.sentence() for run in runs],
        [part for run in runs for part in _parts(run)],
        footer=FOOTER,
        refresh_s=refresh_s,
    )


def _parts(run: LiveRun) -> list[str]:
    training = run.training
    return [
        pages.section(run.title, pages.pairs(_facts(run)), pages.table(_members(run))),
        *([training_charts(training)] if training else []),
        *([load_charts(training)] if training else []),
    ]


def _facts(run: LiveRun) -> dict[str, str]:
    status = run.status
    privacy = (run.training.privacy if run.training else None) or status.get("privacy") or {}
    known = {
        "folder": run.folder.name,
        "phase": status.get("phase") if run.running else None,
        "attempt": status.get("attempt") or None,
        "newest checkpoint": status.get("checkpoint"),
        "last event": status.get("note"),
        "no connection": ", ".join(f"{one} and {other}" for one, other in status.get("cut", [])),
        "coordinator silent": duration(status["coordinator_silent_s"]) if _silent(run) else None,
        "certificate": status.get("certificate"),
        "budget of this party": _budget(privacy),
    }
    return {name: str(value) for name, value in known.items() if value not in (None, "")}


def _silent(run: LiveRun) -> bool:
    return run.running and float(run.status.get("coordinator_silent_s") or 0.0) >= 1.0


def _budget(privacy: Mapping[str, Any]) -> str:
    if not privacy:
        return ""
    spent = privacy.get("epsilon")
    told = "nothing bounds it" if spent is None else f"epsilon {epsilon_digits(float(spent))} spent"
    planned = (privacy.get("budget") or {}).get("epsilon")
    of = f" of {float(planned):g}" if planned is not None and spent is not None else ""
    left = f", {privacy['rounds_left']} releases left" if "rounds_left" in privacy else ""
    ended = "; it is spent, the party only hosts" if privacy.get("contributing") is False else ""
    return f"{told}{of} at delta {float(privacy['delta']):g}{left}{ended}"


def _members(run: LiveRun) -> Table:
    status = run.status
    wire: Mapping[str, Mapping[str, int]] = status.get("wire") or {}
    names = [*status.get("parties", []), *(["coordinator"] if "coordinator" in wire else [])]
    rows = [(name, _state(status, name), *_bytes(wire.get(name))) for name in names]
    columns = ("who", "state", "sent to", "received from") if wire else ("who", "state")
    title = "the federation" if run.running else "the federation, as it was last seen"
    return Table(title, columns, tuple(row[: len(columns)] for row in rows))


def _state(status: Mapping[str, Any], name: str) -> str:
    if name == status.get("party"):
        return "this party"
    if name in status.get("refused", {}):
        return f"turned away ({status['refused'][name]})"
    for field, words in (
        ("absent", "gone; the others go on"),
        ("missing", "missing"),
        ("waiting_for", "late: the others wait"),
    ):
        if name in status.get(field, []):
            return words
    return "here"


def _bytes(counts: Mapping[str, int] | None) -> tuple[str, str]:
    if counts is None:
        return "–", "–"
    return data_size(counts["sent"]), data_size(counts["received"])


def _status(folder: Path) -> Mapping[str, Any]:
    try:
        return read_status(folder)
    except CheckpointError:
        return {}


def _planned(folder: Path) -> int | None:
    """Rounds of a run of one party alone, as it was started or made longer."""
    try:
        agreed = load_yaml(folder / "config.yaml", TrainConfig).train.rounds
        marker = folder / "run.json"  # not there before the first checkpoint
        return int(json_object(marker.read_bytes()).get("rounds", agreed)) if marker.is_file() else agreed
    except (CoterieError, OSError, ValueError):
        return None
