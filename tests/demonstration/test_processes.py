"""Processes of the demo end together, whatever happens."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from coterie.demonstration.processes import Command, Processes
from coterie.errors import CoterieError
from helpers.waiting import until

PYTHON = (sys.executable, "-c")
FOREVER = "import time\nprint('here', flush=True)\nwhile True: time.sleep(0.1)"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER


def script(folder: Path, name: str, code: str) -> Command:
    return Command(name, (textwrap.dedent(code),), folder / f"{name}.log")


def alive(pid: int) -> bool:
    """Whether a process is there and not just waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def said_here(log: Path) -> bool:
    """The log repeats the command, so only a line of its own counts."""
    return log.exists() and log.read_text().splitlines()[-1:] == ["here"]


def nothing() -> None:
    """No watcher."""


def test_commands_run_with_their_output_in_their_logs(tmp_path: Path) -> None:
    commands = [
        script(tmp_path, f"say{n}", f"import os; print({n}, os.environ['OMP_NUM_THREADS'])") for n in range(3)
    ]
    with Processes(tmp_path, PYTHON) as processes:
        ended = processes.run_all(commands, 2, nothing)
    assert [running.code for running in ended] == [0, 0, 0]
    assert [c.log.read_text().splitlines()[-1] for c in commands] == ["0 1", "1 1", "2 1"]
    assert all(running.usage.peak_rss_bytes > 2**20 for running in ended)
    assert processes.cpu_s > 0


def test_no_more_than_asked_run_at_once(tmp_path: Path) -> None:
    code = "import time; print(time.monotonic()); time.sleep(0.5); print(time.monotonic())"
    commands = [script(tmp_path, f"slow{n}", code) for n in range(3)]
    with Processes(tmp_path, PYTHON) as processes:
        processes.run_all(commands, 1, nothing)
    spans = sorted(tuple(map(float, c.log.read_text().splitlines()[-2:])) for c in commands)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_a_failing_process_ends_the_others_and_its_log_is_named(tmp_path: Path) -> None:
    fine = script(tmp_path, "alder", FOREVER)
    broken = script(tmp_path, "birch", "import sys; print('Error data-no-file: there is no text'); sys.exit(1)")
    with Processes(tmp_path, PYTHON) as processes, pytest.raises(CoterieError) as caught:
        processes.run_all([fine, broken], 2, nothing)
    assert caught.value.code == "demo-process"
    assert caught.value.where == str(broken.log)
    assert "birch" in caught.value.message
    assert "birch | Error data-no-file: there is no text" in str(caught.value.why)


def test_leaving_ends_even_what_ignores_a_polite_request(tmp_path: Path) -> None:
    stubborn = script(tmp_path, "stubborn", STUBBORN)
    with Processes(tmp_path, PYTHON) as processes:
        running = processes.start(stubborn)
        until(lambda: said_here(stubborn.log))
    assert running.code == -signal.SIGKILL
    assert not alive(running.process.pid)


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    parent = f"""
    import subprocess, sys
    child = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])
    print(child.pid, flush=True)
    child.wait()
    """
    command = script(tmp_path, "parent", parent)
    with Processes(tmp_path, PYTHON) as processes:
        processes.start(command)
        until(lambda: said_here(command.log))
        child = int(next(line for line in command.log.read_text().splitlines() if line.isdigit()))
        assert alive(child)
    until(lambda: not alive(child))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_demo_leaves_no_process_behind(tmp_path: Path, number: int) -> None:
    code = f"""
    import sys
    from pathlib import Path
    from coterie.demonstration.processes import Command, Processes, interrupt_on_signals
    folder = Path({str(tmp_path)!r})
    commands = [Command(f"p{{n}}", ({STUBBORN!r} if n else {FOREVER!r},), folder / f"p{{n}}.log") for n in range(2)]
    try:
        with interrupt_on_signals(), Processes(folder, (sys.executable, "-c")) as processes:
            started = [processes.start(command) for command in commands]
            print(*[running.process.pid for running in started], flush=True)
            while True: processes.run_all([], 1, lambda: None)
    except KeyboardInterrupt:
        sys.exit(130)
    """
    demo = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    pids = [int(pid) for pid in demo.stdout.readline().split()]
    until(lambda: all(said_here(tmp_path / f"p{n}.log") for n in range(2)))
    assert all(alive(pid) for pid in pids)
    os.kill(demo.pid, number)
    assert demo.wait(timeout=60) == 130
    assert not any(alive(pid) for pid in pids)
    demo.stdout.close()
