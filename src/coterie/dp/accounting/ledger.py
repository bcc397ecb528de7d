"""The durable record of privacy spent on one dataset, by all runs, trials and failures on it.

A folder per dataset, outside run folders, holds ``ledger.jsonl``: one line an entry, each with the hash of the one
before. A line is written and synced before the bytes it speaks of may leave the process, so a crash can only leave
the ledger ahead of what was released, never behind. Nothing in it derives from a record's content except the
dataset's digest; beside it lie keyed hashes of documents, by which runs on some of the same text find each other.

Kinds of entries: ``dataset`` (the first), ``run`` (a run and its mechanism, fixed in advance), ``texts`` (which keyed
hashes are those of its documents), ``release`` (noised bytes that may have been sent: this is what costs), ``burned``
(a release that will not be used; it still costs), ``revealed`` (the text itself was shown to others).

No kind is ever removed or changes its meaning; what costs anything new gets a new kind, or a new format. A version
that meets a format, a kind or a field it does not know refuses the ledger: skipped, it would read as less spent.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from coterie.dp.accounting.accountant import Accountant, Mechanism, check_mechanism, epsilon
from coterie.dp.accounting.budget import Spent
from coterie.dp.accounting.lifetime import MERGED, lifetime, units_differ
from coterie.dp.accounting.overlap import RecordedRun, compare, counted
from coterie.dp.accounting.texts import FOLDER, Keyring, Originals, fingerprints, store
from coterie.dp.noise.pooled import PooledNoise, contributors_in
from coterie.errors import LedgerError
from coterie.storage import check_keys, check_known, json_object, locked, make_private_folder, sync_folder, write_all

FILE = "ledger.jsonl"
_FORMAT = 1
_FIELDS = {
    "dataset": {"format", "digest"},
    "run": {"run", "mechanism", "rounds"},
    "texts": {"run", "key", "file"},
    "release": {"run", "round", "draw", "digest", "pins"},
    "burned": {"run", "round", "draw", "reason"},
    "revealed": {"run", "how"},
}
"""What an entry of each kind holds; a run's holds public facts besides."""

_SOMETIMES = {"release": {"pooled"}}
"""What it can hold, too: of a masked sum, whose noise lay in it where that was not everybody's."""

_UNITS = ("record", "user")
_OF_THE_PROCESS = ("self_check", "tensor_cores", "coterie", "revision")


def default_root(beside: Path | None = None) -> Path:
    """Where ledgers live unless told otherwise: ``ledger`` in COTERIE_HOME, else in the user's data folder (XDG).

    A service account may have no home, or one that cannot be written. Then they live beside the run.

    Args:
        beside: the run folder; None where there is none.

    Raises:
        LedgerError: there is no such place.
    """
    named = os.environ.get("COTERIE_HOME")
    if named:
        return Path(named, "ledger")
    base = os.environ.get("XDG_DATA_HOME")
    if base:
        return Path(base, "coterie", "ledger")
    try:
        own = Path.home() / ".local" / "share" / "coterie" / "ledger"
    except RuntimeError:  # neither HOME nor an entry for this user
        own = None
    if own is not None and (own.exists() or _writable(own)):
        return own
    if beside is not None:
        return beside.absolute().parent / ".coterie" / "ledger"
    raise LedgerError(
        "This user has no home folder that can be written, so the ledger of privacy spent has no place.",
        code="dp-ledger-home",
        why="what is spent on a text has to be remembered from one run to the next",
        fix="set COTERIE_HOME to a folder that stays, or name the ledger's folder (`ledger`)",
    )


