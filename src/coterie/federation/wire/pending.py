"""Requests one side has sent to one peer on one lane and that are not answered yet."""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

from coterie.errors import CoterieError, DeadlineError
from coterie.federation.wire.transport import Lane, Message


@dataclass
class _Entry:
    future: Future[Message]
    until: float
    deadline_s: float
    kind: str
    size: int = 0
    claimed: bool = False

    def claim(self) -> bool:
        """True once: whoever gets it sets the future. Called under the lock of the table."""
        first, self.claimed = not self.claimed, True
        return first

    def finish(self, result: Message | CoterieError) -> None:
        if isinstance(result, Message):
            self.future.set_result(result)
        else:
            self.future.set_exception(result)


class PendingReplies:
    """Futures by correlation number, at most ``window`` of them and ``window_bytes`` of tensors.

    A single request may be larger, as long as it is the only one.

    A request that ran out of time keeps its slot until the peer answers or the connection ends: the peer still holds
    the request in its own queue, which has room for ``window`` of them and no more.
    """

    def __init__(self, peer: str, lane: Lane, window: int, window_bytes: int) -> None:
        self._peer, self._lane, self._window, self._window_bytes = peer, lane, window, window_bytes
        self._bytes = 0
        self._entries: dict[int, _Entry] = {}
        self._changed = threading.Condition()
        # A random start keeps a late answer to a process that has since restarted from matching anything.
        self._next = secrets.randbits(48)

    def add(self, kind: str, deadline_s: float, size: int = 0) -> tuple[int, Future[Message]]:
        """A correlation number and a future for its reply; waits for room until the deadline.

        Args:
            kind: of the request, for error texts.
            deadline_s: seconds to wait for room.
            size: bytes of the request's tensors.

        Raises:
            DeadlineError: ``window`` earlier requests stayed unanswered.
        """
        until = time.monotonic() + deadline_s
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_room(size), timeout=deadline_s):
                raise DeadlineError(
                    f"{len(self._entries)} earlier requests to {self._peer} are unanswered; "
                    f"`{kind}` waited {deadline_s:g} s for room.",
                    code="queue-full",
                    where=f"lane {self._lane.name.lower()} to {self._peer}",
                    why="queues are bounded so that a slow peer cannot fill the memory of a fast one",
                    fix=f"see what {self._peer} is busy with, or allow a longer deadline",
                )
            self._next += 1
            future: Future[Message] = Future()
            future.set_running_or_notify_cancel()  # a request on its way cannot be taken back
            self._entries[self._next] = _Entry(future, until, deadline_s, kind, size)
            self._bytes += size
            return self._next, future

    def _has_room(self, size: int) -> bool:
        if len(self._entries) >= self._window:
            return False
        return not self._entries or self._bytes + size <= self._window_bytes

    def settle(self, correlation: int, result: Message | CoterieError) -> bool:
        """Deliver a reply and free its slot; False if nobody waits for it."""
        with self._changed:
            entry = self._entries.pop(correlation, None)
            self._bytes -= entry.size if entry is not None else 0
            claimed = entry is not None and entry.claim()
            self._changed.notify_all()  # a small one may find room where a large one does not
        if entry is not None and claimed:
            entry.finish(result)
        return entry is not None

    def expire(self, now: float) -> None:
        """Fail the requests whose deadline has passed."""
        with self._changed:
            late = [entry for entry in self._entries.values() if entry.until <= now and entry.claim()]
        for entry in late:
            entry.finish(
                DeadlineError(
                    f"{self._peer} did not answer `{entry.kind}` within {entry.deadline_s:g} s.",
                    where=f"lane {self._lane.name.lower()} to {self._peer}",
                    fix=f"see {self._peer}'s log; if it is only slow, allow a longer deadline",
                )
            )

    def fail_all(self, error: CoterieError) -> None:
        """The connection is gone: fail every request and free all slots."""
        with self._changed:
            unanswered = [entry for entry in self._entries.values() if entry.claim()]
            self._entries.clear()
            self._bytes = 0
            self._changed.notify_all()
        for entry in unanswered:
            entry.finish(error)
