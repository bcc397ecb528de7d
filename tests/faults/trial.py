"""A federation of processes that goes on for as long as it is looked at."""

from __future__ import annotations

import signal
import time

from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.rounds.run_folder import read_status
from helpers.federation_processes import PARTIES, make_folder
from helpers.forked import ForkedProcesses

ENDLESS = {"rounds": 1_000_000, "batch_size": 4, "micro_batch": 2, "eval_every": 0, "checkpoint_every": 2}

NAMED_S, BACK_S = 5.0, 10.0

SLACK = 3.0
"""Times are aims on an idle machine; the suite runs beside others and fails only well beyond them."""


class Trial:
    """A federation that goes on for as long as it is looked at."""

    def __init__(self, processes: ForkedProcesses, **settings: object) -> None:
        self.all = processes
        make_folder(processes.folder, **{"train": ENDLESS, "deadline_s": 60.0, **settings})
        self.start()

    def start(self) -> None:
        self.all.coordinate()
        for name in PARTIES:
            self.all.up(name)
        self.goes_on()

    def committed(self) -> int:
        return int(self.all.status()["committed"])

    def goes_on(self, beyond: int | None = None) -> float:
        """Seconds until a round is committed that was not before."""
        begun = time.monotonic()
        before = self.committed() if beyond is None else beyond
        self.all.until(lambda status: status["committed"] > before)
        return time.monotonic() - begun

    def named(self, name: str) -> float:
        """Seconds until the coordinator says that it waits for this party."""
        begun = time.monotonic()
        self.all.until(lambda status: name in status["missing"], 60.0)
        return time.monotonic() - begun

    def kill(self, name: str) -> int:
        """Kill -9; the rounds that were committed by then."""
        self.all.signal(signal.SIGKILL, name)
        self.all.running.pop(name).wait()
        return self.committed()

    def again(self, name: str) -> None:
        """Start a killed process anew and wait until it has read its files."""
        log = self.all.folder / f"{name}.log"
        lines = log.read_text().count(f"{name}: joining")
        if name == COORDINATOR:
            self.all.coordinate()
        else:
            self.all.up(name)
            self.all.until(lambda status: log.read_text().count(f"{name}: joining") > lines)

    def start_with(self, name: str, point: str, nth: int) -> None:
        """Start a process that dies, or is busy, at a point of `kill_points`."""
        words = ("coordinator", "federation.yaml") if name == COORDINATOR else ("up", f"{name}/party.yaml")
        self.all.start(name, *words, point=point, nth=nth)

    def up_to(self, name: str, point: str, nth: int) -> None:
        """Start a process and wait until it has died at a point."""
        self.start_with(name, point, nth)
        process = self.all.running[name]
        self.all.until(lambda status: process.poll() is not None)
        assert self.all.running.pop(name).wait() == -signal.SIGKILL

    def silent(self, party: str) -> float:
        """Seconds that a party says it has not heard of the coordinator."""
        return float(read_status(self.all.folder / party / "run").get("coordinator_silent_s", 0.0))

    def no_traceback(self) -> None:
        for name in (COORDINATOR, *PARTIES):
            assert "Traceback" not in self.all.log(name), self.all.log(name)
