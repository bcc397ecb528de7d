"""A member's files, fetched in chunks: what came before an interruption is kept, what changed is found by its digest.

Names and sizes come from the manifest, whose digests the roster will hold; they are looked at before a byte is
written, since whoever sends them chooses them.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coterie.errors import ModelError, TransportError
from coterie.federation.enrolment.asking import PartsDesk
from coterie.federation.enrolment.hand_out import parts_of
from coterie.federation.wire.frame import CHUNK_BYTES
from coterie.models.split.shards import MANIFEST_FILE, TRUNK_FILE, read_manifest, shard_file
from coterie.storage import file_digest, sync_file, sync_folder, write_all, write_whole

_NAME = re.compile(r"(model/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}")
_AGAIN_S = 1.0

Fetched = Callable[[str, int, int], None]
"""Called with a file's name, its bytes so far, and all of them."""


def fetch_parts(desk: PartsDesk, member: str, folder: Path, shown: Fetched, *, patience_s: float) -> dict[str, Any]:
    """Bring a member's files and the manifest into ``folder``; those that are there already stay.

    Args:
        desk: that hands them out.
        member: who fetches.
        folder: for them; made where it is missing.
        shown: hears how far it is.
        patience_s: how long the other side may be silent before this gives up; what came is kept then.

    Returns:
        The manifest.

    Raises:
        ModelError: the manifest is none or lacks a part of this member, the disk has too little room, or a file is
            not what the manifest says.
        TransportError: the other side does not answer any more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MANIFEST_FILE, desk.manifest())
    manifest = read_manifest(folder)
    wanted = parts_of(member, manifest["files"])
    missing_parts = sorted({TRUNK_FILE, shard_file(member)} - set(wanted))
    if missing_parts:
        raise ModelError(
            f"The split model that the inviter hands out has no {' and no '.join(missing_parts)}.",
            code="join-no-part",
            why="it was split for other parties",
            fix="ask the inviter for the folder that `coterie split` wrote for this federation.yaml",
        )
    for name in wanted:
        _check_entry(name, manifest["files"][name])
    missing = {
        name: manifest["files"][name] for name in wanted if not _is_there(folder / name, manifest["files"][name])
    }
    _check_room(folder, missing)
    for name, entry in missing.items():
        _fetch(desk, name, entry, folder / name, shown, patience_s)
    return manifest


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    size, digest = entry.get("bytes"), entry.get("sha256")
    if (
        not _NAME.fullmatch(name)
        or not isinstance(size, int)
        or size < 0
        or not re.fullmatch(r"[0-9a-f]{64}", str(digest))
    ):
        raise ModelError(
            "The manifest that the inviter sent names a file that no split model has.",
            code="join-manifest",
            why="it would be written outside the folder for parts, or could not be checked",
            fix="ask the inviter for a folder that `coterie split` of this version wrote",
        )


def _is_there(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_digest(path) == entry["sha256"]


def _check_room(folder: Path, missing: Mapping[str, Mapping[str, Any]]) -> None:
    needed = sum(int(entry["bytes"]) - _size(_partial(folder / name, entry)) for name, entry in missing.items())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"The parts need {needed:,} more bytes in {folder}, and {free:,} are free.",
            code="join-disk",
            fix="make room there, then run the same command again: it goes on where it was",
        )


def _partial(path: Path, entry: Mapping[str, Any]) -> Path:
    """Where a file grows: another name for other content, so that what changed meanwhile is not mixed."""
    return path.with_name(f".{path.name}.{entry['sha256'][:16]}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(
    desk: PartsDesk, name: str, entry: Mapping[str, Any], path: Path, shown: Fetched, patience_s: float
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, size = _partial(path, entry), int(entry["bytes"])
    until = time.monotonic() + patience_s
    while True:
        before = _size(aside)
        try:
            _append(desk, name, aside, size, shown)
            break
        except TransportError as error:
            if _size(aside) > before:
                until = time.monotonic() + patience_s
            elif time.monotonic() >= until:
                raise TransportError(
                    f"The inviter stopped answering after {_size(aside):,} of {size:,} bytes of {name}.",
                    code="join-interrupted",
                    where=error.message,
                    fix="run the same command again: it goes on with the next chunk",
                ) from None
            time.sleep(_AGAIN_S)
    if _size(aside) != size or file_digest(aside) != entry["sha256"]:
        aside.unlink(missing_ok=True)
        raise ModelError(
            f"{name} is not what the manifest says, after all of it came.",
            code="join-changed-file",
            why="parties would start from different weights",
            fix="ask the inviter whether the file changed since the split; the same command fetches it anew",
        )
    sync_file(aside)
    os.replace(aside, path)
    sync_folder(path.parent)


def _append(desk: PartsDesk, name: str, aside: Path, size: int, shown: Fetched) -> None:
    """Go on with a file from its last whole chunk."""
    whole = _size(aside) // CHUNK_BYTES
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(handle, whole * CHUNK_BYTES)
        here = os.lseek(handle, 0, os.SEEK_END)
        for chunk in desk.chunks(name, whole):
            here += len(chunk)
            if here > size:
                break
            write_all(handle, chunk)
            shown(name, here, size)
    finally:
        os.close(handle)
