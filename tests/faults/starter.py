"""Starts commands of coterie as forks of one process that has imported everything: seconds become a fraction of one.

Reads one JSON object a line and answers each with one. No gRPC object exists here, so forking is safe.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from typing import Any

_NEW_NET = 0x40000000


def preload() -> None:
    import kill_points  # noqa: F401

    for family in ("olmoe",):
        __import__(f"transformers.models.{family}.modeling_{family}")
    gc.freeze()


def become(asked: dict[str, Any]) -> None:
    """The rest of a child's life."""
    code = 1
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(asked["cwd"])
        if asked["space"]:
            space = os.open(f"/run/netns/{asked['space']}", os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(space, _NEW_NET):
                raise OSError(ctypes.get_errno(), "setns")
        for name, (soft, hard) in asked["limits"].items():
            import resource

            resource.setrlimit(getattr(resource, name), (soft, hard))
        import kill_points

        from coterie.cli.app import main

        if asked["point"]:
            kill_points.prepare(asked["point"], asked["nth"])
        main(asked["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
            signal.signal(signal.SIGINT, signal.default_int_handler)
            become(asked)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()
