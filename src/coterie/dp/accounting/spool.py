"""Where a run keeps, on disk, the lot it is working on and the noised results it may have sent.

A lot is stored before it is computed on, so that a retry after a crash uses the same one: otherwise whether a lot is
drawn again could depend on the records in it. A noised result that others will see is stored before the ledger counts
it and before it is used; from then on only these bytes exist. One that stays in this process is written before it is
counted, too, but synced beside what comes next. A process that dies leaves it all the same; after a power cut what
was written may be no more, which its digest in the ledger tells: then its round is drawn anew. The folder is secret
(it says which records are in a lot) and is readable by its owner alone; the noise itself is never stored.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from coterie.dp.accounting.lots import Lot
from coterie.dp.accounting.release_file import pieces_digest, write_tensors
from coterie.errors import LedgerError
from coterie.storage import (
    PRIVATE,
    check_keys,
    check_known,
    clear_leftovers,
    file_digest,
    json_object,
    lock,
    make_private_folder,
    remove,
    sync_file,
    sync_folder,
    write_whole,
)

SPOOL_LIMIT_BYTES = 16 * 2**30
"""Beyond this much on disk, results are kept only as far as the newest checkpoints need them."""

_LOT_FORMAT = 1
_FORMATS = {"1": file_digest, "2": pieces_digest}
"""What may stand in the file of a result, and how its digest is taken; the newest is written."""
_LOCK, _LOT = "spool.lock", "lot.json"
_RELEASE = re.compile(r"release-(\d+)-(\d+)\.safetensors")
_UNSYNCED = re.compile(r"release-(\d+)-(\d+)\.unsynced")
_RANK = re.compile(r"rank-\d+")


Durable = Literal["first", "behind", "never"]
"""When a result outlives a power cut: before it is counted, since others will see it; soon, beside what comes next;
or never, where nobody could go on from it."""


@dataclass(frozen=True)
class Release:
    """The noised result of one round, as it lies in the spool.

    Attributes:
        round: from 1.
        draw: which lot of this round, from 0.
        digest: of the file.
        pins: what it was computed from.
        path: a safetensors file.
        shards: digests of the files of ranks 1 and on, where several ranks made it; its own file is rank 0's, and the
            release exists if and only if that does.
    """

    round: int
    draw: int
    digest: str
    pins: dict[str, str]
    path: Path
    shards: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """The noised sums in this file, float32, checked against the digest.

        Raises:
            LedgerError: the file is not what was counted.
        """
        if digest_of(self.path) != self.digest:
            raise LedgerError(
                f"{self.path.name} is not what was spooled.",
                code="dp-spool-digest",
                where=str(self.path.parent),
                why="only the bytes that the ledger counted may be used or sent",
                fix="burn the round (resume with other weights or start a new run); the ledger keeps its cost",
            )
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


@dataclass(frozen=True)
class StoredLot:
    """A lot that was drawn and not yet released."""

    draw: int
    pins: dict[str, str]
    lot: Lot


class Spool:
    """One run's spool, used by one process at a time.

    Args:
        folder: created if absent.

    Raises:
        LedgerError: another process (or another session of this one) is using it, or something in it is of a format
            that this version does not know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_private_folder(folder)
        try:
            handle = lock(folder / _LOCK, wait=False, error=LedgerError)
        except BlockingIOError as error:
            raise LedgerError(
                f"the run's spool {folder} is in use.",
                code="dp-spool-busy",
                why="two processes could noise the same lot twice",
                fix="stop the other process, or close the other session of this run",
            ) from error
        self._unlock = weakref.finalize(self, os.close, handle)
        self._behind: Future[None] | None = None
        self._behind_round = 0
        self._thread = ThreadPoolExecutor(1, "spool")
        clear_leftovers(folder)
        try:
            self._check_names()
        except LedgerError:
            self.close()
            raise

    def _check_names(self) -> None:
        """Make sure that no later version keeps here what this one would overlook."""
        for path in sorted(self.folder.glob("[!.]*")):
            if not any(known.fullmatch(path.name) for known in (_RELEASE, _UNSYNCED, _RANK)):
                check_known(self.folder, "file", path.name, {_LOCK, _LOT}, LedgerError)

    def close(self) -> None:
        """Let other processes use the spool.

        Raises:
            OSError: see `settle`.
        """
        try:
            self.settle()
        finally:
            self._thread.shutdown()
            self._unlock()

    def store_lot(self, lot: Lot, draw: int, pins: Mapping[str, str]) -> None:
        """Keep the lot until its result is released."""
        content = {"format": _LOT_FORMAT, "draw": draw, "pins": dict(pins), "lot": lot.to_json()}
        write_whole(self.folder / _LOT, json.dumps(content).encode(), PRIVATE)

    def stored_lot(self) -> StoredLot | None:
        """The lot that was drawn last, if its result was not released.

        Raises:
            LedgerError: it is damaged, or of another format.
        """
        path = self.folder / _LOT
        if not path.exists():
            return None
        with _whole(path):
            content = json_object(path.read_bytes())
            _check(path, content, {_LOT_FORMAT}, ("draw", "pins", "lot"))
            return StoredLot(int(content["draw"]), dict(content["pins"]), Lot.from_json(content["lot"]))

    def drop_lot(self) -> None:
        """Forget the stored lot."""
        remove(self.folder / _LOT)

    def path_of(self, round_no: int, draw: int) -> Path:
        """The file of a round's result."""
        return self.folder / _file_name(round_no, draw)

    def write_release(
        self,
        round_no: int,
        draw: int,
        noised: Mapping[str, Tensor],
        pins: Mapping[str, str],
        shards: Sequence[str] = (),
    ) -> Release:
        """Write noised sums into the system's memory. `keep` comes next, and decides whether a power cut takes them.

        Args:
            round_no: from 1.
            draw: which lot of this round.
            noised: by parameter name.
            pins: what they were computed from.
            shards: digests of what ranks 1 and on have written of the same result.

        Raises:
            OSError: the disk is full or broken; also where it was for the result before, see `settle`.
        """
        self.settle()
        path = self.path_of(round_no, draw)
        header = {"format": max(_FORMATS), "round": str(round_no), "draw": str(draw)}
        header["pins"] = json.dumps(dict(pins), sort_keys=True)
        if shards:
            header["shards"] = json.dumps(list(shards))
        aside = _unsynced(path)
        try:
            with _named(path):
                digest = write_tensors(aside, noised, header, PRIVATE)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return Release(round_no, draw, digest, dict(pins), path, tuple(shards))

    def keep(self, release: Release, durable: Durable) -> None:
        """Let what `write_release` wrote be found: synced first, beside whatever this thread does next, or never."""
        if durable == "behind":
            self._behind, self._behind_round = self._thread.submit(self._keep_behind, release.path), release.round
        else:
            _keep(release.path, synced=durable == "first")

    def _keep_behind(self, path: Path) -> None:
        """Of this spool, whose lock is held as long as this lasts, also where nobody closes it."""
        _keep(path)

    def settle(self) -> None:
        """Wait for what `keep` does beside this thread.

        Raises:
            OSError: the disk is full or broken. The result is counted; after a power cut its round is drawn anew.
        """
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.result()

    def releases(self, pattern: str = "release-*") -> list[Release]:
        """What lies in the spool, by round and draw.

        Raises:
            LedgerError: a result is damaged, or of another format.
        """
        found = []
        self.settle()
        for path in self.folder.glob(pattern):
            match = _RELEASE.fullmatch(path.name)
            if match:
                with _whole(path):
                    with safe_open(path, framework="pt") as file:
                        header = file.metadata()
                    _check(path, header, _FORMATS, ("round", "draw", "pins", "shards"))
                    pins = json_object(header["pins"])
                    shards = tuple(str(digest) for digest in json.loads(header.get("shards", "[]")))
                found.append(Release(int(match[1]), int(match[2]), digest_of(path), pins, path, shards))
        return sorted(found, key=lambda release: (release.round, release.draw))

    def releases_of(self, round_no: int) -> list[Release]:
        """What lies in the spool for one round."""
        pattern = f"release-{round_no:08d}-*"
        if not any(self.folder.glob(pattern)):
            return []  # without waiting for another round's
        return [release for release in self.releases(pattern) if release.round == round_no]

    def drop_releases(self, up_to_round: int, world: int = 1) -> None:
        """Remove results that everybody who needs them has stored.

        Args:
            up_to_round: from 1.
            world: ranks from this one on are none now, and what a start with more of them left goes, too.

        Raises:
            OSError: see `settle`; not of a result that is removed, which nobody needs from this disk any more.
        """
        with suppress(OSError) if self._behind_round <= up_to_round else nullcontext():
            self.settle()
        left = [folder for folder in self.folder.glob("rank-*") if int(folder.name.removeprefix("rank-")) >= world]
        for folder in (self.folder, *left):
            drop_files(folder, lambda round_no, draw: round_no <= up_to_round)

    def nbytes(self) -> int:
        """About how many bytes of results lie here."""
        found = 0
        for path in self.folder.glob("release-*"):
            with suppress(FileNotFoundError):  # it has just got its name
                found += path.stat().st_size
        return found

    def remove(self) -> None:
        """Remove lot and results: nobody will continue this run."""
        with suppress(OSError):
            self.settle()
        self.drop_lot()
        for path in self.folder.glob("release-*"):
            path.unlink()

    def drop(self, release: Release) -> None:
        """Remove one result, which will never be used; of several ranks' result the part that is here."""
        self.settle()
        remove(self.path_of(release.round, release.draw))


