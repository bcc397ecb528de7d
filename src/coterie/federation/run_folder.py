"""The folder of a running process: one process at a time, and a status file that others may read."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from coterie.errors import CheckpointError, RoundError
from coterie.federation.files import writing

STATUS_FILE = "status.json"
LOCK_FILE = ".lock"


class RunFolder:
    """A run folder held by this process until `close`.

    Raises:
        RoundError: another process holds it.
        CheckpointError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        self.path = path
        self._writing = threading.Lock()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise RoundError(
                f"another process is running in {path}.",
                code="run-busy",
                why="two processes in one folder would overwrite each other's checkpoints",
                fix="end the other one, or name another run_dir",
            ) from error

    def status(self, **fields: Any) -> None:
        """Replace the status file, from any thread. Never anything derived from data in it: no loss, no tokens."""
        text = json.dumps({"at": time.time(), **fields}, indent=2, default=str) + "\n"
        aside = self.path / f"{STATUS_FILE}.part"
        with self._writing, writing(self.path / STATUS_FILE):
            aside.write_text(text, encoding="utf-8")  # not synced: only the newest one matters, and only for a while
            os.replace(aside, self.path / STATUS_FILE)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def is_running(path: Path) -> bool:
    """Whether a process holds the run folder now."""
    try:
        lock = os.open(path / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def read_status(path: Path) -> dict[str, Any]:
    """The newest status a process left in its run folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        status = json.loads((path / STATUS_FILE).read_text(encoding="utf-8"))
        if not isinstance(status, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no status of a federation's process.",
            code="status-none",
            fix="name a party.yaml, or the run folder of `coterie up` or `coterie coordinator`",
        ) from error
    return status
