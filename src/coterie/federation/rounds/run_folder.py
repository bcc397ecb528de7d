"""The folder of a running process: one process at a time, and a status file that others may read."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coterie.errors import CheckpointError, RoundError
from coterie.federation.rounds.state import State
from coterie.ranks.ranks import Ranks, ranks_or_alone
from coterie.storage import is_locked, json_object, lock, write_whole, writing

STATUS_FILE = "status.json"
LOCK_FILE = ".lock"


class RunFolder:
    """A run folder held by this process until `close`, or for a ``with`` block.

    Args:
        path: created if absent.
        ranks: that share the run, where this process holds the folder for all of them.

    The system takes the lock back when the process ends, however it ends: nothing is left to clear up after a kill.

    Raises:
        RoundError: another process holds it; the message says which.
        CheckpointError: it cannot be written.
        PrivacyError: this process is one of several that would each run on their own.
    """

    def __init__(self, path: Path, ranks: Ranks | None = None) -> None:
        ranks_or_alone(ranks)
        self.path = path
        self._writing = threading.Lock()
        self._lock = -1
        self._made = False
        try:
            while not self._taken():  # whoever held it removed the file meanwhile
                self.close()
        except BlockingIOError as error:
            raise RoundError(
                f"another process is running in {path}{_holder(path / LOCK_FILE)}.",
                code="run-busy",
                why="two processes in one folder would overwrite each other's checkpoints and spend a budget twice",
                fix="end the other one, or name another run_dir",
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        try:
            with writing(path / LOCK_FILE):
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, text.encode(), 0)
        except BaseException:
            self.close()
            raise

    def _taken(self) -> bool:
        """Lock the file, and see whether it is still the one that others would lock.

        Raises:
            BlockingIOError: another process holds it.
        """
        file = self.path / LOCK_FILE
        try:
            if not self.path.is_dir():
                self.path.mkdir(parents=True, exist_ok=True)
                self._made = True
            self._lock = lock(file, wait=False)
        except BlockingIOError:
            raise
        except OSError as error:
            with writing(self.path):
                raise error
        try:
            return os.path.samestat(os.fstat(self._lock), file.stat())
        except FileNotFoundError:
            return False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if os.listdir(self.path) == [LOCK_FILE]:  # refused before anything was begun
                (self.path / LOCK_FILE).unlink()
                if self._made:
                    self.path.rmdir()
        except OSError:  # somebody removed it, or put something there
            pass
        finally:
            self.close()

    def status(self, **fields: Any) -> None:
        """Replace the status file, from any thread. Never anything derived from data in it: no loss, no tokens."""
        text = json.dumps({"at": time.time(), **fields}, indent=2, default=str) + "\n"
        with self._writing, writing(self.path / STATUS_FILE):  # not synced: only the newest one matters, for a while
            write_whole(self.path / STATUS_FILE, text.encode(), synced=False)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _holder(file: Path) -> str:
    try:
        holder = json_object(file.read_bytes())
        return f": process {int(holder['pid'])} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def is_running(path: Path) -> bool:
    """Whether a process holds the run folder now."""
    return is_locked(path / LOCK_FILE)


def read_status(path: Path) -> dict[str, Any]:
    """The newest status a process left in its run folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        status = json_object((path / STATUS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no status of a federation's process.",
            code="status-none",
            fix="name a party.yaml, or the run folder of `coterie up` or `coterie coordinator`; `coterie dashboard` "
            "shows what a run of `coterie train` does",
        ) from error
    return status


def status_of(state: State) -> dict[str, object]:
    """The part of a status file that tells where the rounds are."""
    fields = asdict(state)
    names = ("phase", "round", "attempt", "committed", "absent", "failures", "ending", "note")
    return {name: fields[name] for name in names}
