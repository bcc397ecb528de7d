"""`coterie demo`, of whose commands the first of each name starts by itself and the others as forks of this process.

Importing torch and transformers takes each of two dozen commands longer than what it does in a short demo. Nothing
but the demo's own waiting goes on in this process, so forking is safe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from coterie.cli.app import main
from coterie.demonstration import processes
from helpers import starter

_begun: set[str] = set()


def _start(command: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int], **how: Any) -> Any:
    """What `Processes` takes for a process: its number, and the place for its exit code."""
    arguments = command[command.index("coterie.cli.app") + 1 :]
    if arguments[0] not in _begun:
        _begun.add(arguments[0])
        return subprocess.Popen(command, env=env, pass_fds=pass_fds, **how)
    child = os.fork()
    if child == 0:
        os.environ.update(env)
        prepare = partial(_as_if_started, pass_fds)
        starter.become(arguments, folder=str(how["cwd"]), log=how["stdout"].name, prepare=prepare)
    return SimpleNamespace(pid=child, returncode=None)


def _as_if_started(pass_fds: Sequence[int]) -> None:
    """A session, signals and open files as of a process that was not forked."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in pass_fds:
            with contextlib.suppress(OSError):  # what listed them
                os.close(int(name))


if __name__ == "__main__":
    starter.preload()
    processes.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=_start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    main(("demo", *sys.argv[1:]))
