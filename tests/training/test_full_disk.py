"""A disk that is full or broken is one clear sentence, and leaves what was there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from coterie import checkpoints, storage
from coterie.checkpoints import CheckpointStore
from coterie.errors import CheckpointError
from coterie.federation.rounds.journal import Journal
from coterie.federation.rounds.run_folder import RunFolder
from coterie.federation.rounds.state import Move, Phase, State
from coterie.storage import write_json
from coterie.training.evaluate import Evaluation
from coterie.training.metrics import MetricsWriter, read_metrics

TENSORS = {"weights": {"w": torch.arange(6.0)}}


def full(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused(write: Callable[[], object], path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        write()
    assert caught.value.code == "checkpoint-write"
    assert str(path) in caught.value.message
    assert "No space left on device" in caught.value.message or "full" in caught.value.message


def test_checkpoint_that_finds_no_room_leaves_the_older_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, run="a" * 64)
    kept = store.write(2, TENSORS, {})
    with monkeypatch.context() as patched:
        patched.setattr(storage, "sync_file", full)
        refused(lambda: store.write(4, TENSORS, {}), tmp_path / "round-00000004")
    assert store.newest() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["round-00000002"]
    store.write(4, TENSORS, {})


@pytest.mark.parametrize("kind", [SafetensorError, Exception])  # the second as tokenizers does
def test_what_a_library_of_rust_says_of_a_full_disk_is_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def no_room(*arguments: object) -> None:
        raise kind("I/O error: No space left on device (os error 28)")

    store = CheckpointStore(tmp_path, run="a" * 64)
    monkeypatch.setattr(checkpoints, "save_tensors", no_room)
    refused(lambda: store.write(4, TENSORS, {}), tmp_path / "round-00000004")


@dataclass
class FullFile:
    """A file on a full disk."""

    def write(self, text: str) -> None:
        full()


def test_figures(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        metrics.log(0, loss=1.0)
        whole, metrics._lines = metrics._lines, FullFile()  # type: ignore[assignment]
        refused(lambda: metrics.log(1, loss=1.0), tmp_path / "metrics.jsonl")
        metrics._lines = whole
    assert [row["round"] for row in read_metrics(tmp_path)] == [0]


def test_status_json_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    write_json(tmp_path / "run.json", {"run": "old"})
    monkeypatch.setattr(os, "replace", full)
    refused(lambda: folder.status(round=1), tmp_path / "status.json")
    refused(lambda: write_json(tmp_path / "run.json", {"run": "new"}), tmp_path / "run.json")
    assert "old" in (tmp_path / "run.json").read_text()
    losses = Evaluation(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64))
    with pytest.raises(CheckpointError) as caught:
        losses.save(tmp_path / "missing" / "evaluation.safetensors")
    assert caught.value.code == "checkpoint-write"
    folder.close()


def test_journal_that_finds_no_room_changes_nothing_and_can_write_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "grove", "a" * 64)
    journal.write(Move(State(seq=2, phase=Phase.COMPUTE, round=1, attempt=1)))
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages}").close()  # SQLite's own way of a full disk
    long = Move(State(seq=3, note="x" * 16000))
    refused(lambda: journal.write(long), tmp_path / "coordinator.sqlite")
    assert journal.state.seq == 2
    journal._db.execute("PRAGMA max_page_count = 100000").close()
    journal.write(long)
    assert journal.state.seq == 3
    journal.close()
    assert Journal(tmp_path, "grove", "a" * 64).state.seq == 3
