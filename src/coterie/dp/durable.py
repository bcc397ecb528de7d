"""Files that survive a crash: written aside, synced, renamed, folder synced; and locks between processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coterie.errors import LedgerError


def sync_folder(folder: Path) -> None:
    """Make names created, renamed or removed in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_private_folder(folder: Path) -> None:
    """Create ``folder`` and its parents, readable by its owner alone, durably."""
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        path.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would leave them open to others
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of ``path`` durable."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes) -> None:
    """``path`` holds ``content`` afterwards, or what it held before; never a part."""
    aside = path.with_name(path.name + ".part")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(aside, path)
    sync_folder(path.parent)


def remove_durably(path: Path) -> None:
    """``path`` is gone, also after a crash."""
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file ``path``, against other processes and other threads.

    Raises:
        BlockingIOError: somebody holds it and ``wait`` is False.
        LedgerError: the file system has no locks.
    """
    handle = lock(path, wait=wait)
    try:
        yield
    finally:
        os.close(handle)


def lock(path: Path, *, wait: bool) -> int:
    """A file handle that holds the lock until it is closed; see `locked`. Not inherited by child programs."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError as error:
        os.close(handle)
        raise LedgerError(
            f"{path} cannot be locked: {error.strerror}.",
            code="dp-ledger-lock",
            why="two processes could each count only their own share of the privacy spent",
            fix="keep the ledger on a local disk",
        ) from error
    return handle
