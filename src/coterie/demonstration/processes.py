"""Run `coterie` commands as processes that all end together: on success, on error, on Ctrl-C.

Each command is a process group of its own. Leaving `Processes` in any way ends what still runs: asked first
(SIGTERM), then forced (SIGKILL).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from coterie.demonstration.commands import SIGNALS, Child, Command, Fresh, Preloaded, Starter, Usage
from coterie.errors import CoterieError

POLL_S = 0.1
GRACE_S = 4.0
"""How long a process may take to end after it was asked."""
LAST_LINES = 6
_COTERIE = "coterie.cli.app"
LIFELINE = "COTERIE_LIFELINE"
"""Environment variable: the descriptor of a pipe that this process holds open while it lives. The system closes it
also after ``kill -9``, and then what was started here ends itself."""
_ENVIRONMENT = {
    # Idle compute threads sleep instead of spinning: with more processes than cores, spinning made a round of a
    # two-threaded run fifteen times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@dataclass
class Running:
    """A process that was started. ``code`` is None until it has ended; negative when a signal ended it."""

    command: Command
    process: Child
    code: int | None = None
    usage: Usage = field(default_factory=Usage)

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.code is None and (ended := self.process.ended()) is not None:
            self.code, self.usage = ended
        return self.code is not None

    def over(self) -> bool:
        """Whether it has ended, also where what forked it is gone and nobody can say how."""
        with contextlib.suppress(CoterieError):
            return self.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def signal_group(self, number: int) -> None:
        """Signal the process and whatever it started, if they are still there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Processes:
    """Everything that runs for the demo.

    Args:
        folder: working directory of the commands.
        command: how `coterie` is called; tests put something smaller here. None: it is itself, which on Linux is
            imported once for all (`coterie.demonstration.preloaded`).
    """

    def __init__(self, folder: Path, command: tuple[str, ...] | None = None) -> None:
        self._running: list[Running] = []
        self._lifeline, self._held = os.pipe()
        environment = {**os.environ, **_ENVIRONMENT, LIFELINE: str(self._lifeline)}
        self._starter: Starter
        if command is None and sys.platform == "linux":
            self._starter = Preloaded(
                _COTERIE, folder, environment, self._lifeline, folder / "logs" / "preloaded.log"
            )
        else:
            fresh = command or (sys.executable, "-P", "-m", _COTERIE)
            self._starter = Fresh(fresh, folder, environment, self._lifeline)
        self.cpu_s = 0.0

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()
        self.cpu_s += self._starter.close()
        os.close(self._held)
        os.close(self._lifeline)

    def start(self, command: Command) -> Running:
        """Start a command; its output goes to its log."""
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("ab") as log:
            log.write(f"$ {command.shown}\n".encode())
        running = Running(command, self._starter.start(command))
        self._running.append(running)
        return running

    def run_all(self, commands: Iterable[Command], at_once: int, watch: Callable[[], None]) -> list[Running]:
        """Run commands, at most ``at_once`` at a time, until all have ended well.

        Args:
            commands: in the order they are started.
            at_once: most commands that run together.
            watch: called several times a second meanwhile.

        Raises:
            CoterieError: one ended with an error. The others are ended; the message names the log to read.
        """
        waiting = list(commands)
        started: list[Running] = []
        active: list[Running] = []
        while waiting or active:
            while waiting and len(active) < at_once:
                active.append(self.start(waiting.pop(0)))
                started.append(active[-1])
            time.sleep(POLL_S)
            watch()
            active = [running for running in active if not running.poll()]
            if any(running.code for running in started):
                raise self._failure(started)
        self._forget(started)
        return started

    def stop(self) -> None:
        """End everything that still runs, with whatever it started itself."""
        for running in self._running:
            if not running.over():
                running.signal_group(signal.SIGTERM)
        self._wait(self._running, GRACE_S)
        for running in self._running:
            running.signal_group(signal.SIGKILL)
        self._wait(self._running, GRACE_S)
        self._forget(self._running)

    def _forget(self, ended: list[Running]) -> None:
        self.cpu_s += sum(running.usage.cpu_s for running in ended)
        self._running = [running for running in self._running if running not in ended]

    def _wait(self, some: list[Running], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and [running for running in some if not running.over()]:
            time.sleep(POLL_S)

    def _failure(self, started: list[Running]) -> CoterieError:
        """What to tell: the one that failed first, and others that fail of it within a moment."""
        first = next(running for running in started if running.code)
        self._wait(started, GRACE_S / 2)
        failed = [first, *(other for other in started if other.code and other is not first)]
        self.stop()
        words = "\n".join(_last_words(running) for running in failed)
        how = (
            f"was ended by signal {-first.code}" if first.code and first.code < 0 else f"ended with code {first.code}"
        )
        return CoterieError(
            f"{first.command.name} (`{first.command.shown}`) {how}; everything else was ended too.",
            code="demo-process",
            where=str(first.command.log),
            why=f"the log ends with:\n{words}",
            fix="read that log; the folder stays as it is, and the command can be run again by hand there",
        )


def _last_words(running: Running) -> str:
    text = running.command.log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"         {running.command.name} | {line}" for line in lines[-LAST_LINES:])


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal do what Ctrl-C does: raise KeyboardInterrupt, so that clean-up runs."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