def drop_files(folder: Path, which: Callable[[int, int], bool]) -> None:
    """Remove results from a folder, chosen by round and draw; the folder is synced."""
    for path in folder.iterdir():
        match = _RELEASE.fullmatch(path.name) or _UNSYNCED.fullmatch(path.name)
        if match and which(int(match[1]), int(match[2])):
            path.unlink()
    sync_folder(folder)


def adopt(folder: Path, counted: Callable[[int, int], str | None]) -> None:
    """Keep those results that a process before this one had not synced and that are whole; the others are gone.

    Args:
        folder: of results that nobody else takes up.
        counted: the digest of a result as it was counted, by round and draw; None: it was not.
    """
    for path in folder.iterdir():
        match = _UNSYNCED.fullmatch(path.name)
        if match:
            place = int(match[1]), int(match[2])
            digest = counted(*place)
            if digest is not None and pieces_digest(path) == digest:
                _keep(folder / _file_name(*place))
            else:
                remove(path)


def shard_folder(spool: Path, rank: int) -> Path:
    """Where another rank than 0 puts its parts of a run's results; rank 0's lie in the run's spool itself."""
    return spool / f"rank-{rank}"


def shard_path(spool: Path, rank: int, round_no: int, draw: int) -> Path:
    """Where another rank than 0 puts its part of a result."""
    return shard_folder(spool, rank) / _file_name(round_no, draw)


