"""Messages kept on disk in the order in which they were appended: whole entries or none, and none that was changed.

::

    FOLDER/000001.frames    one file for each process that wrote: a line, then entries
    line                    a JSON object, a tab, its CRC
    entry (fixed)           magic, number of a name, bytes of the frame, its SHA-256, CRC of all that
    frame                   the message as on the wire (`coterie.federation.wire.frame`)

A file that ends inside an entry was cut off by a crash: what is whole counts. Anything else that does not check out
is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from coterie.errors import CheckpointError, FrameError
from coterie.federation.wire.frame import CHUNK_BYTES, Frame, FrameReader, FrameScope, FrameType, encode
from coterie.federation.wire.transport import Lane, Message
from coterie.storage import PRIVATE, check_known, json_object, make_private_folder, write_all, writing

FORMAT = "coterie-frames-1"
SUFFIX = ".frames"
_MAGIC = b"CTFL"
_FIXED = struct.Struct("<4sBBHQ32s")  # magic, lane, reserved, number of the name, bytes of the frame, SHA-256
_CRC = struct.Struct("<I")
_ENTRY_BYTES = _FIXED.size + _CRC.size
_LONGEST_HEAD = 16 << 20
_LARGEST_FRAME = 1 << 40


def scope_of(head: Mapping[str, Any]) -> FrameScope:
    """What the frames of a log carry: the run's name alone."""
    return FrameScope.of_run(str(head["run"]))


class FrameLog:
    """Appends to a new file of a folder; not for several threads at once.

    Args:
        folder: made if it is not there; nobody else reads it.
        head: what all entries of the file have in common; ``run`` is the run's name.
        names: what entries are filed under.
        limit: most bytes of all files in the folder together.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any], names: Sequence[str], limit: int) -> None:
        self._scope, self._names = scope_of(head), {name: number for number, name in enumerate(names)}
        with writing(folder):
            make_private_folder(folder)
            earlier = files_in(folder)
            self._left = limit - sum(path.stat().st_size for path in earlier)
            number = int(earlier[-1].name.removesuffix(SUFFIX)) + 1 if earlier else 1
            self.path = folder / f"{number:06d}{SUFFIX}"
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
            line = json.dumps({"format": FORMAT, "names": list(names), **head}, separators=(",", ":")).encode()
            self._write(b"%s\t%08x\n" % (line, zlib.crc32(line)))

    def append(self, name: str, frame_type: FrameType, lane: Lane, message: Message, *, spare: int = 0) -> bool:
        """Keep a message.

        Args:
            name: one of ``names``.
            frame_type: request, reply or neither.
            lane: where it came.
            message: what came.
            spare: bytes that have to stay free behind it.

        Returns:
            False: there is no room for it; nothing was written.

        Raises:
            CheckpointError: the disk is full or broken.
        """
        encoded = encode(self._scope, frame_type, lane, 0, message, max_data_bytes=_LARGEST_FRAME)
        if _ENTRY_BYTES + encoded.payload_bytes + spare > self._left:
            return False
        chunks = list(encoded.chunks())
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        fixed = _FIXED.pack(_MAGIC, lane, 0, self._names[name], encoded.payload_bytes, digest.digest())
        with writing(self.path):
            self._write(fixed + _CRC.pack(zlib.crc32(fixed)))
            for chunk in chunks:
                self._write(chunk)
        return True

    def close(self) -> None:
        """Make everything durable."""
        if self._handle >= 0:
            with writing(self.path):
                os.fsync(self._handle)
            os.close(self._handle)
            self._handle = -1

    def _write(self, content: bytes) -> None:
        write_all(self._handle, content)
        self._left -= len(content)


@dataclass(frozen=True)
class Logged:
    """One entry: what it is filed under, and the message with its lane and type."""

    name: str
    frame: Frame


def files_in(folder: Path) -> list[Path]:
    """The files of a log, oldest first."""
    return sorted(folder.glob(f"[0-9]*{SUFFIX}"))


def read_head(path: Path) -> dict[str, Any] | None:
    """The first line of a file; None where a crash cut it off.

    Raises:
        CheckpointError: it cannot be read, is damaged, or is of a later version.
    """
    with _reading(path) as file:
        return _head(path, file)


def read_entries(path: Path) -> Iterator[Logged]:
    """The entries of a file in order, each checked before it is given out.

    Raises:
        CheckpointError: ``transcript-damaged`` at the first entry that was changed; ``transcript-read``.
    """
    with _reading(path) as file:
        head = _head(path, file)
        if head is None:
            return
        scope, names, size = scope_of(head), list(head["names"]), path.stat().st_size
        while True:
            start = file.tell()
            begun = file.read(_ENTRY_BYTES)
            if len(begun) < _ENTRY_BYTES:
                return
            if not any(begun) and not any(any(rest) for rest in iter(lambda: file.read(CHUNK_BYTES), b"")):
                return  # a file system may leave zeros where a crash kept it from writing
            fixed, (crc,) = begun[: _FIXED.size], _CRC.unpack(begun[_FIXED.size :])
            magic, lane, reserved, number, length, digest = _FIXED.unpack(fixed)
            if magic != _MAGIC or crc != zlib.crc32(fixed) or reserved or number >= len(names):
                raise _damaged(path, start)
            last = start + _ENTRY_BYTES + length >= size
            try:
                frame = _read_frame(file, FrameReader(scope, Lane(lane), _LARGEST_FRAME), length, digest)
            except (FrameError, ValueError):
                frame = None
            if frame is None:
                if last:
                    return
                raise _damaged(path, start)
            yield Logged(names[number], frame)


def _read_frame(file: BinaryIO, reader: FrameReader, length: int, digest: bytes) -> Frame | None:
    """The frame, if its bytes are what was written."""
    seen, frame = hashlib.sha256(), None
    while length:
        chunk = file.read(min(length, CHUNK_BYTES))
        if not chunk:
            return None
        length -= len(chunk)
        seen.update(chunk)
        frame = reader.feed(chunk)
    return frame if seen.digest() == digest else None


def _reading(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.",
            code="transcript-read",
            fix="check the path, and that you may read the file",
        ) from error


def _head(path: Path, file: BinaryIO) -> dict[str, Any] | None:
    line = file.readline(_LONGEST_HEAD)
    if not line.endswith(b"\n"):
        if len(line) == _LONGEST_HEAD or _MAGIC in line:
            raise _damaged(path, 0)
        return None
    line, _, crc = line.rstrip(b"\n").rpartition(b"\t")
    if crc != b"%08x" % zlib.crc32(line):
        raise _damaged(path, 0)
    try:
        head = json_object(line)
    except ValueError:
        raise _damaged(path, 0) from None
    check_known(path, "format", head.get("format"), {FORMAT}, CheckpointError)
    names = head.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or "run" not in head:
        raise _damaged(path, 0)
    return head


def _damaged(path: Path, at: int) -> CheckpointError:
    return CheckpointError(
        f"{path} was changed or is damaged: what stands at byte {at} is not what was recorded.",
        code="transcript-damaged",
        why="an audit of something else than what crossed concludes nothing",
        fix="copy it again from the party that recorded it, or record another run",
    )
