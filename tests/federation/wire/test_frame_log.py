"""Messages on disk: whole entries in their order; a torn end is left out, a changed middle is refused."""

from __future__ import annotations

import stat
import zlib
from pathlib import Path

import pytest
import torch

from coterie.errors import CheckpointError
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.frame_log import FrameLog, Logged, files_in, read_entries, read_head
from coterie.federation.wire.transport import Address, Lane, Message

HEAD = {"kind": "transcript", "run": "r1"}


def message(number: int, size: int = 5) -> Message:
    tensors = (torch.arange(size, dtype=torch.float32) + number, torch.tensor([number], dtype=torch.uint8))
    return Message("dispatch", Address(round=number, attempt=1, layer=2), {"keep": True}, tensors)


def written(folder: Path, count: int = 4, limit: int = 1 << 30, size: int = 5) -> Path:
    log = FrameLog(folder, HEAD, ["birch", "cedar"], limit)
    for number in range(count):
        log.append(("birch", "cedar")[number % 2], FrameType.REQUEST, Lane.FORWARD, message(number, size))
    log.close()
    return log.path


def numbers(path: Path) -> list[int]:
    return [logged.frame.message.address.round for logged in read_entries(path)]


def test_what_was_appended_is_read_in_its_order(tmp_path: Path) -> None:
    path = written(tmp_path / "log", size=700_000)  # several chunks each
    head = read_head(path)
    assert head is not None
    assert HEAD.items() <= head.items()
    found: list[Logged] = list(read_entries(path))
    assert [logged.name for logged in found] == ["birch", "cedar", "birch", "cedar"]
    for number, logged in enumerate(found):
        assert (logged.frame.type, logged.frame.lane) == (FrameType.REQUEST, Lane.FORWARD)
        same, sent = logged.frame.message, message(number, 700_000)
        assert (same.kind, same.address, same.body) == (sent.kind, sent.address, sent.body)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(same.tensors, sent.tensors, strict=True))


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    path = written(tmp_path / "log")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_every_process_writes_a_file_of_its_own(tmp_path: Path) -> None:
    first, second = written(tmp_path, 2), written(tmp_path, 1)
    assert files_in(tmp_path) == [first, second]
    assert (numbers(first), numbers(second)) == ([0, 1], [0])


def test_wherever_a_crash_cuts_it_off_the_whole_entries_count(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    whole, starts = path.read_bytes(), []
    starts = [place for place in range(len(whole)) if whole.startswith(b"CTFL", place)]
    assert len(starts) == 3
    for cut in range(0, len(whole), 37):
        path.write_bytes(whole[:cut])
        ends = [*starts[1:], len(whole)]
        assert numbers(path) == list(range(sum(end <= cut for end in ends))), cut


def test_zeros_behind_the_last_entry_are_a_torn_end(tmp_path: Path) -> None:
    path = written(tmp_path, 2)
    path.write_bytes(path.read_bytes() + bytes(3000))
    assert numbers(path) == [0, 1]


def test_a_changed_byte_before_the_last_entry_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    whole = path.read_bytes()
    last = whole.rindex(b"CTFL")
    for place in range(0, last, 11):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(CheckpointError) as caught:
            numbers(path)
        assert caught.value.code == "transcript-damaged", place


def test_half_an_entry_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    whole = path.read_bytes()
    starts = [place for place in range(len(whole)) if whole.startswith(b"CTFL", place)]
    path.write_bytes(whole[: starts[1] + 20] + whole[starts[2] :])
    with pytest.raises(CheckpointError) as caught:
        numbers(path)
    assert caught.value.code == "transcript-damaged"


def test_it_never_grows_beyond_its_limit_counting_earlier_files(tmp_path: Path) -> None:
    first = written(tmp_path, 2)
    limit = first.stat().st_size * 2 - 1
    log = FrameLog(tmp_path, HEAD, ["birch", "cedar"], limit)
    kept = [log.append("birch", FrameType.REQUEST, Lane.FORWARD, message(n)) for n in range(3)]
    log.close()
    assert kept == [True, False, False]
    assert sum(path.stat().st_size for path in files_in(tmp_path)) <= limit


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    line, _, rest = path.read_bytes().partition(b"\n")
    later = line.rpartition(b"\t")[0].replace(b"coterie-frames-1", b"coterie-frames-9")
    path.write_bytes(b"%s\t%08x\n%s" % (later, zlib.crc32(later), rest))
    with pytest.raises(CheckpointError) as caught:
        read_head(path)
    assert caught.value.code == "format-unknown"
