"""A run folder belongs to one process at a time, which is named, and to nobody after a kill."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.errors import CheckpointError, RoundError
from coterie.federation.rounds.run_folder import LOCK_FILE, RunFolder, is_running

HOLD = (
    "import sys, time, subprocess\nfrom pathlib import Path\n"
    "from coterie.federation.rounds.run_folder import RunFolder\n"
    "held = RunFolder(Path(sys.argv[1]))\n"
    "child = subprocess.Popen(['sleep', '30'])\n"  # outlives it, and must not hold the folder in its place
    "print(child.pid, flush=True)\ntime.sleep(60)\n"
)


def test_the_holder_is_named_and_a_killed_one_leaves_nothing_behind(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            assert is_running(tmp_path)
            with pytest.raises(RoundError, match=f"process {process.pid} on ") as caught:
                RunFolder(tmp_path)
            assert caught.value.code == "run-busy"
        finally:
            process.kill()
    assert not is_running(tmp_path)
    with RunFolder(tmp_path):
        assert is_running(tmp_path)
    os.kill(child, signal.SIGKILL)


def test_a_folder_in_which_nothing_was_begun_is_left_as_it_was(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "kept").write_text("x")
    with RunFolder(tmp_path / "new"):
        pass
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"kept", LOCK_FILE}


def test_a_lock_file_that_says_nothing_is_a_lock_all_the_same(tmp_path: Path) -> None:
    held = RunFolder(tmp_path)
    (tmp_path / LOCK_FILE).write_text("{")
    with pytest.raises(RoundError) as caught:
        RunFolder(tmp_path)
    assert caught.value.message == f"another process is running in {tmp_path}."
    held.close()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opened the file before its holder removed it would otherwise hold a lock that nobody else sees."""
    real, calls = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = RunFolder(tmp_path)
    assert len(calls) == 2
    assert is_running(tmp_path)
    with pytest.raises(RoundError):
        RunFolder(tmp_path)
    held.close()


def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match="No locks available"):
        RunFolder(tmp_path)


def test_a_folder_that_was_removed_under_a_run_hides_no_reason(tmp_path: Path) -> None:
    held = RunFolder(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    held.__exit__()
    assert not is_running(tmp_path / "run")
