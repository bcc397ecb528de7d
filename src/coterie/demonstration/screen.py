"""What the demo tells while it runs, whoever shows it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Screen(Protocol):
    """Shows the demo's progress."""

    def phase(self, number: int, of: int, name: str) -> None:
        """A new phase begins."""
        ...

    def line(self, text: str) -> None:
        """Something that stays on the screen."""
        ...

    def progress(self, text: str) -> None:
        """Something that the next call replaces."""
        ...


@dataclass
class Follow:
    """Reads the figures that runs append to their ``metrics.jsonl``, to tell how far they are together.

    Attributes:
        run_dirs: the runs.
        rounds: that each will do.
    """

    run_dirs: tuple[Path, ...]
    rounds: int

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._first: tuple[float, int] | None = None

    def text(self, extra: str = "") -> str:
        """For example ``round 60/120  loss 3.31  12 s left``; ``starting`` before the first round."""
        newest = [row for path in self.run_dirs if (row := newest_figures(path))]
        done = sum(row["round"] for row in newest)
        if not done:
            return f"starting ({time.monotonic() - self._began:.0f} s)"
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        total = self.rounds * len(self.run_dirs)
        shown = f"round {done // len(self.run_dirs)}/{self.rounds}"
        losses = [row["loss"] for row in newest if row.get("loss") is not None]
        if losses:
            shown += f"  training loss {sum(losses) / len(losses):.2f}"
        if extra:
            shown += f"  {extra}"
        since, at = self._first
        if done > at:
            shown += f"  about {(now - since) / (done - at) * (total - done):.0f} s left"
        return shown


def newest_figures(run_dir: Path) -> dict[str, Any] | None:
    """The last line of a run's figures that tells of training; None before the first round.

    A private run keeps its losses to itself under another name; what is read of it is how far it is.
    """
    path = run_dir / "private" / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and ("loss" in row or "loss_not_private" in row):
            return row
    return None


def megabytes(count: float) -> str:
    """``38 MB``: bytes as people read them."""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
