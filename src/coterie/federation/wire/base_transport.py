"""What both transports share: who waits for which reply, who handles what arrives, what is counted.

An implementation makes `Connection` objects (the sending end of one live connection to one peer on one lane), says
when one opens or breaks, and hands over every frame that arrives. It never runs a handler itself.

Threads: one worker per peer and lane, started with the first message there, so that a handler that waits holds up
nobody else; one clock that fails late requests. A reader thread only files frames: a request goes to a queue that has
room for every request the peer may have open (`window`), so a reader never waits for a worker, and replies get
through however busy the workers are.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from coterie.errors import CoterieError, DeadlineError, FrameError, TransportError
from coterie.federation.cancel import NEVER, CancelToken
from coterie.federation.wire.frame import Encoded, Frame, FrameScope, FrameType, encode
from coterie.federation.wire.peer_lane import Connection, PeerLane
from coterie.federation.wire.seldom import Seldom
from coterie.federation.wire.transport import (
    ACK,
    HEARTBEAT,
    TWIN,
    Counters,
    Handler,
    Lane,
    LaneCounters,
    Message,
    error_message,
    remote_error,
)

log = logging.getLogger(__name__)

_ENDED = "the run has ended here; `coterie resume` takes part again"
ALL_LANES = (Lane.CONTROL, Lane.FORWARD, Lane.BACKWARD)


@dataclass(frozen=True)
class Settings:
    """Times in seconds and bounds of a transport. Both sides should use the same windows.

    Args:
        window, window_bytes: most unanswered requests per peer and lane, and their tensors together; one alone may be
            larger.
        send_deadline_s: how long `send` waits for room, and a reply may take to leave.
        heartbeat_s: an idle connection sends a heartbeat this often.
        silence_s: a connection that brought nothing for so long counts as broken.
        handshake_s: a new connection has to introduce itself within this time.
        refusal_s: how long a definite refusal (another run, a wrong certificate) has to last before `connect` raises
            it; until then the other side may just be restarting.
        redial_s: first pause before dialling again; doubles up to 16 times that.
        dial_s: how long one try to connect may take.
        ping_s: a control connection is pinged after half of this without a byte, and broken after so long without an
            answer.
        close_s: how long `close` waits for handlers that are running.
    """

    window: int = 16
    window_bytes: int = 1 << 30
    send_deadline_s: float = 60.0
    heartbeat_s: float = 5.0
    silence_s: float = 25.0
    handshake_s: float = 10.0
    refusal_s: float = 3.0
    redial_s: float = 0.1
    dial_s: float = 3.0
    ping_s: float = 2.0
    close_s: float = 5.0


def _not_started(peer: str, lane: Lane, request: Message) -> Message | None:
    """What handles requests before `BaseTransport.start` says who does."""
    raise TransportError(
        f"A `{request.kind}` came on lane {lane.name} before the transport was started.",
        code="not-started",
        fix="start the transport first",
    )


class BaseTransport(ABC):
    """The `Transport` interface on top of connections.

    Args:
        me: this party.
        lanes: the lanes to every peer, in roster order (a coordinator has the control lane alone).
        scope: run and membership epoch.
        settings: times and bounds.
        no_tensors: peers that never get a tensor and never send one (the coordinator, and all peers of it).
    """

    def __init__(
        self,
        me: str,
        lanes: Mapping[str, Collection[Lane]],
        scope: FrameScope,
        settings: Settings,
        no_tensors: Collection[str] = (),
    ) -> None:
        self._me = me
        self._scope = scope
        self._settings = settings
        self._no_tensors = frozenset(no_tensors)
        self._lanes = {
            (peer, lane): PeerLane(peer, lane, settings.window, settings.window_bytes)
            for peer, each in lanes.items()
            for lane in each
        }
        self._peers = tuple(lanes)
        self._handler: Handler = _not_started
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._seldom = Seldom(log)
        self._clock = threading.Thread(target=self._keep_time, name=f"{me}-clock", daemon=True)

    # ---- the Transport interface -----------------------------------------------------------------------------

    @property
    def me(self) -> str:
        return self._me

    @property
    def peers(self) -> tuple[str, ...]:
        return self._peers

    def start(self, handler: Handler) -> None:
        if self._handler is not _not_started:
            raise TransportError(
                f"The transport of {self._me} was started twice.", code="started-twice", fix="start a transport once"
            )
        self._handler = handler
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self._clock.start()

    def connected(self) -> frozenset[str]:
        with self._changed:
            absent = {peer for (peer, _), peer_lane in self._lanes.items() if peer_lane.connection is None}
        return frozenset(self._peers) - absent

    def connect(self, deadline_s: float, peers: Collection[str] | None = None, cancel: CancelToken = NEVER) -> None:
        wanted = [peer for peer in self._peers if peers is None or peer in peers]
        until = time.monotonic() + deadline_s
        while (now := time.monotonic()) < until and not self._stopped.is_set():
            if cancel.cancelled:
                return
            missing = [peer for peer in wanted if peer not in self.connected()]
            for peer in missing:
                refusal = self._refusal(peer, now)
                if refusal is not None:
                    raise refusal
            with self._changed:
                if self._changed.wait_for(lambda: self.connected().issuperset(wanted), min(0.2, until - now)):
                    return
        missing = [peer for peer in wanted if peer not in self.connected()]
        if missing:
            details = [f"{peer} ({self._last_seen(peer)})" for peer in missing]
            raise DeadlineError(
                f"{', '.join(missing)} did not arrive within {deadline_s:g} s.",
                code="peer-missing",
                where="connecting: " + "; ".join(details),
                why="a round needs every party of the roster",
                fix="start the missing parties, or check their endpoints in the roster",
            )

    def request(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Message:
        return self.request_async(peer, lane, message, deadline_s).result()

    def request_async(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Future[Message]:
        return self._post_request(FrameType.REQUEST, peer, lane, message, deadline_s)

    def send(self, peer: str, lane: Lane, message: Message) -> None:
        future = self._post_request(FrameType.ONE_WAY, peer, lane, message, self._settings.send_deadline_s)

        def report(done: Future[Message]) -> None:
            error = done.exception()
            if error is not None:
                log.warning("one-way `%s` to %s: %s", message.kind, peer, getattr(error, "code", "failed"))

        future.add_done_callback(report)

    def counters(self) -> Counters:
        snapshot: dict[tuple[str, Lane], LaneCounters] = {}
        for key, peer_lane in self._lanes.items():
            with peer_lane.lock:
                snapshot[key] = peer_lane.counters
        return Counters(snapshot)

    def close(self) -> None:
        with self._changed:
            if self._stopped.is_set():
                return
            self._stopped.set()
            self._changed.notify_all()
        closed = TransportError(f"The transport of {self._me} was closed.", code="closed", fix=_ENDED)
        for peer_lane in self._lanes.values():
            peer_lane.pending.fail_all(closed)
        self._shut()
        for peer_lane in self._lanes.values():
            connection, peer_lane.connection = peer_lane.connection, None
            if connection is not None:
                connection.close()
            peer_lane.pending.fail_all(closed)
            peer_lane.end()
        until = time.monotonic() + self._settings.close_s  # one deadline for all of them
        for (peer, lane), peer_lane in self._lanes.items():
            self._join_worker(peer_lane, f"{peer}, lane {lane.name.lower()}", until)
        if self._clock.is_alive():
            self._clock.join(max(0.1, until - time.monotonic()))

    # ---- for implementations ---------------------------------------------------------------------------------

    @abstractmethod
    def _open(self) -> None:
        """Listen and dial; returns at once."""

    @abstractmethod
    def _shut(self) -> None:
        """Stop listening and dialling, and end all connections."""

    def _last_seen(self, peer: str) -> str:
        """What is known about a peer that is not connected, for `connect`'s message."""
        return "never seen"

    def _refusal(self, peer: str, now: float) -> CoterieError | None:
        """A lasting reason why ``peer`` cannot connect (another run, a wrong certificate), for `connect` to raise."""
        return None

    def _tick(self, now: float) -> None:  # noqa: B027 - nothing to do is a fine default
        """Called by the clock about twenty times a second; must not block."""

    def _attach(self, connection: Connection) -> None:
        """A connection is open; it replaces an older one to the same peer and lane."""
        peer_lane = self._lanes[connection.peer, connection.lane]
        with self._changed:
            closing = self._stopped.is_set()
            older, peer_lane.connection = peer_lane.connection, None if closing else connection
            self._changed.notify_all()
        if older is not None:
            peer_lane.pending.fail_all(_broken(connection.peer, connection.lane, "it connected anew"))
            older.close()
        if closing:
            connection.close()

    def _detach(self, connection: Connection, reason: str) -> None:
        """A connection broke; does nothing if another one has taken its place."""
        peer_lane = self._lanes[connection.peer, connection.lane]
        with self._changed:
            current = peer_lane.connection is connection
            if current:
                peer_lane.connection = None
                self._changed.notify_all()
        connection.close()
        if current:
            peer_lane.pending.fail_all(_broken(connection.peer, connection.lane, reason))

    def _arrived(self, connection: Connection, frame: Frame) -> None:
        """File a frame that came in over ``connection``; never waits and never computes.

        Raises:
            FrameError: the peer sends more than its window, or tensors that may not come from it; close it.
        """
        peer_lane = self._lanes[connection.peer, connection.lane]
        peer_lane.count_received(frame)
        if frame.message.tensors and connection.peer in self._no_tensors:
            raise FrameError(
                f"{connection.peer} sent tensors; to or from a coordinator only control messages may pass.",
                code="tensors-on-control",
                field="tensor_count",
            )
        if frame.type is FrameType.HEARTBEAT:
            return
        if frame.type is FrameType.REPLY:
            peer_lane.pending.settle(frame.correlation, frame.message)
        elif frame.type is FrameType.ERROR:
            peer_lane.pending.settle(frame.correlation, remote_error(connection.peer, connection.lane, frame.message))
        else:
            if not peer_lane.take_in(connection, frame):
                raise FrameError(
                    f"{connection.peer} has more than {self._settings.window} requests, or "
                    f"{self._settings.window_bytes / 2**20:.4g} MiB of them, open on one lane.",
                    code="window-exceeded",
                    why="a peer must not be able to fill this party's memory",
                    fix="use the same window on both sides",
                )
            self._ensure_worker(peer_lane, connection)

    def _heartbeat(self, lane: Lane) -> Encoded:
        return encode(self._scope, FrameType.HEARTBEAT, lane, 0, Message(HEARTBEAT))

    def _count_heartbeat(self, peer: str, lane: Lane, encoded: Encoded) -> None:
        self._lanes[peer, lane].count_sent(encoded, messages=0)

    # ---- inside ----------------------------------------------------------------------------------------------

    def _post_request(
        self, frame_type: FrameType, peer: str, lane: Lane, message: Message, deadline_s: float
    ) -> Future[Message]:
        peer_lane = self._lanes.get((peer, lane))
        if peer_lane is None:
            known = ", ".join(sorted({f"{p} ({lane_.name.lower()})" for p, lane_ in self._lanes}))
            raise TransportError(
                f"{self._me} has no lane {lane.name.lower()} to {peer}.",
                code="no-such-lane",
                fix=f"lanes of {self._me}: {known}",
            )
        if message.tensors and peer in self._no_tensors:
            raise TransportError(
                f"`{message.kind}` carries tensors; between {self._me} and {peer} only control messages may pass.",
                code="tensors-on-control",
                fix="send it to a party",
                why="the coordinator keeps commit records and must see no data",
                field="tensors",
            )
        if peer_lane.connection is None:
            raise self._not_connected(peer, lane)
        until = time.monotonic() + deadline_s
        size = sum(tensor.nbytes for tensor in message.tensors)
        correlation, future = peer_lane.pending.add(message.kind, deadline_s, size)
        try:
            encoded = encode(self._scope, frame_type, lane, correlation, message)
            connection = peer_lane.connection  # read after `add`: a break from now on finds the entry and fails it
            if connection is None:
                raise self._not_connected(peer, lane)
            connection.post(encoded, until)
            peer_lane.count_sent(encoded)
        except CoterieError as error:
            if peer_lane.pending.settle(correlation, error):
                raise
        return future

    def _not_connected(self, peer: str, lane: Lane) -> TransportError:
        if self._stopped.is_set():
            return TransportError(f"The transport of {self._me} was closed.", code="closed", fix=_ENDED)
        return TransportError(
            f"{peer} is not connected.",
            code="not-connected",
            where=f"lane {lane.name.lower()} from {self._me} to {peer}; {self._last_seen(peer)}",
            fix=f"start {peer}, or wait for it with connect(deadline_s)",
        )

    def _ensure_worker(self, peer_lane: PeerLane, connection: Connection) -> None:
        if peer_lane.worker is None:
            with peer_lane.lock:
                if peer_lane.worker is None:
                    name = f"{self._me}-{connection.peer}-{connection.lane.name.lower()}"
                    worker = threading.Thread(target=self._run_worker, args=(peer_lane,), name=name, daemon=True)
                    worker.start()
                    peer_lane.worker = worker  # only now: `close` joins it, and a failed start leaves none

    def _run_worker(self, peer_lane: PeerLane) -> None:
        while (item := peer_lane.next_request()) is not None:
            connection, frame = item
            if not self._stopped.is_set():
                self._serve(peer_lane, connection, frame)

    def _serve(self, peer_lane: PeerLane, connection: Connection, frame: Frame) -> None:
        """Run the handler and answer over the connection the request came from.

        After a break the answer is dropped: the peer has given the request up, and a restarted peer never made it.
        """
        request = frame.message
        frame_type, reply = FrameType.REPLY, None
        try:
            if request.kind == TWIN:
                text = f"another process with our kit tried to connect to {connection.peer} and was turned away"
                self._seldom.log(("twin", connection.peer), logging.WARNING, text)
            else:
                reply = self._handler(connection.peer, connection.lane, request)
        except CoterieError as error:
            text = f"`{request.kind}` of {connection.peer} failed here: {error}"
            self._seldom.log((connection.peer, error.code), logging.INFO, text)
            frame_type, reply = FrameType.ERROR, error_message(error, request)
        except Exception as error:
            text = f"`{request.kind}` of {connection.peer} failed here"
            self._seldom.log((connection.peer, type(error)), logging.ERROR, text, trace=True)
            frame_type, reply = FrameType.ERROR, error_message(error, request)
        if reply is None or (frame_type is FrameType.REPLY and frame.type is FrameType.ONE_WAY):
            reply = request.reply(ACK)
        try:
            self._answer(peer_lane, connection, frame_type, frame.correlation, reply)
        except FrameError as error:
            text = f"the reply to `{request.kind}` of {connection.peer} cannot be sent: {error}"
            self._seldom.log((connection.peer, "reply", error.code), logging.ERROR, text)
            self._answer_error(peer_lane, connection, frame, error)
        except TransportError as error:
            text = f"the reply to `{request.kind}` of {connection.peer} was dropped: {error.message}"
            self._seldom.log((connection.peer, "dropped", error.code), logging.INFO, text)

    def _answer(
        self, peer_lane: PeerLane, connection: Connection, frame_type: FrameType, correlation: int, reply: Message
    ) -> None:
        if reply.tensors and connection.peer in self._no_tensors:
            raise FrameError(
                "A reply between a party and the coordinator carries tensors.", code="tensors-on-control"
            )
        encoded = encode(self._scope, frame_type, connection.lane, correlation, reply)
        connection.post(encoded, time.monotonic() + self._settings.send_deadline_s)
        peer_lane.count_sent(encoded)

    def _answer_error(self, peer_lane: PeerLane, connection: Connection, frame: Frame, error: CoterieError) -> None:
        try:
            self._answer(
                peer_lane, connection, FrameType.ERROR, frame.correlation, error_message(error, frame.message)
            )
        except TransportError as failure:
            text = f"the reply to `{frame.message.kind}` of {connection.peer} was dropped: {failure.message}"
            self._seldom.log((connection.peer, "dropped", failure.code), logging.INFO, text)

    def _join_worker(self, peer_lane: PeerLane, where: str, until: float) -> None:
        with peer_lane.lock:  # one that is being started counts
            worker = peer_lane.worker
        if worker is None or worker is threading.current_thread():
            return
        worker.join(max(0.0, until - time.monotonic()))
        if worker.is_alive():
            log.warning("a handler for %s is still running after %g s", where, self._settings.close_s)

    def _keep_time(self) -> None:
        while not self._stopped.wait(0.05):
            now = time.monotonic()
            for peer_lane in self._lanes.values():
                peer_lane.pending.expire(now)
            self._tick(now)


def _broken(peer: str, lane: Lane, reason: str) -> TransportError:
    return TransportError(
        f"The connection to {peer} broke before it answered: {reason}.",
        code="connection-lost",
        where=f"lane {lane.name.lower()}",
        why=f"whether {peer} handled the request is unknown",
        fix="the round is aborted and tried again once the peer is back",
    )
