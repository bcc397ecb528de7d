"""Processes end when asked, in seconds at most, and with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coterie.cli.stopping import LAST_S, stop_signals
from coterie.demonstration.processes import LIFELINE
from helpers.waiting import until

PREFACE = (
    "import signal, sys, threading, time\nfrom coterie.cli import stopping\n"
    # A test run in the background ignores these, and what it starts would, too.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
)
ASKED = "with stopping.stop_signals(lambda: True):\n    print('ready', flush=True)\n"
STUCK = (
    "while True:\n    try:\n        print('ready', flush=True)\n        time.sleep(60)\n"
    "    except KeyboardInterrupt:\n        pass\n"
)
"""Work that cannot be interrupted, as a wait inside a library may be; ready only where it catches what interrupts."""


Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts code in a process of its own and waits until it is ready; kills what is left at the end."""
    with ExitStack() as stack:

        def started(code: str) -> subprocess.Popen[str]:
            process = subprocess.Popen([sys.executable, "-c", PREFACE + code], stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return process

        yield started


def gone_within(process: subprocess.Popen[str], seconds: float) -> int:
    try:
        return process.wait(seconds)
    finally:
        process.kill()
        process.wait()


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with stop_signals(lambda: asked.append(1) or True):  # type: ignore[func-returns-value]
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen = []

    def work() -> None:
        with stop_signals(lambda: True):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGHUP]])
@pytest.mark.parametrize("granted", [True, False])
def test_work_that_never_ends_is_ended(signals: list[int], granted: bool, start: Start) -> None:
    code = f"with stopping.stop_signals(lambda: {granted}):\n"
    process = start(code + "".join(f"    {line}\n" for line in STUCK.splitlines()))
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    assert gone_within(process, LAST_S + 20) == 128 + signals[-1]


def test_a_first_ctrl_c_leaves_all_the_time_that_the_round_takes(start: Start) -> None:
    process = start(ASKED + "    time.sleep(6)\nprint('whole')\n")
    process.send_signal(signal.SIGINT)
    assert gone_within(process, 20) == 0


def test_work_that_ends_in_time_is_not_cut_off_while_it_reports(start: Start) -> None:
    process = start(ASKED + "    time.sleep(1)\ntime.sleep(5)\n")
    process.send_signal(signal.SIGTERM)
    assert gone_within(process, 20) == 0


def test_a_terminal_that_may_be_closed_stays_ignored(start: Start) -> None:
    code = (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nwith stopping.stop_signals(lambda: False):\n"
        "    print('ready', flush=True)\n    time.sleep(1)\n"
    )
    process = start(code)
    process.send_signal(signal.SIGHUP)
    assert gone_within(process, 20) == 0


def test_a_request_during_the_first_imports_is_not_lost(start: Start) -> None:
    code = (
        "import coterie.cli.app as app\n"
        "class Slow:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'coterie.cli.models':\n            print('ready', flush=True); time.sleep(30)\n"
        "sys.meta_path.insert(0, Slow())\nsys.argv = ['coterie', 'models']\napp.main()\n"
    )
    process = start(code)
    process.send_signal(signal.SIGTERM)
    assert gone_within(process, 20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_started_ends_with_the_one_that_started_it(tmp_path: Path, how: int, start: Start) -> None:
    child = f"{PREFACE}with stopping.ending_on_request():\n    print('ready', flush=True)\n    time.sleep(60)\n"
    parent = (
        f"import os, subprocess\nhere, held = os.pipe()\n"
        f"process = subprocess.Popen([sys.executable, '-c', {child!r}], pass_fds=(here,), start_new_session=True,\n"
        f"    env={{**os.environ, {LIFELINE!r}: str(here)}}, stdout=subprocess.PIPE)\n"
        f"process.stdout.readline()\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(process.pid))\n"
        f"print('ready', flush=True)\ntime.sleep(60)\n"
    )
    process = start(parent)
    pid = int((tmp_path / "pid").read_text())
    process.send_signal(how)
    process.wait()
    until(lambda: not alive(pid), LAST_S + 20)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
