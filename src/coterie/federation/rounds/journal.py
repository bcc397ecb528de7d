"""The coordinator's memory: one SQLite file that survives a crash at any point.

Write-ahead log with ``synchronous = FULL``: when `Journal.write` returns, the move is on disk as a whole. Nothing in
it comes from anybody's data: rounds, attempts, names, digests of checkpoint manifests, error codes.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coterie.errors import CheckpointError
from coterie.federation.rounds.state import History, Move, Phase, PublishedCheckpoint, State
from coterie.storage import check_keys, check_known, json_object, writing

FILE = "coordinator.sqlite"
_FORMAT = "1"
_META = ("format", "federation", "agreement", "run")
_STATE = TypeAdapter(State)
_RECORD = TypeAdapter(PublishedCheckpoint)

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


def _names(db: sqlite3.Connection) -> set[str]:
    """What was created in a database, by name; columns as ``table.column``. SQLite's own tables are left out."""
    made = db.execute("SELECT name FROM sqlite_master")
    columns = db.execute("SELECT m.name || '.' || c.name FROM sqlite_master m, pragma_table_info(m.name) c")
    return {name for (name,) in (*made, *columns) if not name.startswith("sqlite_")}


class Journal:
    """State and history of one run, on disk.

    Args:
        folder: the coordinator's run folder; made when missing.
        federation: name of the federation.
        agreement: hash of what the parties signed; another one in the file means another run.

    Raises:
        CheckpointError: the file belongs to another federation or another agreement, cannot be read, or is of a
            format that this version does not know; it is not changed then.
    """

    def __init__(self, folder: Path, federation: str, agreement: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        with self._readable():
            # Used under the coordinator's lock only, from whichever thread holds it.
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=1.0)
            try:
                self._check_format()
                self._db.execute("PRAGMA journal_mode = WAL").close()
                self._db.execute("PRAGMA synchronous = FULL").close()
                self._db.executescript(_SCHEMA)
                self.run = self._check_in(federation, agreement)
                self.state = self._read_state()
                self.history = self._read_history()
            except BaseException:
                self._db.close()
                raise

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, ValidationError, KeyError) as error:
            reason = "it holds values of another shape" if isinstance(error, ValidationError) else error
            raise CheckpointError(
                f"{self.path} cannot be used as a coordinator's journal ({reason}).",
                code="checkpoint-journal",
                fix="restore it from a copy, or name another folder with --run-dir to begin anew",
            ) from error

    def _check_format(self) -> None:
        """Before anything is written: a later version's file stays as it is."""
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() and (meta := self._meta()):
            check_known(self.path, "format", meta.get("format"), {_FORMAT}, CheckpointError)
            check_keys(self.path, "field", meta, _META, CheckpointError)
        with closing(sqlite3.connect(":memory:")) as own:
            own.executescript(_SCHEMA)
            there = _names(self._db)
            check_keys(self.path, "table or column", there, _names(own), CheckpointError)
        for table, column, kind in (("state", "state", State), ("records", "record", PublishedCheckpoint)):
            for (text,) in self._db.execute(f"SELECT {column} FROM {table}") if f"{table}.{column}" in there else ():
                self._check_fields(table, text, kind)

    def _meta(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT name, value FROM meta").fetchall())

    def _check_in(self, federation: str, agreement: str) -> str:
        meta = self._meta()
        if not meta:
            meta = {"format": _FORMAT, "federation": federation, "agreement": agreement, "run": secrets.token_hex(8)}
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        for name, now in (("federation", federation), ("agreement", agreement)):
            if meta[name] != now:
                raise CheckpointError(
                    f"{self.path} is of another run: its {name} is {meta[name][:16]}, here it is {now[:16]}.",
                    code="checkpoint-other-run",
                    why="its rounds and checkpoints do not fit what the parties signed now",
                    fix="name another folder with --run-dir to begin anew, or bring the old federation.yaml back",
                )
        run: str = meta["run"]
        return run

    def _read_state(self) -> State:
        row = self._db.execute("SELECT state FROM state").fetchone()
        return State() if row is None else _STATE.validate_json(row[0])

    def _read_history(self) -> History:
        rows = self._db.execute("SELECT record FROM records ORDER BY round").fetchall()
        attempts = self._db.execute("SELECT round, highest FROM attempts").fetchall()
        self._attempts: dict[int, int] = dict(attempts)
        return History(tuple(_RECORD.validate_json(row[0]) for row in rows), self._attempts)

    def _check_fields(self, table: str, text: str, kind: type[State | PublishedCheckpoint]) -> None:
        with suppress(ValueError):  # what is no JSON is refused where it is read
            known = [field.name for field in fields(kind)]
            check_keys(self.path, f"field of `{table}`", json_object(text.encode()), known, CheckpointError)

    def write(self, move: Move) -> None:
        """Make a move durable, then remember it. After a crash it happened wholly or not at all.

        Raises:
            CheckpointError: the disk is full or broken; nothing was changed.
        """
        with writing(self.path):
            self._write(move)
        self.state = move.state
        published = self.history.published
        if move.back_to is not None:
            published = tuple(checkpoint for checkpoint in published if checkpoint.round <= move.back_to)
        if move.published is not None:
            published = (*published, move.published)
        if move.state.phase is Phase.COMPUTE:
            self._attempts[move.state.round] = move.state.attempt
        self.history = History(published, self._attempts)

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
            if move.published is not None:
                text = _RECORD.dump_json(move.published).decode()
                self._db.execute("INSERT INTO records VALUES (?, ?, ?)", (move.published.round, text, at))
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
