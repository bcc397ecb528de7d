"""Disks that are full or read-only, clocks that jump, too few descriptors."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from record import RECORD
from trial import ENDLESS, Trial

from coterie.federation.identity.certificates import COORDINATOR
from helpers.federation_processes import PARTIES, make_folder
from helpers.forked import ForkedProcesses

PART = "Machine"
pytestmark = pytest.mark.faults
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")


@contextmanager
def small_disk(path: Path, *options: str) -> Iterator[None]:
    """A disk of 8 MiB of its own at ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(("size=8m", *options)), "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> Path:
    """Leave not a byte."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return filler


@needs_root
@pytest.mark.parametrize("whose", ["a party", "the coordinator"])
def test_full_disk_ends_the_run_in_one_sentence_and_it_goes_on_once_there_is_room(
    processes: ForkedProcesses, whose: str
):
    name, folder = ("cedar", "cedar/run") if whose == "a party" else (COORDINATOR, "runs/coordinator")
    path = processes.folder / folder
    processes.folder.mkdir()
    with small_disk(path):
        trial = Trial(processes)
        filler = fill(path)
        code = processes.running[name].wait(120)
        assert code == 1
        said = processes.log(name)
        assert "No space left on device" in said or "disk is full" in said, said
        filler.unlink()
        before = trial.committed()
        processes.running.pop(name)
        trial.again(name)
        trial.goes_on(max(0, before - 2))
        processes.end()
    RECORD.tried(PART, f"the disk of {whose} full", "one sentence; started again with room it goes on")


@needs_root
def test_read_only_run_folder_is_one_sentence(processes: ForkedProcesses):
    make_folder(processes.folder)
    with small_disk(processes.folder / "cedar/run", "ro"):
        processes.up("cedar")
        assert processes.running["cedar"].wait(120) == 1
    said = processes.log("cedar")
    assert "Read-only file system" in said, said
    assert "Traceback" not in said
    RECORD.tried(PART, "a run folder on a read-only disk", "refused at start, in one sentence")


def test_clock_that_jumps_disturbs_nobody(processes: ForkedProcesses):
    trial = Trial(processes)
    for days in (400, -400):
        trial.kill("cedar")
        before = trial.committed()
        trial.start_with("cedar", f"clock {days}", 2)
        trial.goes_on(before + 6)
        RECORD.tried(PART, f"a party's clock jumps by {days} days", "rounds go on")
    assert "cedar" not in trial.all.status()["missing"]
    trial.no_traceback()


def test_too_few_descriptors_are_refused_at_start_and_a_low_soft_limit_is_raised(processes: ForkedProcesses):
    make_folder(processes.folder, train=ENDLESS)
    processes.start("cedar", "up", "cedar/party.yaml", limits={"RLIMIT_NOFILE": (128, 256)})
    assert processes.running["cedar"].wait(120) == 1
    assert "Error descriptors-few" in processes.log("cedar")
    processes.start(COORDINATOR, "coordinator", "federation.yaml", limits={"RLIMIT_NOFILE": (256, 1024)})
    for name in PARTIES:
        processes.start(name, "up", f"{name}/party.yaml", limits={"RLIMIT_NOFILE": (256, 1024)})
    processes.until(lambda status: status["committed"] >= 3)
    limits = Path(f"/proc/{processes.running['alder'].pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "open files" in line).split()[3:5] == ["1024", "1024"]
    RECORD.tried(PART, "few descriptors allowed", "refused at start, or the soft limit is raised")
