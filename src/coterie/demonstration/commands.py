"""One `coterie` command as a process: started by this one, or on Linux a fork of one that has imported everything."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from coterie.errors import CoterieError

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""What ends a demo."""


@dataclass(frozen=True)
class Command:
    """One `coterie` command.

    Attributes:
        name: what it is called on the screen and in errors.
        arguments: what follows `coterie`.
        log: file that gets everything it prints.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path

    @property
    def shown(self) -> str:
        """The line a person would type."""
        return shlex.join(("coterie", *self.arguments))


@dataclass(frozen=True)
class Usage:
    """What a process used: processor seconds (user and system), and its largest resident size."""

    cpu_s: float = 0.0
    peak_rss_bytes: int = 0


class Child(Protocol):
    """A process that was started, in a session of its own."""

    pid: int

    def ended(self) -> tuple[int, Usage] | None:
        """Its exit code, negative when a signal ended it, and what it used; None while it runs."""
        ...


class Starter(Protocol):
    """Starts commands."""

    def start(self, command: Command) -> Child:
        """Start a command; its log is there, and gets its output."""
        ...

    def close(self) -> float:
        """End what starts them, after they have ended. Returns the processor seconds that it took itself."""
        ...


class Started:
    """A `Child` of this process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid, self._process = process.pid, process

    def ended(self) -> tuple[int, Usage] | None:
        """Waits by `os.wait4`, because only that tells what this one process used."""
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        if not pid:
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        scale = 1 if sys.platform == "darwin" else 1024
        return self._process.returncode, Usage(used.ru_utime + used.ru_stime, used.ru_maxrss * scale)


class Fresh:
    """A `Starter` of processes that import everything themselves.

    Args:
        command: how `coterie` is called.
        folder: working directory of the commands.
        environment: of all of them.
        inherited: descriptor that they inherit.
    """

    def __init__(
        self, command: tuple[str, ...], folder: Path, environment: Mapping[str, str], inherited: int
    ) -> None:
        self._command, self._folder = command, folder
        self._environment, self._inherited = dict(environment), inherited

    def start(self, command: Command) -> Started:
        """Start a command."""
        with command.log.open("ab") as log:
            process = subprocess.Popen(
                [*self._command, *command.arguments],
                cwd=self._folder,
                env=self._environment,
                pass_fds=(self._inherited,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Started(process)

    def close(self) -> float:
        """Nothing is left."""
        return 0.0


class Fork:
    """A `Child` of `Preloaded`."""

    def __init__(self, loaded: Preloaded, pid: int) -> None:
        self.pid, self._loaded = pid, loaded

    def ended(self) -> tuple[int, Usage] | None:
        """By asking the process that forked it."""
        found = self._loaded.ask(poll=self.pid)
        return None if found is None else (found["code"], Usage(found["cpu_s"], found["peak_rss_bytes"]))


class Preloaded:
    """A `Starter` whose commands are forks of `coterie.demonstration.preloaded`, which begins to import at once.

    Args:
        module: what `coterie` is.
        folder: working directory of the commands.
        environment: of all of them.
        inherited: descriptor that they inherit.
        log: what that process says itself: nothing, unless it fails.
        bare: import nothing, for tests.
    """

    def __init__(
        self,
        module: str,
        folder: Path,
        environment: Mapping[str, str],
        inherited: int,
        log: Path,
        *,
        bare: bool = False,
    ) -> None:
        self._log, self._asked = log, 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "coterie.demonstration.preloaded", module, *(["bare"] if bare else [])],
                cwd=folder,
                env=dict(environment),
                pass_fds=(inherited,),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                bufsize=0,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def start(self, command: Command) -> Fork:
        """Start a command; the first time this waits for the imports."""
        return Fork(self, int(self.ask(arguments=command.arguments, log=str(command.log))))

    def ask(self, **asked: Any) -> Any:
        """What the process answers. A signal that interrupts this leaves an answer behind, which the next one skips.

        Raises:
            CoterieError: the process is gone.
        """
        questions, answers = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        self._asked += 1
        line = json.dumps({**asked, "number": self._asked}).encode() + b"\n"
        with _signals_wait(), contextlib.suppress(BrokenPipeError):
            questions.write(line)
        while True:
            select.select([answers], [], [])
            with _signals_wait():
                answer = answers.readline()
            if not answer:
                raise CoterieError(
                    "the process that starts the demo's commands has ended; everything else was ended too.",
                    code="demo-process",
                    where=str(self._log),
                    why="it was killed, perhaps because memory was short, or could not import what the demo needs",
                    fix="read that log; end other programs first, where memory is short",
                )
            found = json.loads(answer)
            if found["number"] == self._asked:
                return found["found"]

    def close(self) -> float:
        """End the process, in whatever state it is."""
        own = 0.0
        if self._asked and self._process.poll() is None:
            with contextlib.suppress(CoterieError):
                own = float(self.ask())
        self._process.kill()
        self._process.communicate()
        return own


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Inside, no signal's handler interrupts half a line."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
