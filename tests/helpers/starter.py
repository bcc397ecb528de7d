"""Starts commands of coterie as forks of one process that has imported everything: seconds become a fraction of one.

Reads one JSON object a line and answers each with one. No gRPC object exists here, so forking is safe.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from helpers import kill_points

_NEW_NET, _NEW_MOUNTS = 0x40000000, 0x00020000
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18


def preload() -> None:
    """Import what the commands of a federation import, and compile what they compile, as the demo does."""
    import transformers.models.olmoe.modeling_olmoe  # noqa: F401

    from coterie.demonstration import preloaded

    preloaded.load()


def become(
    arguments: Sequence[str], *, folder: str, log: str, prepare: Callable[[], object] = lambda: None
) -> NoReturn:
    """The rest of a fork's life: a command, in a folder, its output in a log."""
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number in (1, 2):
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        prepare()
        from coterie.cli.app import main

        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prepare(asked: dict[str, Any]) -> None:
    """Network, limits and point of death of a process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked["space"]:
        space = os.open(f"/run/netns/{asked['space']}", os.O_RDONLY)
        if _libc().setns(space, _NEW_NET):
            raise OSError(ctypes.get_errno(), "setns")
    if asked.get("etc"):
        _see_files(asked["etc"])
    for name, (soft, hard) in asked["limits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    if asked["point"]:
        kill_points.prepare(asked["point"], asked["nth"])


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _see_files(folder: str) -> None:
    """The files of a folder in the place of those in /etc, for this process alone."""
    libc = _libc()
    if libc.unshare(_NEW_MOUNTS) or libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None):
        raise OSError(ctypes.get_errno(), "unshare")
    for name in os.listdir(folder):
        if libc.mount(os.fsencode(f"{folder}/{name}"), os.fsencode(f"/etc/{name}"), None, _BIND, None):
            raise OSError(ctypes.get_errno(), name)


def main() -> None:
    preload()
    print(json.dumps("ready"), flush=True)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            pid = asked["poll"]
            if pid not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(ended.get(pid)), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become(asked["arguments"], folder=asked["cwd"], log=asked["log"], prepare=partial(_prepare, asked))
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()
