"""What lies on disk: files and folders that are there whole or not at all, locks, digests, and formats.

Everything is written under a name of its own that ends in ``.part``, synced, renamed, and the folder synced: whoever
looks sees what was there before or what is there now, and a crash or a power cut at any moment leaves one of the two.
What ends in ``.part`` is nobody's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from coterie.errors import CheckpointError, CoterieError

PRIVATE = 0o600
PUBLIC = 0o644
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Refused in the middle of a write, without a name."""
_ASIDE, _BEFORE = ".part", ".old"

# -- files -------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, mode: int | None = None, *, synced: bool = True) -> Iterator[Path]:
    """A name to write to; what is there when the block ends well takes the place of ``path``.

    Args:
        path: whatever else happens, it stays as it was.
        mode: of the file from its first byte on, so that a key is never readable by others; None: as the umask says.
        synced: durable afterwards. Without it a power cut may leave the file empty.

    Raises:
        OSError: what the system refused, by the name of ``path``.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_ASIDE}")
    try:
        if mode is not None:
            _create(aside, mode)
        yield aside
        if synced:
            sync_file(aside)
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        refused = _refused(error, aside)
        if refused is None:
            raise
        raise OSError(refused, os.strerror(refused), str(path)) from error
    if synced:
        sync_folder(path.parent)


def _refused(error: BaseException, aside: Path) -> int | None:
    """The system's number for what it refused while this file was written; None where it was something else."""
    if not isinstance(error, OSError) or str(error.filename) == str(aside):
        return system_error(error)
    return error.errno if error.errno in _OF_DISKS else None


def system_error(error: BaseException) -> int | None:
    """The operating system's number for what it refused; None where it was something else.

    Libraries written in Rust (safetensors, tokenizers) have it in their words alone, the second in a bare Exception.
    """
    if isinstance(error, SafetensorError) or type(error) is Exception:
        number = re.search(r"os error (\d+)", str(error))
        return int(number[1]) if number else None
    return error.errno if isinstance(error, OSError) else None


def disk_refusal(error: BaseException) -> CheckpointError | None:
    """One sentence for a disk that is full, read-only or broken, where no place of the code expected it to be.

    None where it was something else.
    """
    refused = system_error(error)
    if refused not in (*_OF_DISKS, errno.EROFS):
        return None
    return CheckpointError(
        f"A file could not be written: {os.strerror(refused)}.",
        code="file-access",
        fix="make room where the settings or options of this command write, or mend its permissions; --debug shows "
        "where it was needed",
    )


def _create(path: Path, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.fchmod(handle, mode)  # whatever the umask took or left
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes, mode: int | None = None, *, synced: bool = True) -> None:
    """``path`` holds ``content`` afterwards, or what it held before; see `replacing`."""
    with replacing(path, mode, synced=synced) as aside:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            write_all(handle, content)
        finally:
            os.close(handle)


def write_all(handle: int, content: bytes) -> None:
    """Write all of ``content``, however little the system takes at once."""
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def write_json(path: Path, values: Any) -> None:
    """``path`` holds ``values`` as JSON afterwards, or what it held before.

    Raises:
        CheckpointError: the disk is full or broken.
    """
    with writing(path):
        write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ValueError: it is no JSON, not UTF-8, nested without bound, or something else than an object.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{type(content).__name__} instead of an object")
    return content


def remove(path: Path) -> None:
    """``path`` is gone, also after a crash."""
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def clear_leftovers(folder: Path) -> None:
    """Delete what a crash left half written. Only for a folder that no other process writes to."""
    for leftover in folder.glob(f"*{_ASIDE}"):
        leftover.unlink()


def sync_file(path: Path) -> None:
    """Make the content of ``path`` durable."""
    _sync(path, os.O_RDWR)


