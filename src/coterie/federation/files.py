"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from coterie.errors import CheckpointError, IdentityError

PRIVATE = 0o600
PUBLIC = 0o644


def write_whole(path: Path, content: bytes, mode: int = PUBLIC) -> None:
    """Write aside, sync, rename: a reader sees the old file or the new one, a crash leaves no torn one.

    The file has ``mode`` from its first byte on, so a private key is never readable by others.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask took or left
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a disk that is full, read-only or broken becomes one clear sentence.

    Raises:
        CheckpointError: ``checkpoint-write``, with the file and the operating system's reason.
    """
    try:
        yield
    except (OSError, SafetensorError, sqlite3.OperationalError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CheckpointError(
            f"{path} cannot be written: {reason}.",
            code="checkpoint-write",
            why="what is not on the disk would be lost in the next crash",
            fix="make room on that disk or mend its permissions, then start again: published checkpoints are kept",
        ) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that appears under its real name when the block ends well, and not at all otherwise.

    Raises:
        IdentityError: ``folder`` exists and is not empty; nothing in it is touched.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise IdentityError(
            f"{folder} exists already and is not empty.",
            code="identity-exists",
            why="keys that are in use would be overwritten",
            fix="name another folder, or move the old one away",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    aside.mkdir(mode=0o700)
    try:
        yield aside
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder.parent)
