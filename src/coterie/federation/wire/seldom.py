"""Log lines that a peer can cause: the first at once, then one a minute that says how many there were."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

EVERY_S = 60.0


@dataclass
class _Said:
    at: float
    level: int
    text: str
    unsaid: int = 0


class Seldom:
    """Keeps what others can repeat from filling the disk.

    Args:
        log: where lines go.
        clock: seconds; for tests.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._said: dict[Hashable, _Said] = {}
        self._lock = threading.Lock()

    def log(self, key: Hashable, level: int, text: str, *, trace: bool = False) -> None:
        """Log ``text`` unless something of the same ``key`` was logged within the last minute; then count it.

        Args:
            key: from a small set, such as a member's name with an error code; never a peer's own words.
            level: of `logging`.
            text: one sentence.
            trace: with the traceback of the exception being handled.
        """
        now = self._clock()
        with self._lock:
            said = self._said.get(key)
            if said is not None:
                said.text, said.unsaid = text, said.unsaid + 1
                return
            self._said[key] = _Said(now, level, text)
        self._log.log(level, "%s", text, exc_info=trace)

    def tick(self) -> None:
        """Once a minute and key: how many lines were held back. Call it often."""
        now = self._clock()
        with self._lock:
            due = [key for key, said in self._said.items() if now - said.at >= EVERY_S]
            lines = []
            for key in due:
                said = self._said[key]
                if said.unsaid:
                    lines.append(said)
                    self._said[key] = _Said(now, said.level, said.text)
                else:
                    del self._said[key]
        for said in lines:
            self._log.log(said.level, "%s (the last of %d like it in %.0f s)", said.text, said.unsaid, now - said.at)
