"""`Processes` that are forks of a `starter`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.federation_processes import Processes


def search_path() -> str:
    """PYTHONPATH of a process that finds the helpers."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


class Starter:
    """One starter process; see there."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": search_path()}
        command = [sys.executable, "-m", "helpers.starter"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._answer() == "ready"

    def ask(self, **asked: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=20)


class Fork:
    """What the suite uses of `subprocess.Popen`."""

    def __init__(self, starter: Starter, pid: int) -> None:
        self._starter, self.pid = starter, pid

    def poll(self) -> int | None:
        code: int | None = self._starter.ask(poll=self.pid)
        return code

    def wait(self, timeout_s: float = 60.0) -> int:
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} goes on"
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


class ForkedProcesses(Processes):
    """
    Args:
        spaces: network namespace of each process, by its name.
    """

    def __init__(self, starter: Starter, folder: Path, spaces: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self._starter, self._spaces = starter, spaces or {}

    def start(
        self,
        name: str,
        *arguments: str,
        point: str = "",
        nth: int = 0,
        limits: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        (self.folder / f"{name}.log").touch()
        pid = self._starter.ask(
            arguments=arguments,
            cwd=str(self.folder),
            log=str(self.folder / f"{name}.log"),
            space=self._spaces.get(name, ""),
            point=point,
            nth=nth,
            limits=dict(limits or {}),
        )
        self.running[name] = Fork(self._starter, pid)  # type: ignore[assignment]
