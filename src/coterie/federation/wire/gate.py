"""The gate between this process and the other members: what does not fit is refused and counted."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import replace

from coterie.errors import CoterieError, MessageError
from coterie.federation.cancel import NEVER, CancelToken
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.messages import check_reply, row_of
from coterie.federation.wire.recording import Recorder
from coterie.federation.wire.transport import Address, Counters, Handler, Lane, Message, Transport

log = logging.getLogger(__name__)


class Gate:
    """A `Transport` that gives its owner no reply that does not fit, and keeps count of each member's misfits.

    Requests are checked by the handlers, which know the model; what they refuse with a `MessageError` counts here.
    Any other exception that a request causes is a bug of ours: the transport logs it and refuses the request
    (``remote-failure``), but it counts against nobody, since a full memory looks the same.

    Args:
        transport: not started yet.
        limit: times that a member's messages may not fit until `complain` is called; counting then begins anew.
        period: number of what a message with this address belongs to (None: of what is being done); misfits of one
            member in one period count once, since one fault of its memory can spoil all that it sends in one attempt
            at a round, and some of that may be looked at when the attempt is over.
        complain: called with the member's name and the code of its last misfit, on any thread; must return at once.
        recorder: keeps every message of another party as it came, before it is looked at.
    """

    def __init__(
        self,
        transport: Transport,
        limit: int,
        period: Callable[[Address | None], int],
        complain: Callable[[str, str], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._transport, self._limit, self._period, self._complain = transport, limit, period, complain
        self._recorder = recorder
        self._misfits: dict[str, set[int]] = defaultdict(set)
        self._lock = threading.Lock()

    @property
    def me(self) -> str:
        return self._transport.me

    @property
    def peers(self) -> tuple[str, ...]:
        return self._transport.peers

    def start(self, handler: Handler) -> None:
        def guarded(peer: str, lane: Lane, message: Message) -> Message | None:
            self._record(peer, FrameType.REQUEST, lane, message)
            try:
                return handler(peer, lane, message)
            except CoterieError as error:
                self.count(error, message.address)
                raise

        self._transport.start(guarded)

    def connect(self, deadline_s: float, peers: Collection[str] | None = None, cancel: CancelToken = NEVER) -> None:
        self._transport.connect(deadline_s, peers, cancel)

    def connected(self) -> frozenset[str]:
        return self._transport.connected()

    def request(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Message:
        return self.request_async(peer, lane, message, deadline_s).result()

    def request_async(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Future[Message]:
        """As `Transport.request_async`; the future also fails with a `MessageError` for a reply that does not fit."""
        row, request = row_of(message, self.me, peer), replace(message, body={}, tensors=())
        checked: Future[Message] = Future()
        checked.set_running_or_notify_cancel()

        def settle(done: Future[Message]) -> None:
            error = done.exception()
            if error is not None:
                checked.set_exception(error)
                return
            reply = done.result()
            self._record(peer, FrameType.REPLY, lane, reply)
            try:
                if row is not None:
                    check_reply(row, peer, request, reply)
            except MessageError as misfit:
                self.count(misfit, request.address)
                checked.set_exception(misfit)
            else:
                checked.set_result(reply)

        self._transport.request_async(peer, lane, message, deadline_s).add_done_callback(settle)
        return checked

    def send(self, peer: str, lane: Lane, message: Message) -> None:
        self._transport.send(peer, lane, message)

    def counters(self) -> Counters:
        return self._transport.counters()

    def close(self) -> None:
        self._transport.close()

    def _record(self, peer: str, frame_type: FrameType, lane: Lane, message: Message) -> None:
        if self._recorder is not None and peer != COORDINATOR:
            self._recorder.keep(peer, frame_type, lane, message)

    def count(self, error: CoterieError, address: Address | None = None) -> None:
        """Count an error against its sender, once, if it is a member's misfit."""
        if not isinstance(error, MessageError) or error.peer is None:
            return
        with self._lock:
            if error.counted:
                return
            error.counted = True
            periods = self._misfits[error.peer]
            periods.add(self._period(address))
            full = len(periods) >= self._limit
            if full:
                del self._misfits[error.peer]
        if full:
            log.warning("%s: %s; refused %d times over", error.peer, error.code, self._limit)
            self._complain(error.peer, error.code)