def digest_of(path: Path) -> str:
    """The digest by which a ledger knows the file of a result.

    Raises:
        LedgerError: it is damaged, or of another format.
    """
    with _whole(path):
        with safe_open(path, framework="pt") as file:
            form = (file.metadata() or {}).get("format", "1")
        check_known(path, "format", form, _FORMATS.keys(), LedgerError)
        return _FORMATS[form](path)


def holds(path: Path, digest: str | None) -> bool:
    """Whether a file holds what was counted under a digest.

    Raises:
        LedgerError: it is of another format.
    """
    try:
        return digest_of(path) == digest
    except LedgerError as error:
        if error.code != "dp-spool-damaged":
            raise
        return False


def _unsynced(path: Path) -> Path:
    return path.with_suffix(".unsynced")


def _keep(path: Path, *, synced: bool = True) -> None:
    """What was written for this name has it afterwards, durably where it is synced."""
    aside = _unsynced(path)
    with _named(path):
        if synced:
            sync_file(aside)
        os.replace(aside, path)
        if synced:
            sync_folder(path.parent)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Inside, what the system refuses has the name of the result: a full disk is else told without one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _file_name(round_no: int, draw: int) -> str:
    return f"release-{round_no:08d}-{draw}.safetensors"


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Inside, a file that is not what was stored becomes one sentence."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise LedgerError(
            f"{path} is damaged.",
            code="dp-spool-damaged",
            why="only a lot as it was drawn, and the bytes that the ledger counted, may be used",
            fix="remove that file: the ledger keeps what it counted, and the round is drawn anew",
        ) from None


def _check(path: Path, content: Mapping[str, Any], forms: Collection[int | str], known: tuple[str, ...]) -> None:
    """Make sure that a stored lot or result is one of this version; the first versions did not write the format.

    Raises:
        LedgerError: it is not.
    """
    check_known(path, "format", content.get("format", min(forms)), forms, LedgerError)
    check_keys(path, "field", content.keys() - {"format"}, known, LedgerError)