def sync_folder(folder: Path) -> None:
    """Make names created, renamed or removed in ``folder`` durable."""
    _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a disk that is full, read-only or broken becomes one clear sentence.

    Raises:
        CheckpointError: ``checkpoint-write``, with the file and the operating system's reason.
    """
    try:
        yield
    except Exception as error:
        if system_error(error) is None and not isinstance(
            error, OSError | SafetensorError | sqlite3.OperationalError
        ):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CheckpointError(
            f"{path} cannot be written: {reason}.",
            code="checkpoint-write",
            why="what is not on the disk would be lost in the next crash",
            fix="make room on that disk or mend its permissions, then start again: published checkpoints are kept",
        ) from error


# -- folders -----------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(folder: Path, mode: int = 0o777) -> Iterator[Path]:
    """A folder to fill that takes the place of ``folder``, all of it synced, when the block ends well.

    What a crash left of an earlier try is cleared first. A crash between the two renames at the end leaves an earlier
    ``folder`` under another name, which `restore` gives back.

    Args:
        folder: whatever else happens, it stays as it was.
        mode: of the new one, less what the umask takes.
    """
    aside, before = folder.with_name(folder.name + _ASIDE), folder.with_name(folder.name + _BEFORE)
    shutil.rmtree(aside, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside.mkdir(mode=mode)
    try:
        yield aside
        _sync_tree(aside)
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
        os.replace(aside, folder)
    except BaseException:
        restore(folder)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def is_vacant(folder: Path) -> bool:
    """Whether nothing would be lost if a new folder took this place: nothing is there, or an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


def restore(folder: Path) -> None:
    """Give ``folder`` its name back where a crash came while `new_folder` replaced it."""
    before = folder.with_name(folder.name + _BEFORE)
    if before.exists() and not folder.exists():
        os.replace(before, folder)


def put_away(folder: Path) -> None:
    """Delete ``folder``, its name first: a crash meanwhile leaves no half of it to be found."""
    gone = folder.with_name(f"{folder.name}{_BEFORE}{_ASIDE}")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def make_private_folder(folder: Path) -> None:
    """Create ``folder`` and its parents, readable by its owner alone, durably."""
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        path.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would leave them open to others
        sync_folder(path.parent)


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync_file(Path(place, name))
        sync_folder(Path(place))


# -- locks -------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, error: type[CoterieError] = CheckpointError) -> Iterator[None]:
    """Hold the lock file ``path``, against other processes and other threads; wait for it.

    Raises:
        CoterieError: of class ``error``: the file system has no locks.
    """
    handle = lock(path, wait=True, error=error)
    try:
        yield
    finally:
        os.close(handle)


def lock(path: Path, *, wait: bool, error: type[CoterieError] = CheckpointError) -> int:
    """A file handle that holds the lock until it is closed, however the process ends.

    Child programs do not inherit it. The file's content is the holder's.

    Raises:
        BlockingIOError: somebody holds it and ``wait`` is False.
        OSError: the file cannot be opened.
        CoterieError: of class ``error``: the file system has no locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError as problem:
        os.close(handle)
        raise error(
            f"{path} cannot be locked: {problem.strerror}.",
            code="no-locks",
            why="two processes could write here, each as if it were alone",
            fix="keep this folder on a local disk, or on one that has locks",
        ) from problem
    return handle


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock file ``path`` now; where there is no such file, nobody does."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


# -- formats -----------------------------------------------------------------------------------------------------


def check_known(
    where: object, what: str, found: object, known: Collection[object], error: type[CoterieError]
) -> None:
    """Refuse a file, or a part of one, that a later version may have written.

    Args:
        where: the file, and the line where there is one.
        what: ``format``, ``kind``, ``key``, ...
        found: what the file says.
        known: what this version can read. ``True`` and ``1.0`` are not 1.
        error: what is raised: the class for files of this sort.

    Raises:
        CoterieError: of class ``error``, code ``format-unknown``.
    """
    if any(type(found) is type(each) and found == each for each in known):
        return
    raise error(
        f"{where}: {what} `{str(found)[:80]}` is not known; this version of coterie knows "
        f"{', '.join(sorted(map(str, known)))}.",
        code="format-unknown",
        why="what is not understood and left out would count as if it were not there",
        fix="use the version of coterie that wrote it, or a newer one; nothing in it was changed",
    )


def check_keys(
    where: object, what: str, found: Iterable[str], known: Collection[str], error: type[CoterieError]
) -> None:
    """`check_known` for each name in ``found``: keys of a file, or of a part of one. Some may be missing."""
    for name in sorted(set(found) - set(known)):
        check_known(where, what, name, known, error)
