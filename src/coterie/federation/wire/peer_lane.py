"""One peer on one lane: the connection of the moment, and everything that outlives it."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from dataclasses import replace

from coterie.federation.wire.frame import Encoded, Frame, FrameType
from coterie.federation.wire.pending import PendingReplies
from coterie.federation.wire.transport import Lane, LaneCounters

_WINDOWS_KEPT = 4


class Connection(ABC):
    """The sending end of one live connection to ``peer`` on ``lane``."""

    peer: str
    lane: Lane
    waiting = 0  # requests that came over this connection and no worker has taken yet
    waiting_bytes = 0  # of their tensors

    @abstractmethod
    def post(self, encoded: Encoded, until: float) -> None:
        """Hand the chunks to the wire, whole frames at a time; blocks while its bounded queue is full.

        Raises:
            DeadlineError: ``until`` (monotonic clock) came first.
            TransportError: the connection is broken.
        """

    @abstractmethod
    def close(self) -> None:
        """End the connection; wakes whoever is in `post`."""


class PeerLane:
    """Everything about one peer on one lane that outlives a connection."""

    def __init__(self, peer: str, lane: Lane, window: int, window_bytes: int) -> None:
        self.connection: Connection | None = None
        self.pending = PendingReplies(peer, lane, window, window_bytes)
        self._window, self._window_bytes, self._held_bytes = window, window_bytes, 0
        # What came over a connection that broke is still handled, so there is room for a few connections' windows.
        self.inbox: queue.Queue[tuple[Connection, Frame] | None] = queue.Queue(_WINDOWS_KEPT * window + 1)
        self.worker: threading.Thread | None = None
        self.counters = LaneCounters()
        self.lock = threading.Lock()

    def take_in(self, connection: Connection, frame: Frame) -> bool:
        """Queue a request for the worker; False if the peer has more open than it may, in number or in bytes.

        One message may be larger than the bytes allowed, if nothing else is open: the lane's limit bounds that one.
        """
        size = frame.tensor_bytes
        with self.lock:
            if connection.waiting >= self._window or self.inbox.qsize() >= _WINDOWS_KEPT * self._window:
                return False
            if connection.waiting and connection.waiting_bytes + size > self._window_bytes:
                return False
            if self._held_bytes and self._held_bytes + size > _WINDOWS_KEPT * self._window_bytes:
                return False
            connection.waiting += 1
            connection.waiting_bytes += size
            self._held_bytes += size
            self.inbox.put_nowait((connection, frame))  # inside the lock: another connection must not take the place
        return True

    def end(self) -> None:
        """Let the worker go once it has taken what is queued; there is always room for this one."""
        self.inbox.put_nowait(None)

    def next_request(self) -> tuple[Connection, Frame] | None:
        """The next one in order; None when the transport closes."""
        item = self.inbox.get()
        if item is not None:
            with self.lock:
                connection, frame = item
                connection.waiting -= 1
                connection.waiting_bytes -= frame.tensor_bytes
                self._held_bytes -= frame.tensor_bytes
        return item

    def count_sent(self, encoded: Encoded, messages: int = 1) -> None:
        with self.lock:
            c = self.counters
            self.counters = replace(
                c,
                payload_bytes_sent=c.payload_bytes_sent + encoded.payload_bytes,
                tensor_bytes_sent=c.tensor_bytes_sent + encoded.tensor_bytes,
                messages_sent=c.messages_sent + messages,
            )

    def count_received(self, frame: Frame) -> None:
        with self.lock:
            c = self.counters
            self.counters = replace(
                c,
                payload_bytes_received=c.payload_bytes_received + frame.payload_bytes,
                tensor_bytes_received=c.tensor_bytes_received + frame.tensor_bytes,
                messages_received=c.messages_received + (frame.type is not FrameType.HEARTBEAT),
            )
