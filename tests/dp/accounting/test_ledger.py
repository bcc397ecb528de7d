"""The ledger never under-reports: crashes, torn lines, tampering, rollback, several processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.accounting.ledger import FILE, Ledger, LedgerHead, default_root, open_ledger
from coterie.dp.accounting.lifetime import ledgers_under
from coterie.errors import LedgerError

DATASET = "d" * 64
MECHANISM = Mechanism(1.0, 0.1)


def started(tmp_path: Path, rounds: int = 100, run: str = "run-a") -> Ledger:
    ledger = open_ledger(DATASET, tmp_path)
    ledger.start_run(run, MECHANISM, rounds)
    return ledger


def release(ledger: Ledger, number: int, run: str = "run-a", draw: int = 0) -> None:
    ledger.record_release(run, number, draw, f"digest {run} {number} {draw}", {})


def test_entries_survive_reopening_and_chain(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    release(ledger, 1)
    again = open_ledger(DATASET, tmp_path)
    assert [e.kind for e in again.entries()] == ["dataset", "run", "release"]
    assert [e.seq for e in again.entries()] == [0, 1, 2]
    assert again.releases("run-a")[0].digest == "digest run-a 1 0"


def test_invariant_8_lifetime_composes_all_runs_and_burned_rounds(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    for number in (1, 2):
        release(ledger, number)
    ledger.record_burned("run-a", 2, 0, "weights changed")
    release(ledger, 2, draw=1)
    other = Mechanism(2.0, 0.05)
    ledger.start_run("run-b", other, 10)
    release(ledger, 1, "run-b")
    assert ledger.spent("run-a", 1e-5).epsilon == epsilon([(MECHANISM, 3)], 1e-5)
    assert ledger.spent("run-b", 1e-5).epsilon == epsilon([(other, 1)], 1e-5)
    assert ledger.lifetime(1e-5).epsilon == epsilon([(MECHANISM, 3), (other, 1)], 1e-5)


def test_seeded_runs_have_no_epsilon_and_are_named(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    ledger.start_run("trial", MECHANISM, 5, seeded=True)
    assert ledger.seeded_runs() == []
    release(ledger, 1, "trial")
    release(ledger, 1)
    assert ledger.seeded_runs() == ["trial"]
    assert ledger.spent("trial", 1e-5).epsilon == math.inf
    assert ledger.lifetime(1e-5).epsilon == epsilon([(MECHANISM, 1)], 1e-5)


def test_invariant_8_one_lot_never_gets_two_results(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    release(ledger, 1)
    release(ledger, 1)
    assert len(ledger.releases("run-a")) == 1
    with pytest.raises(LedgerError, match="already noised with another result"):
        ledger.record_release("run-a", 1, 0, "other digest", {})


def test_more_releases_than_planned_are_refused(tmp_path: Path) -> None:
    ledger = started(tmp_path, rounds=2)
    release(ledger, 1)
    release(ledger, 1, draw=1)
    with pytest.raises(LedgerError, match="has no release left for round 2"):
        release(ledger, 2)
    with pytest.raises(LedgerError, match="has no release left"):
        release(ledger, 1, run="never started")


def test_a_run_keeps_the_numbers_it_started_with(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    ledger.start_run("run-a", MECHANISM, 100)
    with pytest.raises(LedgerError, match="with other settings"):
        ledger.start_run("run-a", Mechanism(0.9, 0.1), 100)
    with pytest.raises(LedgerError, match="run run-z is not in this dataset's ledger"):
        ledger.run("run-z")


def test_a_run_that_a_later_version_takes_up_is_the_same_run(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    ledger.start_run("run-b", MECHANISM, 5, seeded=True, coterie="0.1.0", revision="a")
    ledger.start_run("run-b", MECHANISM, 5, seeded=True, coterie="0.2.0", revision="b")
    assert (ledger.run("run-b")["coterie"], ledger.run("run-b")["revision"]) == ("0.1.0", "a")
    with pytest.raises(LedgerError, match="with other settings"):
        ledger.start_run("run-b", MECHANISM, 5, seeded=False, coterie="0.2.0", revision="b")


@pytest.mark.parametrize("keep", [1, 30, -1])
def test_torn_last_line_was_never_released_and_is_written_over(tmp_path: Path, keep: int) -> None:
    ledger = started(tmp_path)
    release(ledger, 1)
    path = ledger.folder / FILE
    whole = path.read_bytes()
    release(ledger, 2)
    torn = path.read_bytes()[len(whole) :][:keep]
    path.write_bytes(whole + torn)
    again = open_ledger(DATASET, tmp_path)
    assert [r.round for r in again.releases("run-a")] == [1]
    release(again, 3)
    assert [r.round for r in open_ledger(DATASET, tmp_path).releases("run-a")] == [1, 3]


def test_tampered_chain_is_refused(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    for number in (1, 2, 3):
        release(ledger, number)
    path = ledger.folder / FILE
    lines = path.read_bytes().splitlines(keepends=True)
    edited = json.loads(lines[3])
    edited["data"]["round"] = 7
    for bad in (
        [*lines[:3], *lines[4:]],
        [*lines[:3], (json.dumps(edited) + "\n").encode(), *lines[4:]],
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [*lines, b"not json\n"],
        [*lines, lines[-1]],
        [*lines, b"\0" * 100 + b"\n"],
    ):
        path.write_bytes(b"".join(bad))
        with pytest.raises(LedgerError, match="the ledger is not what was written"):
            open_ledger(DATASET, tmp_path)


def test_ledger_that_shrinks_or_vanishes_in_use_is_refused(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    old = (ledger.folder / FILE).read_bytes()
    release(ledger, 1)
    (ledger.folder / FILE).write_bytes(old)
    with pytest.raises(LedgerError, match="shorter while in use"):
        release(ledger, 2)
    (ledger.folder / FILE).unlink()
    with pytest.raises(LedgerError, match="disappeared while in use"):
        release(ledger, 2)


def test_invariant_8_rollback_is_noticed_by_hosts_and_by_checkpoints(tmp_path: Path) -> None:
    ledger = started(tmp_path / "live")
    release(ledger, 1)
    shutil.copytree(tmp_path / "live", tmp_path / "backup")
    release(ledger, 2)
    ledger.check_not_behind("run-a", 2)
    ledger.check_contains(ledger.head())
    rolled_back = open_ledger(DATASET, tmp_path / "backup")
    rolled_back.check_not_behind("run-a", 1)
    with pytest.raises(LedgerError, match="has received round 2, the ledger ends at round 1"):
        rolled_back.check_not_behind("run-a", 2)
    with pytest.raises(LedgerError, match="does not hold entry 3"):
        rolled_back.check_contains(ledger.head())
    release(rolled_back, 9)
    with pytest.raises(LedgerError, match="does not hold entry 3"):
        rolled_back.check_contains(ledger.head())
    rolled_back.check_contains(LedgerHead(1, ledger.entries()[1].hash))


def test_ledger_of_another_dataset_is_refused(tmp_path: Path) -> None:
    ledger = started(tmp_path)
    with pytest.raises(LedgerError, match="belongs to another dataset"):
        Ledger(ledger.folder, "e" * 64)


def test_full_disk_stops_before_anything_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = started(tmp_path)
    real = os.write

    def full(handle: int, data: bytes) -> int:
        real(handle, bytes(data)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LedgerError, match="could not be extended: No space left on device"):
        release(ledger, 1)
    monkeypatch.undo()
    release(ledger, 2)
    assert [r.round for r in open_ledger(DATASET, tmp_path).releases("run-a")] == [2]


def test_a_ledger_whose_first_entry_found_no_room_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path)

    def full(handle: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LedgerError, match="could not be extended: No space left on device"):
        open_ledger("e" * 64, tmp_path)
    monkeypatch.undo()
    assert [ledger.dataset for ledger in ledgers_under(tmp_path)] == [DATASET]
    open_ledger("e" * 64, tmp_path)
    assert len(list(ledgers_under(tmp_path))) == 2


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot be made"):
        open_ledger(DATASET, tmp_path / "file")


WRITER = """
import sys
from pathlib import Path
from coterie.dp.accounting.ledger import open_ledger
from coterie.dp.accounting.accountant import Mechanism
root, run = Path(sys.argv[1]), sys.argv[2]
ledger = open_ledger("d" * 64, root)
ledger.start_run(run, Mechanism(1.0, 0.1), 50)
for number in range(1, 41):
    ledger.record_release(run, number, 0, f"{run} {number}", {})
