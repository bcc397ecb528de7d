"""Figures of a run over its rounds: JSONL for programs, TensorBoard for people. Both are for the owner's eyes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from coterie.storage import json_object, write_whole, writing


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and ``tensorboard/`` in a run folder.

    Args:
        run_dir: the folder, which exists.
        first_round: where the run goes on: what was written for this round and later ones, by an attempt that got
            further than its last checkpoint, is dropped.
    """

    def __init__(self, run_dir: Path, *, first_round: int = 0) -> None:
        self.path = run_dir / "metrics.jsonl"
        with writing(self.path):
            self._keep_before(first_round)
            self._lines = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_round or None)

    def log(self, round_index: int, **figures: float) -> None:
        """Write one line: the round, counted from 0, and its figures. Not finite becomes null.

        Raises:
            CheckpointError: the disk is full or broken.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with writing(self.path):
            self._lines.write(json.dumps({"round": round_index, **finite}) + "\n")
            self._lines.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, round_index)

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _keep_before(self, first_round: int) -> None:
        if not self.path.exists():
            return
        kept = [
            row
            for row in read_metrics(self.path.parent)
            if isinstance(at := row.get("round"), int | float) and at < first_round
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
