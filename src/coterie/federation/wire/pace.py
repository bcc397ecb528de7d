"""How fast one peer's small messages are read: a peer that sends thousands a second slows nobody but itself."""

from __future__ import annotations

import threading

SMALL_BYTES = 64 * 1024
RATE = 1000.0
"""Small messages a second and peer. A message costs about 0.2 ms to read, so that is a fifth of a core."""
BURST = 2000.0


class Pace:
    """A bucket of tokens for one peer, all lanes together. Large chunks cost nothing: the line itself bounds them."""

    def __init__(self, now: float) -> None:
        self._left, self._at = BURST, now
        self._lock = threading.Lock()

    def pause(self, size: int, now: float) -> float:
        """Seconds to wait before the next chunk is read, after one of ``size`` bytes came."""
        if size >= SMALL_BYTES:
            return 0.0
        with self._lock:
            self._left = min(BURST, self._left + (now - self._at) * RATE) - 1.0
            self._at = now
            return max(0.0, -self._left / RATE)