def _writable(path: Path) -> bool:
    """Whether a folder could be made: its nearest ancestor that exists is a folder this user may write to."""
    there = next(folder for folder in path.parents if folder.exists())
    return there.is_dir() and os.access(there, os.W_OK)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    seq: int
    time: str
    kind: str
    data: dict[str, Any]
    prev: str
    hash: str

    @classmethod
    def after(cls, previous: Entry | None, kind: str, data: Mapping[str, Any]) -> Entry:
        seq, prev = (previous.seq + 1, previous.hash) if previous else (0, "0" * 64)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(seq, stamp, kind, dict(data), prev, _entry_hash(seq, stamp, kind, data, prev))

    @classmethod
    def read(cls, line: bytes, previous: Entry | None, path: Path) -> Entry:
        """The entry that a line of ``path`` holds, whose place is after ``previous``.

        Raises:
            ValueError: it does not continue the chain.
            LedgerError: it does, and this version does not know what it says.
        """
        try:
            values = json_object(line)
            if previous is None:  # first of all: a later format may chain its entries in another way
                check_known(path, "format", values["data"]["format"], {_FORMAT}, LedgerError)
            entry = cls(*(values[name] for name in ("seq", "time", "kind", "data", "prev", "hash")))
            if not entry.follows(previous):
                raise ValueError("not the next entry")
            entry.check(f"{path}, line {entry.seq + 1}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("not an entry") from error
        return entry

    def check(self, where: str) -> None:
        """Make sure that this version knows what it says.

        Raises:
            KeyError: something is missing.
            LedgerError: it does not.
        """
        check_known(where, "kind", self.kind, _FIELDS, LedgerError)
        needed, found = _FIELDS[self.kind], self.data.keys()
        if needed - found:
            raise KeyError(*needed - found)
        if self.kind == "run":
            check_mechanism(self.data["mechanism"], where)
            check_known(where, "unit", self.data.get("unit", "record"), _UNITS, LedgerError)
        else:
            known = needed | _SOMETIMES.get(self.kind, set())
            check_keys(where, f"field of a `{self.kind}`", found, known, LedgerError)
        if self.kind == "release" and "pooled" in self.data:
            check_keys(where, "field of `pooled`", self.data["pooled"], {"parties", "colluding"}, LedgerError)
            PooledNoise.from_json(self.data["pooled"])

    def line(self) -> bytes:
        return json.dumps(self.__dict__, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    def follows(self, previous: Entry | None) -> bool:
        """Whether it continues the chain unchanged."""
        seq, prev = (previous.seq + 1, previous.hash) if previous else (0, "0" * 64)
        own = _entry_hash(self.seq, self.time, self.kind, self.data, self.prev)
        return (self.seq, self.prev, self.hash) == (seq, prev, own)


def _seeded(entry: Entry) -> bool:
    return bool(entry.data.get("seeded"))


def _fixed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without what speaks of the process that started the run, and not of what the run costs."""
    return {name: value for name, value in facts.items() if name not in _OF_THE_PROCESS}


def _entry_hash(seq: int, stamp: str, kind: str, data: Mapping[str, Any], prev: str) -> str:
    text = json.dumps([seq, stamp, kind, data, prev], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class LedgerHead:
    """The newest entry at some moment: lets a checkpoint notice that a ledger was put back to an older copy."""

    seq: int
    hash: str


@dataclass(frozen=True)
class Released:
    """A release as the ledger knows it.

    Attributes:
        draw: counts the lots drawn for one round, from 0.
        pooled: whose noise lay in its sum, where that was not all parties' that the run's entry speaks of.
    """

    run: str
    round: int
    draw: int
    digest: str
    pins: dict[str, str]
    pooled: PooledNoise | None = None


class Ledger:
    """Reads and extends one dataset's ledger; safe for several threads and processes at once.

    Args:
        folder: the dataset's folder; see `open_ledger`.
        dataset: digest of the dataset; must be the one the ledger was started with.

    Raises:
        LedgerError: the chain is broken, the ledger belongs to another dataset, or its disk refuses.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder = folder
        self.dataset = dataset
        self._path = folder / FILE
        self._thread_lock = threading.Lock()
        self._entries: list[Entry] = []
        self._runs: dict[str, Entry] = {}
        self._releases: dict[str, dict[tuple[int, int], Released]] = {}
        self._revealed: dict[str, Entry] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self._offset = 0
        try:
            make_private_folder(folder)
        except OSError as error:
            raise LedgerError(
                f"the ledger's folder {folder} cannot be made: {error.strerror}.",
                code="dp-ledger-write",
                why="nothing may be released that no ledger counts",
                fix="name a folder you may write to: `privacy.ledger`, or ledger=... in Python",
            ) from error
        with self._current():
            if not self._entries:
                self._append("dataset", {"format": _FORMAT, "digest": dataset})
                sync_folder(folder)
        started_with = self._entries[0].data.get("digest")
        if self._entries[0].kind != "dataset" or started_with != dataset:
            raise LedgerError(
                f"{self._path} belongs to another dataset ({str(started_with)[:12]}, not {dataset[:12]}).",
                code="dp-ledger-dataset",
                why="privacy spent on these records would be added to others'",
                fix="let coterie choose the folder, or name the folder that this dataset's ledger is in",
            )

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Inside, everything that is on disk is known, and no other thread or process adds to it."""
        with self._thread_lock, locked(self.folder / "ledger.lock", LedgerError):
            self._catch_up()
            yield

    def public_name(self) -> str:
        """What this ledger is called where others may read it; see `Keyring.public_name`."""
        place = self.folder.parent
        if place.parent.name == MERGED:  # as where it was counted, in the statements that were made there
            return Keyring(place.parent.parent).public_name(self.dataset, place.name.partition("-")[0])
        return Keyring(place).public_name(self.dataset)

    def entries(self) -> tuple[Entry, ...]:
        """Everything in the ledger now, other processes' entries included."""
        with self._current():
            return tuple(self._entries)

    # -- runs ----------------------------------------------------------------------------------------------------

    def start_run(self, run: str, mechanism: Mechanism, rounds: int, **facts: Any) -> None:
        """Fix a run's mechanism and its number of rounds, before anything is released.

        Args:
            run: identifier, unique on this dataset.
            mechanism: of every round.
            rounds: largest number of releases; burned ones count.
            facts: public facts for statements, JSON values.

        Raises:
            LedgerError: the run exists already with other numbers.
        """
        data = {"run": run, "mechanism": mechanism.to_json(), "rounds": rounds, **facts}
        with self._current():
            known = self._runs.get(run)
            if known is None:
                self._append("run", data)
            elif _fixed(known.data) != {name: json.loads(json.dumps(data)).get(name) for name in _fixed(known.data)}:
                raise LedgerError(
                    f"run {run} is in the ledger with other settings.",
                    code="dp-ledger-run",
                    where=str(self._path),
                    why="noise, sampling rate and number of rounds are fixed in advance",
                    fix="resume it with the settings it was started with, or start a new run",
                )

    def record_texts(self, run: str, originals: Originals) -> None:
        """Keep keyed hashes of a run's documents, under every key of the folder, so that other runs know them again.

        Args:
            run: a run, or what `record_revealed` was told.
            originals: its documents.
        """
        for name, key in Keyring(self.folder.parent).keys().items():
            with self._current():
                if name not in self._texts.get(run, {}):
                    file = store(self.folder, fingerprints(originals, key))
                    self._append("texts", {"run": run, "key": name, "file": file})

    def runs(self) -> list[RecordedRun]:
        """All runs, with what they released, and all showings of text."""
        with self._current():
            merged = self.folder.parent.parent.name == MERGED
            runs = [(run, entry.data) for run, entry in self._runs.items()]
            shown: list[tuple[str, dict[str, Any]]] = [(run, {}) for run in self._revealed]
            return [
                RecordedRun(
                    run,
                    self.dataset,
                    facts,
                    frozenset((r.round, r.draw, r.digest) for r in self._releases.get(run, {}).values()),
                    {key: self.folder / FOLDER / file for key, file in self._texts.get(run, {}).items()},
                    merged,
                )
                for run, facts in (*runs, *shown)
            ]

    def run(self, run: str) -> dict[str, Any]:
        """What was fixed when the run started.

        Raises:
            LedgerError: no such run.
        """
        entry = self._known_runs().get(run)
        if entry is None:
            raise LedgerError(
                f"run {run} is not in this dataset's ledger.",
                code="dp-ledger-behind",
                where=str(self._path),
                why="what the run has already released would not be counted",
                fix="use the ledger folder (and the dataset) that the run was started with",
            )
        return entry.data

    def record_release(self, run: str, round_no: int, draw: int, digest: str, pins: Mapping[str, str]) -> None:
        """Count noised bytes as released. Call it when they are spooled and synced, and before they are used.

        Args:
            run: started with `start_run`.
            round_no: from 1.
            draw: which lot of this round, from 0.
            digest: of the noised bytes.
            pins: what they were computed from (weights, roster, membership epoch...), as digests.

        Raises:
            LedgerError: this lot already has another noised result, or more releases than planned.
        """
        data = {"run": run, "round": round_no, "draw": draw, "digest": digest, "pins": dict(pins)}
        with self._current():
            mine = self._releases.get(run, {})
            known = mine.get((round_no, draw))
            if known is not None and known.digest == digest:
                return
            if known is not None:
                raise LedgerError(
                    f"round {round_no} of run {run} was already noised with another result.",
                    code="dp-two-results",
                    where=str(self._path),
                    why="the difference of two noised results of one lot would cancel privacy",
                    fix="use the spooled bytes, or burn the round so that a new lot is drawn",
                )
            planned = self._runs.get(run)
            if planned is None or len(mine) >= planned.data["rounds"]:
                raise LedgerError(
                    f"run {run} has no release left for round {round_no}.",
                    code="dp-ledger-full",
                    where=str(self._path),
                    why="the number of rounds was fixed in advance",
                    fix="start a new run with a new budget",
                )
            law, agreed = len(contributors_in(pins)), PooledNoise.from_json(planned.data.get("pooled"))
            if law and agreed is not None and law != agreed.parties:
                data["pooled"] = agreed.among(law).to_json()
            self._append("release", data)

    def record_burned(self, run: str, round_no: int, draw: int, reason: str) -> None:
        """Note that a release will not be used. It keeps counting."""
        with self._current():
            self._append("burned", {"run": run, "round": round_no, "draw": draw, "reason": reason})

    def record_revealed(self, run: str, how: str) -> None:
        """Note that a run shows the text itself to others. From then on no epsilon holds for the dataset.

        Args:
            run: whatever names it; a second entry for it is not made.
            how: ``tokens``, for example.
        """
        with self._current():
            if run not in self._revealed:
                self._append("revealed", {"run": run, "how": how})

    def revealed(self) -> list[str]:
        """Runs that showed the text itself to others."""
        with self._current():
            return list(self._revealed)

    def private_runs(self) -> list[str]:
        """Runs that released something and promised an epsilon for it."""
        return [run for run, entry in self._known_runs().items() if not _seeded(entry) and self._releases.get(run)]

    def releases(self, run: str) -> list[Released]:
        """All releases of a run, burned ones included, in order."""
        with self._current():
            return list(self._releases.get(run, {}).values())

    # -- what it adds up to ----------------------------------------------------------------------------------------

    def spent(self, run: str, delta: float, accountant: Accountant = "pld") -> Spent:
        """What one run has spent. Infinite for a seeded run that released anything."""
        return self._spent([run], delta, accountant)

    def lifetime(self, delta: float, run: str | None = None, accountant: Accountant = "pld") -> Spent:
        """What all private runs on some of the same text have spent together.

        Args:
            delta: the same for all.
            run: whose text, and for whose unit; see `coterie.dp.accounting.lifetime`. None: all runs of this dataset
                alone, which must protect the same unit.
            accountant: see `coterie.dp.accounting.accountant`.

        Raises:
            LedgerError: no run is named, and runs protect different units; a ledger beside this one is damaged.
        """
        if run is not None:
            self.run(run)
            return lifetime(self, run, delta, accountant).spent
        if self.revealed():
            return Spent(float("inf"), delta)
        private = [recorded for recorded in self.runs() if recorded.facts and not recorded.seeded]
        for first, second in pairwise(private):
            counted_as = counted(first, second, compare(first, second))
            if (counted_as.size, counted_as.replaced) != (1, False):
                raise units_differ(self)
        return self._spent([recorded.run for recorded in private], delta, accountant)

    def seeded_runs(self) -> list[str]:
        """Runs that were not private and released something: no epsilon holds for what they made."""
        return [run for run, entry in self._known_runs().items() if _seeded(entry) and self._releases.get(run)]

    def _known_runs(self) -> dict[str, Entry]:
        with self._current():
            return dict(self._runs)

    def _spent(self, runs: list[str], delta: float, accountant: Accountant) -> Spent:
        known, events = self._known_runs(), []
        for run in runs:
            count = len(self._releases.get(run, {}))
            if count and _seeded(known[run]):
                return Spent(float("inf"), delta)
            if count:
                events.append((Mechanism.from_json(known[run].data["mechanism"]), count))
        return Spent(epsilon(events, delta, accountant), delta)

    # -- rollback ---------------------------------------------------------------------------------------------------

    def head(self) -> LedgerHead:
        """The newest entry, to be kept elsewhere (a checkpoint, a host)."""
        last = self.entries()[-1]
        return LedgerHead(last.seq, last.hash)

    def check_contains(self, head: LedgerHead) -> None:
        """Make sure that this ledger still holds what it held when ``head`` was taken.

        Raises:
            LedgerError: it is an older copy, or another one.
        """
        entries = self.entries()
        if head.seq >= len(entries) or entries[head.seq].hash != head.hash:
            raise LedgerError(
                f"the ledger does not hold entry {head.seq}, which a checkpoint has seen.",
                code="dp-ledger-behind",
                where=str(self._path),
                why="it is an older copy or another ledger: privacy already spent would be forgotten",
                fix="put the newest ledger back; a ledger must never be restored from a backup",
            )

    def check_not_behind(self, run: str, round_no: int) -> None:
        """Make sure that the ledger knows of every round that somebody else has received.

        Args:
            run: identifier.
            round_no: the last round a host says it received from us; 0 if none.

        Raises:
            LedgerError: the ledger is behind, so it was rolled back.
        """
        last = max((release.round for release in self.releases(run)), default=0)
        if round_no > last:
            raise LedgerError(
                f"a host has received round {round_no}, the ledger ends at round {last}.",
                code="dp-ledger-behind",
                where=str(self._path),
                why="it is an older copy: privacy already spent would be forgotten, and a lot noised twice",
                fix="put the newest ledger back; a ledger must never be restored from a backup",
            )

    # -- the file ---------------------------------------------------------------------------------------------------

    def _add(self, entry: Entry, size: int) -> None:
        """Take an entry that is on disk into memory."""
        data = entry.data
        if entry.kind == "run":
            self._runs[data["run"]] = entry
        elif entry.kind == "release":
            pooled = PooledNoise.from_json(data.get("pooled"))
            released = Released(data["run"], data["round"], data["draw"], data["digest"], data["pins"], pooled)
            self._releases.setdefault(data["run"], {})[(data["round"], data["draw"])] = released
        elif entry.kind == "texts":
            self._texts.setdefault(data["run"], {})[data["key"]] = data["file"]
        elif entry.kind == "revealed":
            self._revealed[data["run"]] = entry
        self._entries.append(entry)
        self._offset += size

    def _catch_up(self) -> None:
        """Read and check the lines that were added since, by whatever process. Only inside `_current`."""
        if not self._path.exists():
            if self._entries:
                raise self._broken("it has disappeared while in use")
            return
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                raise self._broken("it has become shorter while in use")
            file.seek(self._offset)
            new = file.read()
        for line in new.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                # The crash of a writer: the entry was never synced, so nothing was released on its strength.
                return
            try:
                entry = Entry.read(line, self._entries[-1] if self._entries else None, self._path)
            except ValueError:
                raise self._broken(f"line {len(self._entries) + 1} does not continue the chain") from None
            self._add(entry, len(line))

    def _append(self, kind: str, data: Mapping[str, Any]) -> None:
        """Add an entry; it is on disk when this returns. Only inside `_current`.

        Raises:
            LedgerError: it could not be written and synced. Nothing may be released then.
        """
        entry = Entry.after(self._entries[-1] if self._entries else None, kind, json.loads(json.dumps(data)))
        entry.check(str(self._path))  # what would be refused when it is read is not written
        line = entry.line()
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.ftruncate(handle, self._offset)  # what a torn line left behind
                os.lseek(handle, self._offset, os.SEEK_SET)
                write_all(handle, line)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if not self._entries:  # nothing was ever counted here, and a file without a line would stop other ledgers
                self._path.unlink(missing_ok=True)
            raise LedgerError(
                f"the ledger could not be extended: {error.strerror}.",
                code="dp-ledger-write",
                where=str(self._path),
                why="nothing may be released that the ledger does not hold",
                fix="free disk space or repair the disk, then resume the run",
            ) from error
        self._add(entry, len(line))

    def _broken(self, what: str) -> LedgerError:
        return LedgerError(
            f"the ledger is not what was written: {what}.",
            code="dp-ledger-tampered",
            where=str(self._path),
            why="privacy already spent may be missing from it, so no statement can be made",
            fix="put back the ledger as it was; if that is impossible, treat the dataset's budget as spent",
        )


def open_ledger(dataset: str, root: Path | str | None = None) -> Ledger:
    """The ledger of the dataset with this digest, created on first use.

    Args:
        dataset: see `coterie.dp.accounting.dataset.dataset_digest`.
        root: folder that holds the ledgers of all datasets; default `default_root`.
    """
    return Ledger(ledger_folder(dataset, root), dataset)


def existing_ledger(folder: Path) -> Ledger:
    """The ledger in a folder, whichever dataset's it is.

    Raises:
        LedgerError: there is none, or it is damaged.
    """
    try:
        with (folder / FILE).open("rb") as file:
            dataset = str(Entry.read(file.readline(), None, folder / FILE).data["digest"])
    except (OSError, ValueError, KeyError) as error:
        raise LedgerError(
            f"{folder / FILE} is not a ledger.",
            code="dp-ledger-tampered",
            why="privacy already spent may be missing, so no statement can be made",
            fix="put it back as it was",
        ) from error
    return Ledger(folder, dataset)


def ledger_folder(dataset: str, root: Path | str | None = None) -> Path:
    """Where the ledger of a dataset is, if it has one."""
    return Path(root or default_root()).expanduser() / dataset[:24]
