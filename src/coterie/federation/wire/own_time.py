"""A clock for judging others, that does not run while this process does not.

Who was stopped for twenty seconds has heard nothing for twenty seconds, and nobody else is to blame for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_STEP_S = 1.0


class OwnTime:
    """Seconds; a longer pause between two readings counts as one second. Read it several times a second.

    Args:
        clock: the monotonic clock behind it; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._real = clock()
        self._own = self._real
        self._lock = threading.Lock()

    def now(self) -> float:
        with self._lock:
            real = self._clock()
            self._own += min(real - self._real, _STEP_S)
            self._real = real
            return self._own
