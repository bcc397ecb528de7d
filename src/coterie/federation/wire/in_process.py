"""Several parties in one process: the transport for tests, with the frames of the real one and no network."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from coterie.errors import CoterieError, TransportError
from coterie.federation.wire.base_transport import ALL_LANES, BaseTransport, Settings
from coterie.federation.wire.frame import Encoded, FrameReader, FrameScope
from coterie.federation.wire.handshake import Hello, compare
from coterie.federation.wire.peer_lane import Connection
from coterie.federation.wire.transport import Lane


class InProcessHub:
    """Where the parties of one process meet.

    Members introduce themselves, and messages are encoded and decoded, as on the wire, so refusals, limits, dtypes
    and byte counts are the same. After a transport was closed, `transport` makes a new one for the same party, as if
    its process had been restarted.

    Args:
        parties: names in roster order.
        coordinator: a further member with the control lane alone; no tensor passes to or from it.
        run: name of the run.
        settings: times and bounds.
    """

    def __init__(
        self,
        parties: Iterable[str],
        *,
        coordinator: str | None = None,
        run: str = "in-process",
        membership_epoch: int = 1,
        settings: Settings | None = None,
    ) -> None:
        self._members = (*((coordinator,) if coordinator is not None else ()), *parties)
        self._coordinator = coordinator
        self._scope = FrameScope.of_run(run, membership_epoch)
        self._settings = settings or Settings()
        self._lock = threading.Lock()
        self._live: dict[str, _InProcessTransport] = {}

    def transport(self, name: str) -> BaseTransport:
        """The end of ``name``; call `start` on it."""
        if name not in self._members:
            raise TransportError(
                f"{name} is not a member of this hub: {', '.join(self._members)}.",
                code="no-such-peer",
                fix="make the hub with all names",
            )
        return _InProcessTransport(self, name)

    def disconnect(self, first: str, second: str) -> None:
        """Break all connections between two parties, as a cut cable would; they do not come back by themselves."""
        with self._lock:
            one, other = self._live.get(first), self._live.get(second)
        if one is not None and other is not None:
            one.detach(second, "the cable was cut")
            other.detach(first, "the cable was cut")

    # The transports below call these.

    def lanes_between(self, first: str, second: str) -> tuple[Lane, ...]:
        return (Lane.CONTROL,) if self._coordinator in (first, second) else ALL_LANES

    def others(self, name: str) -> tuple[str, ...]:
        return tuple(member for member in self._members if member != name)

    @property
    def coordinator(self) -> str | None:
        return self._coordinator

    @property
    def scope(self) -> FrameScope:
        return self._scope

    @property
    def settings(self) -> Settings:
        return self._settings

    def join(self, new: _InProcessTransport) -> None:
        with self._lock:
            if new.me in self._live:
                raise TransportError(
                    f"{new.me} is already running in this process.", code="port-taken", fix="close it first"
                )
            self._live[new.me] = new
            for name, other in self._live.items():
                if name != new.me:
                    for lane in self.lanes_between(new.me, name):
                        _introduce(new, other, lane)

    def leave(self, gone: _InProcessTransport) -> None:
        with self._lock:
            if self._live.get(gone.me) is gone:
                del self._live[gone.me]
            others = list(self._live.values())
        for other in others:
            other.detach(gone.me, f"{gone.me} closed it")


class _InProcessConnection(Connection):
    """Delivers straight to the other side's transport, in the sender's thread."""

    def __init__(self, target: _InProcessTransport, peer: str, lane: Lane, scope: FrameScope) -> None:
        self.peer, self.lane = peer, lane
        self.back: _InProcessConnection | None = None  # the other side's connection to here
        self._target = target
        self._reader = FrameReader(scope, lane)
        self._closed = False
        self._lock = threading.Lock()

    def post(self, encoded: Encoded, until: float) -> None:
        with self._lock:
            if self._closed or self.back is None:
                raise TransportError(
                    f"The connection to {self.peer} is broken.", code="connection-lost", fix="start everybody again"
                )
            for chunk in encoded.chunks():
                frame = self._reader.feed(chunk)
                if frame is not None:
                    self._target.receive(self.back, frame)

    def close(self) -> None:
        self._closed = True


def _introduce(one: _InProcessTransport, other: _InProcessTransport, lane: Lane) -> None:
    ours, theirs = one.hello(other.me, lane), other.hello(one.me, lane)
    problem, same = compare(ours, theirs, other.me), compare(theirs, ours, one.me)
    if problem is not None and same is not None:
        one.refuse(other.me, problem)
        other.refuse(one.me, same)
        return
    there = _InProcessConnection(other, other.me, lane, other.scope)
    back = _InProcessConnection(one, one.me, lane, one.scope)
    there.back, back.back = back, there
    one.attach(there)
    other.attach(back)


class _InProcessTransport(BaseTransport):
    def __init__(self, hub: InProcessHub, me: str) -> None:
        others = hub.others(me)
        no_tensors = others if me == hub.coordinator else [name for name in others if name == hub.coordinator]
        super().__init__(
            me, {name: hub.lanes_between(me, name) for name in others}, hub.scope, hub.settings, no_tensors
        )
        self._hub = hub
        self._problems: dict[str, CoterieError] = {}
        self.receive = self._arrived

    @property
    def scope(self) -> FrameScope:
        return self._scope

    def hello(self, peer: str, lane: Lane) -> Hello:
        scope = self._scope
        return Hello(self._me, peer, lane, "in-process", scope.epoch, "", scope.run.hex(), scope.protocol)

    def attach(self, connection: _InProcessConnection) -> None:
        self._problems.pop(connection.peer, None)
        self._attach(connection)

    def refuse(self, peer: str, problem: CoterieError) -> None:
        self._problems[peer] = problem

    def _refusal(self, peer: str, now: float) -> CoterieError | None:
        return self._problems.get(peer)

    def detach(self, peer: str, reason: str) -> None:
        for (name, _), peer_lane in self._lanes.items():
            if name == peer and peer_lane.connection is not None:
                self._detach(peer_lane.connection, reason)

    def _open(self) -> None:
        self._hub.join(self)

    def _shut(self) -> None:
        self._hub.leave(self)
