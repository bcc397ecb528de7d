"""Telling a rank that is busy from one that is frozen or gone.

A barrier with a deadline of seconds would end a run whenever one rank has more to compute than the others. So a
thread of every rank counts in the store that all see: it goes on while the rank computes, and stops where the process
is stopped or dead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable

from torch.distributed import Store  # type: ignore[attr-defined]

from coterie.errors import RankError


class Pulse:
    """This rank's own count, and the newest news of the others'.

    Args:
        store: a connection that nothing else uses.
        rank: this rank.
        patience_s: a rank is silent whose count stood still for so long.
    """

    def __init__(self, store: Store, rank: int, patience_s: float) -> None:
        self.patience_s = patience_s
        self._every_s = min(1.0, patience_s / 5)
        self._store = store
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._next = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(rank,), name="pulse", daemon=True)
        self._thread.start()

    def _beat(self, rank: int) -> None:
        count = 0
        while not self._ended.is_set():
            count += 1
            with contextlib.suppress(RuntimeError):  # of a store that is gone the rank's next step tells
                self._store.set(f"pulse/{rank}", str(count))
            self._ended.wait(self._every_s)

    def check(self, store: Store, waiting_for: Iterable[int], step: str) -> bool:
        """Look at the counts of some ranks, from time to time only, however often this is called.

        Returns:
            Whether this was such a time.

        Raises:
            RankError: one stands still.
        """
        now = time.monotonic()
        if now < self._next:
            return False
        if now - self._next > self.patience_s:
            self._seen.clear()  # this process itself stood still, and so may all have done
        self._next = now + self._every_s
        for rank in waiting_for:
            key = f"pulse/{rank}"
            count = store.get(key) if store.check([key]) else b""
            known = self._seen.get(rank)
            if known is None or known[0] != count:
                self._seen[rank] = count, now
            elif now - known[1] > self.patience_s:
                raise RankError(
                    f"rank {rank} has been silent for {now - known[1]:.0f} s.",
                    code="ranks-silent",
                    where=step,
                    why="it is frozen or dead, and a round needs every rank's part of the lot",
                    fix="end all ranks, look at that one's messages and machine, then resume the run",
                )
        return True

    def looked_away(self) -> None:
        """Forget what was seen: the counts went on while nobody looked."""
        self._seen.clear()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(timeout=self._every_s)
