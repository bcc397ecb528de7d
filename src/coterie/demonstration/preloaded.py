"""A process that has imported what commands need, and forks itself for each: seconds become a fraction of one.

``python -m coterie.demonstration.preloaded MODULE [bare]`` reads one JSON object a line and answers each with one,
under its number; ``bare``: it imports nothing. A fork runs MODULE as ``python -m`` would. No thread and no gRPC
object exists here, so forking is safe; every secret draw of a run reads the operating system's randomness in the
process that makes it. It ends with the process that started it, also while it imports; forks have the lifeline.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from typing import Any

import numpy as np

_NEEDED = (
    "torch",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "coterie.training.single.run",
    "coterie.training.party.process",
    "coterie.training.experts.contribution",
)


_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the system kill this process, and none of its forks, when the one that started it is gone (prctl(2)).

    If it was gone before, nobody asks: `serve` ends at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def load() -> None:
    """Import, and compile, what takes longest."""
    for module in _NEEDED:
        importlib.import_module(module)
    from coterie.dp.isolation.grid_sums import compiled
    from coterie.dp.noise.discrete_gaussian import alias_tables
    from coterie.dp.per_sample.gram_kernel import compile_now

    alias_tables()
    compile_now()
    add = compiled()
    if add is not None:
        add(np.zeros(1, np.float32), np.zeros(1, np.int64), 1.0)
    gc.freeze()  # a fork shares these pages as long as it does not write into them


def serve() -> list[str] | None:
    """Answer until nobody asks any more.

    Returns:
        In a fork, the arguments of its command; in the process itself None, in the end.
    """
    ended: dict[int, dict[str, Any]] = {}
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if "arguments" in asked:
            pid = os.fork()
            if pid == 0:
                _leave_pipes(asked["log"])
                return list(asked["arguments"])
            found: Any = pid
        elif "poll" in asked:
            found = _ended(asked["poll"], ended)
        else:
            found = time.process_time()
        sys.stdout.write(json.dumps({"number": asked["number"], "found": found}) + "\n")
        sys.stdout.flush()
    return None


def _ended(pid: int, ended: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """How a fork ended and what it used; None while it runs."""
    if pid not in ended:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            ended[pid] = {
                "code": os.waitstatus_to_exitcode(status),
                "cpu_s": used.ru_utime + used.ru_stime,
                "peak_rss_bytes": 1024 * used.ru_maxrss,
            }
    return ended.get(pid)


def _leave_pipes(log: str) -> None:
    """Become a process of one's own: a session, no input, output in a log."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, to in ((0, nothing), (1, file), (2, file)):
        os.dup2(to, number)
    os.close(file)
    os.close(nothing)


def main() -> None:
    """Load, serve, and in a fork run the command."""
    end_with_parent()
    module = sys.argv[1]
    if "bare" not in sys.argv[2:]:
        load()
    arguments = serve()
    if arguments is not None:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
