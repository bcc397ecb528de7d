"""The real transport: gRPC streams over mutual TLS, one per pair of members and lane.

Of two members the later in roster order dials the earlier. The dialling side trusts, for this one connection, only
the certificate the roster lists for that peer (its issue by the CA was checked with the roster); the listening side
trusts the CA, then looks the certificate up in the roster. So on both sides a valid certificate outside the roster is
no use.

Every stream has a reader thread (the dialling thread, or one beside gRPC's handler thread) and a sending thread
(gRPC's own); neither computes. gRPC must not be used across a fork: start no forked process after
`GrpcTransport.start`.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
from cryptography import x509

from coterie.errors import CoterieError, FrameError, IdentityError, TransportError
from coterie.federation.identity import certificates
from coterie.federation.identity.certificates import Role
from coterie.federation.identity.kit import Kit
from coterie.federation.identity.roster import Roster, RosterEntry, verify
from coterie.federation.wire import newcomers, unreachable
from coterie.federation.wire.base_transport import ALL_LANES, BaseTransport, Settings
from coterie.federation.wire.frame import CHUNK_BYTES, Encoded, FrameReader, FrameScope
from coterie.federation.wire.grpc_connection import GrpcConnection
from coterie.federation.wire.handshake import Hello, compare, decode_hello, twin
from coterie.federation.wire.newcomers import Newcomers
from coterie.federation.wire.own_time import OwnTime
from coterie.federation.wire.pace import Pace
from coterie.federation.wire.seldom import EVERY_S
from coterie.federation.wire.transport import TWIN, Lane, Message

log = logging.getLogger(__name__)

_SERVICE, _METHOD = "coterie.Lanes", "Open"
_SPARE_WORKERS = 4
_LOOK_S = 0.1


DIRECT: tuple[tuple[str, int | str], ...] = (
    ("grpc.so_reuseport", 0),  # else a second process would silently share the port
    ("grpc.enable_http_proxy", 0),  # members dial each other past any proxy in the environment, as `doctor` does
    ("grpc.address_http_proxy", ""),  # the same for the proxy by address, which the line above leaves on
)
"""gRPC channel arguments of everything that listens or dials here."""


def _options(settings: Settings, *, bulk: bool) -> list[tuple[str, int | str]]:
    """gRPC channel arguments of both sides.

    gRPC's core answers pings without Python: a process that is busy answers, one that is frozen or cut off does not.
    On a connection that carries tensors a ping can wait behind megabytes, so those are patient.
    The ping timeout is set beside the keepalive timeout: without it a frozen peer was noticed only after a minute,
    because that is its default when keepalive is on.
    """
    patient = int(settings.heartbeat_s * 2000)
    ping_ms = patient if bulk else min(patient, int(settings.ping_s * 1000))
    return [
        ("grpc.max_receive_message_length", CHUNK_BYTES + 1024),
        ("grpc.max_send_message_length", CHUNK_BYTES + 1024),
        ("grpc.http2.max_frame_size", 4 * CHUNK_BYTES),
        ("grpc.keepalive_time_ms", ping_ms if bulk else ping_ms // 2),
        ("grpc.keepalive_timeout_ms", ping_ms),
        ("grpc.http2.ping_timeout_ms", ping_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", ping_ms // 2),
        ("grpc.http2.max_ping_strikes", 0),
        *DIRECT,
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for every lane
        ("grpc.initial_reconnect_backoff_ms", int(settings.redial_s * 1000)),
        ("grpc.min_reconnect_backoff_ms", int(settings.dial_s * 1000)),  # how long one try to connect may take
        ("grpc.max_reconnect_backoff_ms", int(settings.dial_s * 1000)),
    ]


_ALIVE_BEATS = 3
"""A process that was heard within so many heartbeats is alive."""


class GrpcTransport(BaseTransport):
    """The `Transport` of one member.

    Args:
        me: this member's name.
        roster: checked here once more: every signature, and that ``kit`` is in it.
        kit: key, certificate and CA certificate.
        run: name of the run; both sides of every connection must have the same. Default: from the roster's hash.
        listen: ``host:port`` to listen on when it differs from the roster's endpoint (behind a port forwarding).
        dial: ``host:port`` to dial in place of a peer's endpoint (where something carries the connection there); who
            answers is held to the roster's certificate all the same.
        settings: times and bounds.

    Raises:
        RosterError, IdentityError: roster or kit do not check out.
    """

    def __init__(
        self,
        me: str,
        roster: Roster,
        kit: Kit,
        *,
        run: str | None = None,
        listen: str | None = None,
        dial: Mapping[str, str] | None = None,
        settings: Settings | None = None,
    ) -> None:
        if kit.name != me:
            raise IdentityError(
                f"The kit in {kit.folder} is {kit.name}'s, not {me}'s.",
                code="identity-other-member",
                fix="name the kit of this member in party.yaml (`kit`) or with --kit",
            )
        verify(roster, kit.authority)
        self._entry = roster.admit(kit.certificate, kit.role)
        self._roster, self._kit = roster, kit
        self._run = run if run is not None else roster.content_hash()[:16]
        others = [entry for entry in roster.parties if entry.name != me]
        mine = self._entry.role
        super().__init__(
            me,
            {entry.name: _lanes_between(mine, entry.role) for entry in others},
            FrameScope.of_run(self._run, roster.membership_epoch),
            settings or Settings(),
            [entry.name for entry in others if Role.COORDINATOR in (mine, entry.role)],
        )
        order = [entry.name for entry in roster.parties]
        self._dialled = tuple(name for name in self.peers if order.index(name) < order.index(me))
        self._listen = listen or self._entry.endpoint
        self._endpoints = {**{e.name: e.endpoint for e in others}, **unreachable.known(dial or {}, others)}
        self._newcomers: Newcomers | None = None
        self._looked = 0.0
        self._time = OwnTime()
        self._paces = {peer: Pace(time.monotonic()) for peer in self.peers}
        self._server: grpc.Server | None = None
        self._channels: list[grpc.Channel] = []
        self._dialers: list[threading.Thread] = []
        self._connections: set[GrpcConnection] = set()
        self._greeting: dict[object, tuple[str, float, grpc.RpcContext]] = {}
        self._problems: dict[str, tuple[float, CoterieError]] = {}
        self._process = secrets.token_hex(8)
        self._broken: dict[str, tuple[str, float]] = {}  # by peer, the process whose connection broke last, and when
        self._warned: dict[str, float] = {}
        self._guard = threading.Lock()

    @property
    def address(self) -> str:
        """`host:port` that this member listens on."""
        return self._listen

    # ---- opening and closing ---------------------------------------------------------------------------------

    def _open(self) -> None:
        self._serve_lanes()
        for peer in self._dialled:
            for lane in _lanes_between(self._entry.role, self._roster.entry(peer).role):
                name = f"{self.me}-dial-{peer}-{lane.name.lower()}"
                thread = threading.Thread(target=self._keep_dialling, args=(peer, lane), name=name, daemon=True)
                self._dialers.append(thread)
                thread.start()

    def _serve_lanes(self) -> None:
        """Listen. Every open stream holds one worker of the pool, so the pool is sized from the roster: streams that
        stand, those that replace them, and one more for each that has not introduced itself.

        The last member listens too, though nobody dials it: so that it cannot be started twice.
        """
        callers = [name for name in self.peers if name not in self._dialled]
        streams = sum(len(_lanes_between(self._entry.role, self._roster.entry(name).role)) for name in callers)
        workers = 3 * streams + _SPARE_WORKERS
        newcomers.check_descriptors(self.me, streams, len(self._lanes) - streams)
        bulk = self._entry.role is not Role.COORDINATOR
        server = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix=f"{self.me}-serve"),
            options=[
                *_options(self._settings, bulk=bulk),
                ("grpc.server_handshake_timeout_ms", int(self._settings.handshake_s * 1000)),
                ("grpc.max_allowed_incoming_connections", newcomers.most_connections(streams)),
                ("grpc.max_concurrent_streams", 1),  # a connection of its own for every lane
            ],
            maximum_concurrent_rpcs=workers,
        )
        pair = (certificates.key_pem(self._kit.key), certificates.cert_pem(self._kit.certificate))
        credentials = grpc.ssl_server_credentials(
            [pair], root_certificates=certificates.cert_pem(self._kit.authority), require_client_auth=True
        )
        try:
            port = server.add_secure_port(self._listen, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise unreachable.cannot_listen(self.me, self._listen)
        strangers = Newcomers(port, self._settings.handshake_s)
        method = grpc.stream_stream_rpc_method_handler(partial(self._accept, strangers))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method}),))
        server.start()
        self._server, self._newcomers = server, strangers

    def _shut(self) -> None:
        with self._guard:
            connections = list(self._connections)
        for connection in connections:
            connection.close()
        until = time.monotonic() + self._settings.close_s
        for connection in connections:
            connection.drained.wait(max(0.0, until - time.monotonic()))
        if self._server is not None:
            self._server.stop(grace=0.5)
        with self._guard:
            channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()
        for connection in connections:
            connection.cut()
        for dialer in self._dialers:
            if dialer.is_alive():
                dialer.join(max(0.1, until - time.monotonic()))

    def _tick(self, now: float) -> None:
        heard = self._time.now()
        with self._guard:
            silent = [
                connection for connection in self._connections if heard - connection.heard > self._settings.silence_s
            ]
            slow = [call for _, since, call in self._greeting.values() if now - since > self._settings.handshake_s]
        for connection in silent:
            log.warning(
                "nothing came from %s for %g s, lane %s",
                connection.peer,
                self._settings.silence_s,
                connection.lane.name,
            )
            connection.cut()
        for call in slow:
            call.cancel()
        if self._newcomers is not None and now - self._looked >= _LOOK_S:
            self._looked = now
            ended = self._newcomers.look(now)
            if ended:
                self._seldom.log("newcomers", logging.WARNING, "ended connections that had not shown who they are")
        self._seldom.tick()

    # ---- the listening side ----------------------------------------------------------------------------------

    def _accept(
        self, strangers: Newcomers, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """One incoming stream; runs in a worker of gRPC's pool, which then sends."""
        try:
            entry = self._roster.admit(peer_certificate(context))
        except CoterieError as error:
            self._seldom.log(("refused", error.message), logging.WARNING, f"refused a connection: {error}")
            context.abort(grpc.StatusCode.UNAUTHENTICATED, error.code)
        peer = entry.name
        try:
            theirs = self._first_message(requests, context, peer)
            lane = self._lane_for(entry, theirs)
        except CoterieError as error:
            self._refuse(peer, error)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, error.code)
        ours = self._hello(peer, lane)
        problem = compare(ours, theirs, peer)
        if problem is not None:
            self._refuse(peer, problem)
            yield ours.encode()  # the other side finds the same difference by itself
            return
        if self._another_is_alive(peer, theirs.process):
            self._turn_away_twin(peer)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "identity-in-use")
        connection = self._connection(peer, lane, ours)
        connection.process = theirs.process
        connection.on_cut(context.cancel)
        address = context.peer()  # gRPC forgets it once the stream has ended
        strangers.admit(address)

        def ended() -> None:
            connection.close()
            strangers.leave(address)

        if not context.add_callback(ended):
            ended()
        reader = threading.Thread(
            target=self._read,
            args=(connection, requests),
            name=f"{self.me}-read-{peer}-{lane.name.lower()}",
            daemon=True,
        )
        self._attach(connection)
        self._welcome(peer)
        outgoing = connection.outgoing()
        try:
            yield next(
                outgoing
            )  # gRPC asks for more once it is sent: what is read first could end the stream before it
        finally:
            reader.start()  # also where the stream ended meanwhile: the reader sees that, and detaches
        yield from outgoing

    def _first_message(self, requests: Iterator[bytes], context: grpc.ServicerContext, peer: str) -> Hello:
        token = object()
        with self._guard:
            most = sum(1 for name, _ in self._lanes if name == peer)
            if sum(1 for name, _, _ in self._greeting.values() if name == peer) >= most:
                raise TransportError(
                    f"{peer} opens more streams than it has lanes.",
                    code="handshake-busy",
                    fix="see whether a second process of that member runs",
                )
            self._greeting[token] = (peer, time.monotonic(), context)
        try:
            return decode_hello(next(requests), peer)
        except (grpc.RpcError, StopIteration) as error:
            raise TransportError(
                f"{peer} connected and said nothing.",
                code="handshake-damaged",
                fix="check that what connects there is coterie, of this version",
            ) from error
        finally:
            with self._guard:
                del self._greeting[token]

    def _lane_for(self, entry: RosterEntry, theirs: Hello) -> Lane:
        if entry.name in self._dialled or entry.name == self.me:
            raise TransportError(
                f"{entry.name} dialled us, but it comes earlier in the roster.",
                code="handshake-direction",
                fix="have everybody install the same roster",
            )
        for lane in _lanes_between(self._entry.role, entry.role):
            if lane == theirs.lane:
                return lane
        raise TransportError(
            f"{entry.name} asked for lane {theirs.lane}, which it has not.",
            code="handshake-lane",
            fix="run the same version of coterie everywhere",
        )

    # ---- the dialling side -----------------------------------------------------------------------------------

    def _keep_dialling(self, peer: str, lane: Lane) -> None:
        """Dial, talk until the connection breaks, pause, dial again. Reads what comes in between."""
        pause = first = self._settings.redial_s
        while not self._stopped.is_set():
            try:
                talked = self._dial(peer, lane)
                pause = first if talked else min(2 * pause, 16 * first)
            except Exception:
                log.exception("dialling %s failed", peer)
                pause = 16 * first
            self._stopped.wait(pause)

    def _dial(self, peer: str, lane: Lane) -> bool:
        """One connection from its opening to its end; False if it never came about."""
        ours = self._hello(peer, lane)
        connection = self._connection(peer, lane, ours)
        channel = self._channel(peer, lane)
        if channel is None:
            return False
        try:
            call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}", None, None)(connection.outgoing())
            connection.on_cut(call.cancel)
            try:
                theirs = self._answer_to_hello(call, peer)
            except CoterieError as error:
                self._refuse(peer, error)
                return False
            problem = compare(ours, theirs, peer)
            if problem is not None:
                self._refuse(peer, problem)
                return False
            if self._another_is_alive(peer, theirs.process):
                self._refuse(peer, twin(peer, self.me))
                return False
            connection.process, connection.heard = theirs.process, self._time.now()
            self._attach(connection)
            self._welcome(peer)
            if not self._read(connection, call) and lane is Lane.CONTROL:
                self._cut_others(peer)
            return True
        finally:
            connection.cut()
            with self._guard:
                self._connections.discard(connection)
                if channel in self._channels:
                    self._channels.remove(channel)
            channel.close()

    def _cut_others(self, peer: str) -> None:
        """A peer's lanes fall with its control lane: the others carry tensors and notice a dead peer much later."""
        with self._guard:
            others = [
                connection
                for connection in self._connections
                if connection.peer == peer and connection.lane is not Lane.CONTROL
            ]
        for connection in others:
            connection.cut()

    def _channel(self, peer: str, lane: Lane) -> grpc.Channel | None:
        """A channel that trusts the one certificate the roster lists for ``peer``; None once this side is closing."""
        credentials = grpc.ssl_channel_credentials(
            root_certificates=certificates.cert_pem(self._roster.certificate_of(peer)),
            private_key=certificates.key_pem(self._kit.key),
            certificate_chain=certificates.cert_pem(self._kit.certificate),
        )
        options = [*_options(self._settings, bulk=lane is not Lane.CONTROL), ("grpc.ssl_target_name_override", peer)]
        channel = grpc.secure_channel(self._endpoints[peer], credentials, options=options)
        with self._guard:
            if not self._stopped.is_set():
                self._channels.append(channel)
                return channel
        channel.close()
        return None

    def _answer_to_hello(self, call: grpc.Call, peer: str) -> Hello:
        token = object()
        with self._guard:
            self._greeting[token] = (peer, time.monotonic(), call)
        try:
            return decode_hello(next(call), peer)
        except grpc.RpcError as error:
            raise unreachable.why_refused(peer, self._endpoints[peer], self._roster, self._kit, error) from None
        except StopIteration:
            raise TransportError(
                f"{peer} hung up during the handshake.",
                code="unreachable",
                fix="nothing: it is dialled again; if it comes back, see the log there",
            ) from None
        finally:
            with self._guard:
                del self._greeting[token]

    # ---- both sides ------------------------------------------------------------------------------------------

    def _another_is_alive(self, peer: str, process: str) -> bool:
        """Whether another process with the peer's kit was heard lately, or lost its connection just now.

        One that died has no connection, one that is frozen sends no heartbeat: neither keeps a restart out for long.
        """
        settings, now = self._settings, self._time.now()
        with self._guard:
            others = [
                connection.heard
                for connection in self._connections
                if connection.peer == peer and connection.process not in ("", process)
            ]
            broken = self._broken.get(peer, (process, 0.0))
        alive = any(now - heard <= _ALIVE_BEATS * settings.heartbeat_s for heard in others)
        return alive or (broken[0] != process and now - broken[1] <= 16 * settings.redial_s)

    def _turn_away_twin(self, peer: str) -> None:
        """Note it here, and tell the process that goes on, at most once a minute."""
        self._seldom.log(("twin", peer), logging.WARNING, f"{peer}: {twin(peer, self.me)}")
        now = time.monotonic()
        with self._guard:
            due = now - self._warned.get(peer, -math.inf) >= EVERY_S
            if due:
                self._warned[peer] = now
        if due and self._lanes[peer, Lane.CONTROL].connection is not None:
            try:
                self.send(peer, Lane.CONTROL, Message(TWIN))
            except TransportError as error:
                log.info("%s was not told of its second process: %s", peer, error.message)

    def _hello(self, peer: str, lane: Lane) -> Hello:
        roster = self._roster
        return Hello(
            self.me,
            peer,
            lane,
            roster.federation,
            roster.membership_epoch,
            roster.content_hash(),
            self._run,
            self._scope.protocol,
            self._process,
        )

    def _connection(self, peer: str, lane: Lane, ours: Hello) -> GrpcConnection:
        def heartbeat() -> Encoded:
            encoded = self._heartbeat(lane)
            self._count_heartbeat(peer, lane, encoded)
            return encoded

        connection = GrpcConnection(
            peer, lane, ours.encode(), heartbeat, self._settings.heartbeat_s, self._time.now()
        )
        with self._guard:
            self._connections.add(connection)
        return connection

    def _read(self, connection: GrpcConnection, chunks: Iterator[bytes]) -> bool:
        """Put chunks together and file the frames, until the stream ends. Neither computes nor sends.

        Returns:
            Whether the other side ended it in good order; False: it broke.
        """
        reason, in_order = f"{connection.peer} closed it", False
        reader = FrameReader(self._scope, connection.lane)
        try:
            for chunk in chunks:
                connection.heard = self._time.now()
                frame = reader.feed(chunk)
                if frame is not None:
                    self._arrived(connection, frame)
                pause = self._paces[connection.peer].pause(len(chunk), connection.heard)
                if pause:  # what is not read waits at the sender: gRPC holds little
                    self._stopped.wait(pause)
            in_order = True
        except FrameError as error:
            reason = f"it sent a frame that does not check out ({error.code})"
            key = ("closing", connection.peer, error.code)
            self._seldom.log(key, logging.ERROR, f"closing the connection to {connection.peer}: {error}")
        except grpc.RpcError as error:
            reason = _status_of(error)
        finally:
            self._detach(connection, reason)
            connection.cut()
            with self._guard:
                self._connections.discard(connection)
                if not in_order:
                    self._broken[connection.peer] = (connection.process, connection.heard)
        return in_order

    def _refuse(self, peer: str, error: CoterieError) -> None:
        """Note why there is no connection; logged when it is news."""
        now = time.monotonic()
        with self._guard:
            known = self._problems.get(peer)
            same = known is not None and known[1].code == error.code
            self._problems[peer] = (known[0] if same and known is not None else now, error)
        if not same:
            log.log(logging.INFO if error.code == "unreachable" else logging.WARNING, "%s: %s", peer, error)

    def _welcome(self, peer: str) -> None:
        with self._guard:
            self._problems.pop(peer, None)

    def _last_seen(self, peer: str) -> str:
        expired = self._expired(peer)
        problem = expired or (self._problems[peer][1] if peer in self._problems else None)
        return "never heard of" if problem is None else problem.message.rstrip(".")

    def _expired(self, peer: str) -> IdentityError | None:
        """Whether our certificate has ended, or a peer's: no connection comes about any more that could tell it."""
        try:
            self._kit.check_dates()
            certificates.check_dates(self._roster.certificate_of(peer), f"The certificate of {peer}")
        except IdentityError as error:
            return error
        return None

    def _refusal(self, peer: str, now: float) -> CoterieError | None:
        expired = self._expired(peer)
        if expired is not None:
            return expired
        problem = self._problems.get(peer)
        if problem is None or problem[1].code == "unreachable":
            return None
        settings, patience = self._settings, self._settings.refusal_s
        if problem[1].code == "identity-in-use":  # after a crash the other process may only seem to be alive
            patience += _ALIVE_BEATS * settings.heartbeat_s + 16 * settings.redial_s
        return None if now - problem[0] < patience else problem[1]


def _lanes_between(one: Role, other: Role) -> tuple[Lane, ...]:
    return (Lane.CONTROL,) if Role.COORDINATOR in (one, other) else ALL_LANES


def peer_certificate(context: grpc.ServicerContext) -> x509.Certificate:
    """What the other end of an incoming call showed, once TLS has checked it; IdentityError below TLS 1.3."""
    facts = context.auth_context()
    if facts.get("ssl_tls_version") != [b"TLSv1.3"]:
        raise IdentityError(
            "A connection came with an older TLS than 1.3.",
            code="identity-tls-version",
            fix="connect with coterie; nothing else has business at this port",
        )
    shown = facts.get("x509_pem_cert", [])
    if len(shown) != 1:
        raise IdentityError(
            "A connection came without a certificate.",
            code="identity-missing",
            fix="connect with coterie and a kit of this federation",
        )
    return certificates.parse_certificate(shown[0], "The certificate of a connection", "incoming connection")


def _status_of(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call):
        return f"the connection ended ({str(error.code()).removeprefix('StatusCode.').lower()})"
    return "the connection ended"
