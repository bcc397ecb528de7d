"""Figures of a run over its rounds: JSONL for programs, TensorBoard for people, both for the owner's eyes.

Trackers are handed the same lines and pass on what may leave.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from coterie.storage import json_object, write_whole, writing
from coterie.training.trackers import Trackers


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and ``tensorboard/`` in a run folder.

    Args:
        run_dir: the folder, which exists.
        finished: rounds that count. What was written for later ones, by an attempt that got further than its last
            checkpoint, is dropped; before the first round, everything is.
        trackers: hear what of it may leave.
    """

    def __init__(self, run_dir: Path, *, finished: int = 0, trackers: Trackers | None = None) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._trackers = trackers
        with writing(self.path):
            self._keep(finished)
            self._lines = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=finished + 1 if finished else None)

    def log(self, round_no: int, **metrics: float) -> None:
        """Write one line: the round, counted from 1 (0: before the first), and its metrics. Not finite becomes null.

        Raises:
            CheckpointError: the disk is full or broken.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with writing(self.path):
            self._lines.write(json.dumps({"round": round_no, **finite}) + "\n")
            self._lines.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, round_no)
        if self._trackers is not None:
            self._trackers.log(round_no, metrics)

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, finished: int) -> None:
        if not self.path.exists():
            return
        kept = [
            row
            for row in read_metrics(self.path.parent)
            if isinstance(at := row.get("round"), int | float) and 0 <= at <= finished and finished > 0
        ]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """The lines of a run's metrics.jsonl; a last line that was cut short by a crash is left out."""
    rows = []
    for line in (run_dir / "metrics.jsonl").read_bytes().split(b"\n"):
        try:
            rows.append(json_object(line))
        except ValueError:
            break
    return rows
