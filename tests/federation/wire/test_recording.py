"""Recording ends where it was agreed to end, says so, and never ends the training."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path

import pytest
import torch

from coterie.errors import CheckpointError
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.wire import frame_log
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.frame_log import files_in, read_entries, read_head
from coterie.federation.wire.gate import Gate
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.recording import STOPPED, Recorder
from coterie.federation.wire.transport import Address, Lane, Message

NAMES = ("birch", "cedar")


def message(round_no: int, size: int = 1000, kind: str = "dispatch") -> Message:
    return Message(kind, Address(round=round_no, attempt=1), {}, (torch.full((size,), float(round_no)),))


def keep(recorder: Recorder, round_no: int, size: int = 1000) -> None:
    recorder.keep("birch", FrameType.REQUEST, Lane.FORWARD, message(round_no, size))


def rounds(folder: Path) -> list[tuple[str, int]]:
    entries = [entry for path in files_in(folder) for entry in read_entries(path)]
    return [(entry.name, entry.frame.message.address.round) for entry in entries]


def test_only_the_first_rounds_are_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, NAMES, 2, 1 << 20)
    recorder.open({"run": "r"})
    for round_no in (0, 1, 2, 3, 2):
        keep(recorder, round_no)
    recorder.close()
    assert rounds(tmp_path) == [("birch", 0), ("birch", 1), ("birch", 2), ("birch", 2)]
    head = read_head(files_in(tmp_path)[0])
    assert head is not None
    assert head["rounds"] == 2


def test_what_came_before_the_run_had_a_name_comes_first(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t", NAMES, None, 1 << 20)
    keep(recorder, 1)
    assert not (tmp_path / "t").exists()
    recorder.open({"run": "r"})
    keep(recorder, 2)
    recorder.open({"run": "r"})
    keep(recorder, 3)
    recorder.close()
    assert rounds(tmp_path / "t") == [("birch", 1), ("birch", 2), ("birch", 3)]


def test_a_peer_cannot_fill_the_memory_before_the_run_has_a_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, NAMES, None, 1 << 30)
    held = []
    for _ in range(300):
        one = message(1, size=1)
        held.append(weakref.ref(one.tensors[0]))
        recorder.keep("birch", FrameType.REQUEST, Lane.FORWARD, one)
        del one
    assert not any(one() is not None for one in held)
    assert "does not begin" in caplog.text
    recorder.open({"run": "r"})
    keep(recorder, 1)
    assert rounds(tmp_path) == []


@pytest.mark.parametrize("limit", [6000, 20_000, 50_000])
def test_it_stops_at_its_size_and_says_in_which_round(
    limit: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, NAMES, None, limit)
    recorder.open({"run": "r"})
    with caplog.at_level(logging.WARNING):
        for round_no in range(1, 20):
            keep(recorder, round_no)
    recorder.close()
    found = rounds(tmp_path)
    *kept, (name, stopped) = found
    assert name == STOPPED
    assert [round_no for _, round_no in kept] == list(range(1, stopped))
    assert sum(path.stat().st_size for path in files_in(tmp_path)) <= limit
    (record,) = caplog.records
    assert f"stops at round {stopped}" in record.getMessage()
    assert "training goes on" in record.getMessage()


def test_a_full_disk_ends_the_recording_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, NAMES, None, 1 << 30)
    recorder.open({"run": "r"})
    keep(recorder, 1)
    whole = frame_log.write_all

    def full(handle: int, content: bytes) -> None:
        whole(handle, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frame_log, "write_all", full)
    with caplog.at_level(logging.WARNING):
        keep(recorder, 2)
        keep(recorder, 3)
    monkeypatch.undo()
    keep(recorder, 4)
    recorder.close()
    assert rounds(tmp_path) == [("birch", 1)], "the torn entry is left out, and nothing follows it"
    assert "No space left" in caplog.text


def test_another_process_goes_on_in_a_file_of_its_own(tmp_path: Path) -> None:
    for round_no in (1, 2):
        recorder = Recorder(tmp_path, NAMES, None, 1 << 20)
        recorder.open({"run": "r"})
        keep(recorder, round_no)
        recorder.close()
    assert [path.name for path in files_in(tmp_path)] == ["000001.frames", "000002.frames"]
    assert rounds(tmp_path) == [("birch", 1), ("birch", 2)]


def test_the_gate_records_requests_and_replies_of_parties_as_they_came(tmp_path: Path) -> None:
    """Also what is refused; nothing of the coordinator's."""
    hub = InProcessHub(("alder", "birch"), coordinator=COORDINATOR)
    recorder = Recorder(tmp_path, ("alder", "birch"), None, 1 << 20)
    recorder.open({"run": "r"})
    gate = Gate(hub.transport("alder"), 3, lambda: 0, lambda name, code: None, recorder)
    peer, keeper = hub.transport("birch"), hub.transport(COORDINATOR)

    def refuses(name: str, lane: Lane, request: Message) -> Message:
        raise CheckpointError("no")

    gate.start(refuses)
    peer.start(lambda name, lane, request: request.reply("counted"))
    keeper.start(lambda name, lane, request: None)
    try:
        gate.connect(10)
        with pytest.raises(CheckpointError):
            peer.request("alder", Lane.BACKWARD, message(1, 3, "surprise"), 10)
        with pytest.raises(CheckpointError):
            keeper.request("alder", Lane.CONTROL, Message("directive", Address(round=1)), 10)
        gate.request("birch", Lane.BACKWARD, Message("tokens", Address(round=1, attempt=1), {"count": 5}), 10)
    finally:
        for each in (gate, peer, keeper):
            each.close()
        recorder.close()
    entries = [entry for path in files_in(tmp_path) for entry in read_entries(path)]
    assert [(e.name, e.frame.type, e.frame.lane, e.frame.message.kind) for e in entries] == [
        ("birch", FrameType.REQUEST, Lane.BACKWARD, "surprise"),
        ("birch", FrameType.REPLY, Lane.BACKWARD, "counted"),
    ]
    assert torch.equal(entries[0].frame.message.tensors[0], torch.full((3,), 1.0))
