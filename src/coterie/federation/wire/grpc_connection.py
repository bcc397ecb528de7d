"""The sending end of one gRPC stream: a short bounded queue of chunks that gRPC's own thread empties."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from coterie.errors import DeadlineError, TransportError
from coterie.federation.wire.frame import Encoded
from coterie.federation.wire.peer_lane import Connection
from coterie.federation.wire.transport import Lane

QUEUE_CHUNKS = 8


class GrpcConnection(Connection):
    """Frames go in whole, chunk after chunk; `outgoing` gives the chunks to gRPC.

    Args:
        greeting: first message of the stream, sent before all frames.
        heartbeat: makes a heartbeat frame and counts it; called when nothing was sent for ``heartbeat_s``.
        now: when it was made, by the clock that ``heard`` is kept by.
    """

    def __init__(
        self,
        peer: str,
        lane: Lane,
        greeting: bytes,
        heartbeat: Callable[[], Encoded],
        heartbeat_s: float,
        now: float,
    ) -> None:
        self.peer, self.lane = peer, lane
        self.heard = now
        self.drained = threading.Event()
        self.process = ""  # random name of the peer's process, once it has introduced itself
        self._greeting = greeting
        self._heartbeat, self._heartbeat_s = heartbeat, heartbeat_s
        self._chunks: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._sending = threading.Lock()  # one frame at a time
        self._cut: Callable[[], object] | None = None

    def on_cut(self, cut: Callable[[], object]) -> None:
        """How to end the stream at once; known only after gRPC made it."""
        self._cut = cut

    def cut(self) -> None:
        """End the stream now, whatever is still queued."""
        self.close()
        if self._cut is not None:
            self._cut()

    def post(self, encoded: Encoded, until: float) -> None:
        if not self._sending.acquire(timeout=max(0.0, until - time.monotonic())):
            raise self._late()
        try:
            begun = False
            for chunk in encoded.chunks():
                if not self._put(chunk, until):
                    if self._closed:
                        raise TransportError(
                            f"The connection to {self.peer} broke while a message was being sent.",
                            code="connection-lost",
                            fix="nothing: it is dialled again; if it comes back, see the network between the two",
                            where=f"lane {self.lane.name.lower()}",
                        )
                    if begun:  # half a frame is out: nothing sensible can follow it on this stream
                        self.cut()
                    raise self._late()
                begun = True
        finally:
            self._sending.release()

    def _put(self, chunk: bytes, until: float) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or len(self._chunks) < QUEUE_CHUNKS, timeout=max(0.0, until - time.monotonic())
            )
            if self._closed or len(self._chunks) >= QUEUE_CHUNKS:
                return False
            self._chunks.append(chunk)
            self._changed.notify_all()
            return True

    def _late(self) -> DeadlineError:
        return DeadlineError(
            f"A message to {self.peer} could not be sent in time: {QUEUE_CHUNKS} chunks before it are still waiting.",
            code="send-deadline",
            where=f"lane {self.lane.name.lower()}",
            fix=f"see whether {self.peer} or the network is stuck, or allow a longer deadline",
        )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def outgoing(self) -> Iterator[bytes]:
        """Every chunk in order, heartbeats in quiet times; ends once it is closed and the queue empty."""
        try:
            yield self._greeting
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or bool(self._chunks), timeout=self._heartbeat_s)
                    chunk = self._chunks.popleft() if self._chunks else None
                    self._changed.notify_all()
                    if chunk is None and self._closed:
                        return
                if chunk is not None:
                    yield chunk
                else:
                    yield from self._heartbeat().chunks()
        finally:
            self.drained.set()
