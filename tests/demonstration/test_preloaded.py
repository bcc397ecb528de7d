"""Forks of a process that has imported everything behave as processes that were started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from coterie.demonstration.commands import Command, Fork, Preloaded
from coterie.errors import CoterieError
from helpers.forked import search_path
from helpers.waiting import until


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Preloaded]:
    held, end = os.pipe()
    environment = {**os.environ, "MARK": "marked", "PYTHONPATH": search_path()}
    made = Preloaded("helpers.told_module", tmp_path, environment, held, tmp_path / "own.log", bare=True)
    yield made
    made.close()
    os.close(held)
    os.close(end)


def command(folder: Path, *arguments: str) -> Command:
    return Command("told", arguments, folder / "told.log")


def code_of(child: Fork) -> int:
    until(lambda: child.ended() is not None)
    ended = child.ended()
    assert ended is not None
    return ended[0]


def test_a_fork_has_a_session_its_arguments_and_its_log_alone(loaded: Preloaded, tmp_path: Path) -> None:
    child = loaded.start(command(tmp_path, "one", "two words"))
    assert code_of(child) == 0
    assert (tmp_path / "told.log").read_text() == f"{child.pid} {child.pid} one two words marked True\n"
    ended = child.ended()
    assert ended is not None
    assert ended[1].peak_rss_bytes > 2**20
    assert loaded.close() > 0


def test_exit_codes_and_signals_are_told_as_of_any_process(loaded: Preloaded, tmp_path: Path) -> None:
    failed, waits = loaded.start(command(tmp_path, "fail")), loaded.start(command(tmp_path, "wait"))
    assert code_of(failed) == 3
    assert waits.ended() is None
    os.killpg(waits.pid, signal.SIGKILL)
    assert code_of(waits) == -signal.SIGKILL


def test_an_answer_that_a_signal_left_behind_is_not_taken_for_another(loaded: Preloaded, tmp_path: Path) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            loaded.start(command(tmp_path, "first"))  # the process needs longer than that to begin
    finally:
        signal.signal(signal.SIGALRM, before)
    child = loaded.start(command(tmp_path, "second"))
    assert code_of(child) == 0
    assert f"{child.pid} {child.pid} second" in (tmp_path / "told.log").read_text()


def test_a_process_that_is_gone_is_said(loaded: Preloaded, tmp_path: Path) -> None:
    os.kill(loaded.pid, signal.SIGKILL)
    with pytest.raises(CoterieError, match="has ended") as caught:
        loaded.start(command(tmp_path))
    assert caught.value.code == "demo-process"


def test_it_ends_with_the_demo_also_while_it_imports(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from coterie.demonstration.commands import Preloaded\n"
        "reads, held = os.pipe()\n"
        "print(Preloaded('helpers.told_module', Path.cwd(), os.environ, reads, Path('own.log')).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    demo = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": search_path()},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert demo.stdout is not None
    with demo.stdout:
        loading = psutil.Process(int(demo.stdout.readline()))
    until(lambda: "torch" in "".join(each.path for each in loading.memory_maps()))
    demo.kill()
    demo.wait()
    until(lambda: gone(loading), 2)


def gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