"""


@pytest.mark.slow
def test_two_processes_on_one_ledger_lose_nothing(tmp_path: Path) -> None:
    runs = ["one", "two"]
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), run]) for run in runs]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    ledger = open_ledger(DATASET, tmp_path)
    assert all([r.round for r in ledger.releases(run)] == list(range(1, 41)) for run in runs)
    assert len(ledger.entries()) == 1 + 2 + 80


def test_default_place_is_outside_run_folders_and_configurable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTERIE_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert default_root() == Path("/somewhere/coterie/ledger")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_root() == Path.home() / ".local/share/coterie/ledger"
    monkeypatch.setenv("COTERIE_HOME", "/state")
    assert default_root() == Path("/state/ledger")


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere", None])
def test_without_a_home_that_can_be_written_ledgers_live_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    for name in ("COTERIE_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is None:
        monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    else:
        monkeypatch.setenv("HOME", home)
        monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith("/proc"))
    assert default_root(tmp_path / "run") == tmp_path / ".coterie" / "ledger"
    with pytest.raises(LedgerError, match="has no place") as caught:
        default_root()
    assert caught.value.code == "dp-ledger-home"


def test_a_ledger_that_lies_in_a_home_that_became_read_only_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COTERIE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = tmp_path / ".local" / "share" / "coterie" / "ledger"
    kept.mkdir(parents=True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert default_root(tmp_path / "elsewhere" / "run") == kept


def test_files_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    ledger = started(tmp_path / "new")
    assert (ledger.folder / FILE).stat().st_mode & 0o077 == 0
    assert ledger.folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_nobody_else_sees_which_data_sets_have_ledgers(tmp_path: Path, mask: int) -> None:
    """A ledger's folder is named by its data set's digest, which lets others test a guess of the whole text."""
    before = os.umask(mask)
    try:
        open_ledger("d" * 64, tmp_path / "home" / "ledger")
    finally:
        os.umask(before)
    made = [tmp_path / "home", *(tmp_path / "home").rglob("*")]
    assert {path.stat().st_mode & 0o077 for path in made} == {0}
