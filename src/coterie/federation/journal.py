"""The coordinator's memory: one SQLite file that survives a crash at any point.

Write-ahead log with ``synchronous = FULL``: when `Journal.write` returns, the move is on disk as a whole. Nothing in
it comes from anybody's data: rounds, attempts, names, digests of checkpoint manifests, error codes.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from pathlib import Path

from pydantic import TypeAdapter

from coterie.errors import CheckpointError
from coterie.federation.files import writing
from coterie.federation.round_state import History, Move, Phase, Record, State

FILE = "coordinator.sqlite"
_FORMAT = "1"
_STATE = TypeAdapter(State)
_RECORD = TypeAdapter(Record)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY CHECK (id = 1), state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS commits (
    round INTEGER, attempt INTEGER, seq INTEGER, at REAL, undone INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (round, attempt)
);
CREATE TABLE IF NOT EXISTS attempts (round INTEGER PRIMARY KEY, highest INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS records (round INTEGER PRIMARY KEY, record TEXT NOT NULL, at REAL);
CREATE TABLE IF NOT EXISTS changes (seq INTEGER PRIMARY KEY, at REAL, phase TEXT, round INTEGER, attempt INTEGER,
    note TEXT NOT NULL);
"""


class Journal:
    """State and history of one run, on disk.

    Args:
        folder: the coordinator's run folder; made when missing.
        federation: name of the federation.
        agreement: hash of what the parties signed; another one in the file means another run.

    Raises:
        CheckpointError: the file belongs to another federation or another agreement, or cannot be read.
    """

    def __init__(self, folder: Path, federation: str, agreement: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        try:
            # Used under the coordinator's lock only, from whichever thread holds it.
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=1.0)
            self._db.execute("PRAGMA journal_mode = WAL").close()
            self._db.execute("PRAGMA synchronous = FULL").close()
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise CheckpointError(
                f"{self.path} cannot be used as a coordinator's journal ({error}).",
                code="checkpoint-journal",
                fix="restore it from a copy, or name another folder with --run-dir to begin anew",
            ) from error
        self.run = self._check_in(federation, agreement)
        self.state = self._read_state()
        self.history = self._read_history()

    def _check_in(self, federation: str, agreement: str) -> str:
        meta = dict(self._db.execute("SELECT name, value FROM meta").fetchall())
        if not meta:
            meta = {"format": _FORMAT, "federation": federation, "agreement": agreement, "run": secrets.token_hex(8)}
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        for name, now in (("format", _FORMAT), ("federation", federation), ("agreement", agreement)):
            if meta[name] != now:
                self._db.close()
                raise CheckpointError(
                    f"{self.path} is of another run: its {name} is {meta[name][:16]}, here it is {now[:16]}.",
                    code="checkpoint-other-run",
                    why="its rounds and checkpoints do not fit what the parties signed now",
                    fix="name another folder with --run-dir to begin anew, or bring the old federation.yaml back",
                )
        return meta["run"]

    def _read_state(self) -> State:
        row = self._db.execute("SELECT state FROM state").fetchone()
        return State() if row is None else _STATE.validate_json(row[0])

    def _read_history(self) -> History:
        records = self._db.execute("SELECT record FROM records ORDER BY round").fetchall()
        attempts = self._db.execute("SELECT round, highest FROM attempts").fetchall()
        self._attempts: dict[int, int] = dict(attempts)
        return History(tuple(_RECORD.validate_json(row[0]) for row in records), self._attempts)

    def write(self, move: Move) -> None:
        """Make a move durable, then remember it. After a crash it happened wholly or not at all.

        Raises:
            CheckpointError: the disk is full or broken; nothing was changed.
        """
        with writing(self.path):
            self._write(move)
        self.state = move.state
        records = self.history.records
        if move.back_to is not None:
            records = tuple(record for record in records if record.round <= move.back_to)
        if move.record is not None:
            records = (*records, move.record)
        if move.state.phase is Phase.COMPUTE:
            self._attempts[move.state.round] = move.state.attempt
        self.history = History(records, self._attempts)

    def _write(self, move: Move) -> None:
        state, at = move.state, time.time()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if move.back_to is not None:
                self._db.execute("DELETE FROM records WHERE round > ?", (move.back_to,))
                self._db.execute("UPDATE commits SET undone = 1 WHERE round > ?", (move.back_to,))
            if move.committed:
                row = (state.committed, state.committed_attempt, state.seq, at)
                self._db.execute("INSERT INTO commits (round, attempt, seq, at) VALUES (?, ?, ?, ?)", row)
            if move.record is not None:
                text = _RECORD.dump_json(move.record).decode()
                self._db.execute("INSERT INTO records VALUES (?, ?, ?)", (move.record.round, text, at))
            if state.phase is Phase.COMPUTE:
                self._db.execute("INSERT OR REPLACE INTO attempts VALUES (?, ?)", (state.round, state.attempt))
            self._db.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (_STATE.dump_json(state).decode(),))
            row5 = (state.seq, at, str(state.phase), state.round, state.attempt, state.note)
            self._db.execute("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?)", row5)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk ends it by itself
                self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self._db.close()
