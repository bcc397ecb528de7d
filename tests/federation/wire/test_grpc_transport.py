"""gRPC over mutual TLS: who gets in, what is said when not, breaks and returns, and many parties at once."""

from __future__ import annotations

import datetime as dt
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch

from coterie.errors import CoterieError, DeadlineError, IdentityError, RosterError, TransportError
from coterie.federation.identity import certificates, kit
from coterie.federation.identity.certificates import Authority, Member, Role
from coterie.federation.identity.kit import Kit, load_authority, load_kit
from coterie.federation.identity.provision import free_endpoints, local_kits
from coterie.federation.identity.roster import Roster, draft, install_roster, join, load_roster, sign
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.frame import CHUNK_BYTES, PROTOCOL_VERSION
from coterie.federation.wire.grpc_connection import GrpcConnection
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.handshake import Hello, compare, decode_hello
from coterie.federation.wire.transport import Address, Handler, Lane, Message
from helpers.waiting import until

QUICK = Settings(window=4, close_s=2.0, redial_s=0.05, refusal_s=0.3, heartbeat_s=0.3, silence_s=1.5, handshake_s=1.0)

Start = Callable[..., GrpcTransport]


def echo(peer: str, lane: Lane, message: Message) -> Message:
    return message


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes and starts a transport; closes all of them at the end."""
    with ExitStack() as stack:

        def make(kit: Kit, roster: Roster | None = None, handler: Handler = echo, **options: object) -> GrpcTransport:
            options.setdefault("settings", QUICK)
            transport = GrpcTransport(kit.name, roster or load_roster(kit), kit, **options)  # type: ignore[arg-type]
            stack.callback(transport.close)
            transport.start(handler)
            return transport

        yield make


@pytest.fixture
def kits(tmp_path: Path) -> dict[str, Kit]:
    return local_kits(tmp_path / "kits", ["alder", "birch"], federation="demo")


def authority_of(kits: dict[str, Kit]) -> Authority:
    return load_authority(kits["alder"].folder.parent / "ca")


def knock(
    endpoint: str, root: bytes, pair: tuple[bytes, bytes] | None, first: bytes = b"", name: str = "alder"
) -> str:
    """Open a lane as anybody could, without our transport; gives what came back, or why nothing did."""
    key, chain = pair if pair is not None else (None, None)
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    options = [("grpc.ssl_target_name_override", name), ("grpc.enable_retries", 0)]
    with grpc.secure_channel(endpoint, credentials, options=options) as channel:
        call = channel.stream_stream("/coterie.Lanes/Open", None, None)(iter([first]), timeout=60)
        try:
            return f"answer {next(call)!r}"
        except grpc.RpcError as error:
            return f"{error.code().name} {error.details()}"
        except StopIteration:
            return "end"


def pair_of(kit: Kit) -> tuple[bytes, bytes]:
    return certificates.key_pem(kit.key), certificates.cert_pem(kit.certificate)


def endpoint_of(kits: dict[str, Kit], name: str) -> str:
    return load_roster(kits["alder"]).entry(name).endpoint


def drain(call: Iterator[bytes]) -> None:
    """Read on until the stream ends; heartbeats may come before the end."""
    while True:
        next(call)


# ---- the two gates, listening side


def test_a_listed_certificate_gets_an_answer(kits: dict[str, Kit], start: Start) -> None:
    alder = start(kits["alder"])
    roster = load_roster(kits["alder"])
    run = roster.content_hash()[:16]
    hello = Hello("birch", "alder", Lane.CONTROL, "demo", 1, roster.content_hash(), run)
    root = certificates.cert_pem(kits["alder"].authority)
    assert "answer" in knock(endpoint_of(kits, "alder"), root, pair_of(kits["birch"]), hello.encode())
    until(lambda: not alder.connected())  # its side learns a little later that birch hung up


@pytest.mark.parametrize("whose", ["another ca", "none", "expired", "self-signed"])
def test_a_certificate_that_is_not_of_this_ca_or_not_valid_ends_the_tls_handshake(
    tmp_path: Path, kits: dict[str, Kit], start: Start, whose: str
) -> None:
    start(kits["alder"])
    authority, key = authority_of(kits), certificates.new_key()
    birch = Member("birch", Role.PARTY, "127.0.0.1:1")
    pair: tuple[bytes, bytes] | None
    if whose == "another ca":
        pair = pair_of(local_kits(tmp_path / "other", ["birch"], federation="demo")["birch"])
    elif whose == "none":
        pair = None
    elif whose == "expired":
        then = dt.datetime.now(dt.UTC) - dt.timedelta(days=9)
        old = authority.issue(birch, key.public_key(), days=3, now=then)
        pair = certificates.key_pem(key), certificates.cert_pem(old)
    else:
        own = certificates.new_authority("demo")
        pair = certificates.key_pem(own.key), certificates.cert_pem(own.certificate)
    answer = knock(endpoint_of(kits, "alder"), certificates.cert_pem(authority.certificate), pair, b"{}")
    assert answer.startswith("UNAVAILABLE")


def test_a_valid_certificate_outside_the_roster_is_refused_by_the_second_gate(
    kits: dict[str, Kit], start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start(kits["alder"])
    authority, key = authority_of(kits), certificates.new_key()
    for name in ("mallory", "birch"):  # a stranger; and a second certificate for a member
        certificate = authority.issue(Member(name, Role.PARTY, "127.0.0.1:1"), key.public_key())
        pair = certificates.key_pem(key), certificates.cert_pem(certificate)
        answer = knock(endpoint_of(kits, "alder"), certificates.cert_pem(authority.certificate), pair, b"{}")
        assert answer == "UNAUTHENTICATED roster-not-listed"
        assert f"of {name} is valid but not in the roster" in caplog.text


def test_a_member_cannot_speak_for_another(kits: dict[str, Kit], start: Start) -> None:
    start(kits["alder"])
    roster = load_roster(kits["alder"])
    hello = Hello("cedar", "alder", Lane.CONTROL, "demo", 1, roster.content_hash(), roster.content_hash()[:16])
    knock(
        endpoint_of(kits, "alder"),
        certificates.cert_pem(kits["alder"].authority),
        pair_of(kits["birch"]),
        hello.encode(),
    )
    assert (
        "introduced itself as cedar"
        in compare(Hello("alder", "birch", Lane.CONTROL, "demo", 1, "x", "y"), hello, "birch").message
    )  # type: ignore[union-attr]


def test_a_caller_that_says_nothing_is_cut_off(kits: dict[str, Kit], start: Start) -> None:
    start(kits["alder"])
    credentials = grpc.ssl_channel_credentials(
        certificates.cert_pem(kits["alder"].authority), *pair_of(kits["birch"])
    )
    options = [("grpc.ssl_target_name_override", "alder")]
    release = threading.Event()

    def nothing() -> Iterator[bytes]:
        release.wait(20)
        yield b""

    with grpc.secure_channel(endpoint_of(kits, "alder"), credentials, options=options) as channel:
        call = channel.stream_stream("/coterie.Lanes/Open", None, None)(nothing(), timeout=15)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        release.set()


def test_a_peer_whose_network_lives_but_whose_program_hangs_is_dropped(kits: dict[str, Kit], start: Start) -> None:
    """gRPC's own pings are answered by its core even then; only the missing heartbeats tell."""
    start(kits["alder"])
    roster = load_roster(kits["alder"])
    hello = Hello("birch", "alder", Lane.FORWARD, "demo", 1, roster.content_hash(), roster.content_hash()[:16])
    credentials = grpc.ssl_channel_credentials(
        certificates.cert_pem(kits["alder"].authority), *pair_of(kits["birch"])
    )
    release = threading.Event()

    def hang() -> Iterator[bytes]:
        yield hello.encode()
        release.wait(30)

    options = [("grpc.ssl_target_name_override", "alder")]
    with grpc.secure_channel(endpoint_of(kits, "alder"), credentials, options=options) as channel:
        call = channel.stream_stream("/coterie.Lanes/Open", None, None)(hang(), timeout=20)
        with pytest.raises((grpc.RpcError, StopIteration)) as caught:
            drain(call)
        release.set()
        assert isinstance(caught.value, StopIteration) or caught.value.code() is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff\xfe", b"[1]", b"x" * 5000, b'{"lane": 1}'])
def test_a_first_message_that_is_no_introduction_is_refused(kits: dict[str, Kit], start: Start, raw: bytes) -> None:
    start(kits["alder"])
    root = certificates.cert_pem(kits["alder"].authority)
    answer = knock(endpoint_of(kits, "alder"), root, pair_of(kits["birch"]), raw)
    assert answer == "PERMISSION_DENIED handshake-damaged"


def speak_rubbish(kits: dict[str, Kit]) -> None:
    """A hello of birch to alder and at once what is no frame; alder answers and ends the stream."""
    roster = load_roster(kits["alder"])
    hello = Hello("birch", "alder", Lane.FORWARD, "demo", 1, roster.content_hash(), roster.content_hash()[:16])
    credentials = grpc.ssl_channel_credentials(
        certificates.cert_pem(kits["alder"].authority), *pair_of(kits["birch"])
    )
    options = [("grpc.ssl_target_name_override", "alder")]
    with grpc.secure_channel(endpoint_of(kits, "alder"), credentials, options=options) as channel:
        call = channel.stream_stream("/coterie.Lanes/Open", None, None)(
            iter([hello.encode(), b"junk" * 50]), timeout=60
        )
        assert decode_hello(next(call), "alder").sender == "alder"
        with pytest.raises((grpc.RpcError, StopIteration)):
            drain(call)


def test_bytes_that_are_no_frame_end_the_connection_and_no_other(kits: dict[str, Kit], start: Start) -> None:
    handled: list[str] = []
    alder = start(kits["alder"], handler=lambda peer, lane, message: handled.append(message.kind))
    speak_rubbish(kits)
    # For a moment alder takes this process for a second one beside the one that spoke rubbish, and turns it away.
    birch = start(kits["birch"], settings=replace(QUICK, refusal_s=10.0))
    birch.connect(20.0)
    birch.request("alder", Lane.FORWARD, Message("fine"), 5.0)
    assert handled == ["fine"]
    assert alder.connected() == {"birch"}


def test_the_answer_is_sent_before_what_follows_the_hello_is_read(
    kits: dict[str, Kit], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rubbish right behind the hello, at a process whose worker is slow to send: the other side still learns whom it
    reached, before the stream ends."""
    outgoing = GrpcConnection.outgoing

    def slow(self: GrpcConnection) -> Iterator[bytes]:
        time.sleep(0.3)
        yield from outgoing(self)

    monkeypatch.setattr(GrpcConnection, "outgoing", slow)
    alder = start(kits["alder"])
    speak_rubbish(kits)
    until(lambda: not alder.connected())


# ---- the two gates, dialling side


@pytest.mark.parametrize("whose", ["another ca", "renewed", "expired"])
def test_the_dialling_side_talks_to_the_listed_certificate_alone(
    tmp_path: Path, kits: dict[str, Kit], start: Start, whose: str
) -> None:
    authority, key = authority_of(kits), certificates.new_key()
    member = Member("alder", Role.PARTY, "127.0.0.1:1")
    if whose == "another ca":
        authority = certificates.new_authority("demo")
    when = dt.datetime.now(dt.UTC) - dt.timedelta(days=9 if whose == "expired" else 0)
    shown = authority.issue(member, key.public_key(), days=3, now=when)
    reached: list[object] = []
    server = grpc.server(ThreadPoolExecutor(2))
    method = grpc.stream_stream_rpc_method_handler(lambda requests, context: reached.append(1) or iter([b"{}"]))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("coterie.Lanes", {"Open": method}),))
    credentials = grpc.ssl_server_credentials([(certificates.key_pem(key), certificates.cert_pem(shown))])
    server.add_secure_port(endpoint_of(kits, "alder"), credentials)
    server.start()
    try:
        birch = start(kits["birch"])
        with pytest.raises(IdentityError) as caught:
            birch.connect(8.0)
    finally:
        server.stop(0)
    expected = {
        "another ca": "peer-identity-other-ca",
        "renewed": "peer-certificate",
        "expired": "peer-identity-expired",
    }
    assert caught.value.code == expected[whose]
    assert "alder" in caught.value.message
    assert reached == []


def test_an_expired_certificate_is_refused_on_the_wire_even_when_the_roster_lists_it(
    tmp_path: Path, kits: dict[str, Kit]
) -> None:
    authority, key = authority_of(kits), certificates.new_key()
    then = dt.datetime.now(dt.UTC) - dt.timedelta(days=9)
    old = authority.issue(Member("alder", Role.PARTY, "127.0.0.1:1"), key.public_key(), days=3, now=then)
    server = grpc.server(ThreadPoolExecutor(2))
    credentials = grpc.ssl_server_credentials([(certificates.key_pem(key), certificates.cert_pem(old))])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        answer = knock(f"127.0.0.1:{port}", certificates.cert_pem(old), pair_of(kits["birch"]))
    finally:
        server.stop(0)
    assert answer.startswith("UNAVAILABLE")
    assert "CERTIFICATE_VERIFY_FAILED" in answer


def test_a_dialler_outside_the_others_roster_learns_why(kits: dict[str, Kit], start: Start) -> None:
    """birch has renewed its certificate and signed a roster of its own making; alder has the old roster."""
    authority, key = authority_of(kits), certificates.new_key()
    old = load_roster(kits["birch"])
    members = [Member(e.name, e.role, e.endpoint) for e in old.parties]
    renewed = authority.issue(members[1], key.public_key())
    issued = {"alder": kits["alder"].certificate, "birch": renewed}
    new = draft("demo", 1, members, issued, config_hash="", placement_hash="")
    new = sign(sign(new, key, renewed), kits["alder"].key, kits["alder"].certificate)
    start(kits["alder"])
    birch = start(replace(kits["birch"], key=key, certificate=renewed), new)
    with pytest.raises(TransportError, match="our certificate is valid but not in its roster") as caught:
        birch.connect(8.0)
    assert caught.value.code == "roster-not-listed"


# ---- refusals before anything is opened


def test_a_roster_changed_after_signing_is_refused_before_the_port_is_opened(kits: dict[str, Kit]) -> None:
    changed = replace(load_roster(kits["alder"]), placement_hash="another")
    with pytest.raises(RosterError, match="The roster was changed after alder signed it"):
        GrpcTransport("alder", changed, kits["alder"])


def test_another_members_kit_is_refused(kits: dict[str, Kit]) -> None:
    with pytest.raises(IdentityError) as caught:
        GrpcTransport("alder", load_roster(kits["alder"]), kits["birch"])
    assert caught.value.code == "identity-other-member"


def test_a_taken_port_is_one_clear_sentence(kits: dict[str, Kit], start: Start) -> None:
    host, port = endpoint_of(kits, "alder").split(":")
    with socket.create_server((host, int(port))):
        with pytest.raises(
            TransportError, match=f"alder cannot listen on {host}:{port}: the port is taken"
        ) as caught:
            start(kits["alder"])
        assert caught.value.code == "port-taken"
    start(kits["alder"])  # and it was left free


@pytest.mark.parametrize("name", ["alder", "birch"])
def test_the_same_member_cannot_run_twice(kits: dict[str, Kit], start: Start, name: str) -> None:
    start(kits[name])
    with pytest.raises(TransportError) as caught:
        start(kits[name])
    assert caught.value.code == "port-taken"


def test_an_address_of_another_machine_is_one_clear_sentence(kits: dict[str, Kit], start: Start) -> None:
    with pytest.raises(TransportError, match="this machine has no such address") as caught:
        start(kits["alder"], listen="192.0.2.1:7001")
    assert caught.value.code == "address-not-here"


def test_a_party_that_never_arrives_is_named_with_the_deadline(tmp_path: Path, start: Start) -> None:
    kits = local_kits(tmp_path / "kits", ["alder", "birch", "cedar"])
    birch = start(kits["birch"])
    with pytest.raises(DeadlineError, match=r"^alder, cedar did not arrive within 0\.5 s\.") as caught:
        birch.connect(0.5)
    assert "alder is not running there" in str(caught.value)  # birch dials alder
    assert "cedar (never heard of)" in str(caught.value)  # cedar would dial birch


# ---- the handshake


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        ({"run": "b"}, "handshake-run", r"(alder|birch) is in run `[ab]`, we are in run `[ab]`"),
        ({"epoch": 2}, "handshake-epoch", r"membership epoch \d; we are in demo, membership epoch \d"),
        ({"placement": "other"}, "roster-mismatch", r"has roster v1 \(\w{4}\.\.\), we have v1 \(\w{4}\.\.\)"),
    ],
)
def test_both_sides_refuse_another_run_epoch_or_roster_with_a_sentence(
    kits: dict[str, Kit], start: Start, change: dict[str, object], code: str, sentence: str
) -> None:
    mine = load_roster(kits["alder"])
    other = replace(
        mine,
        signatures={},
        membership_epoch=change.get("epoch", mine.membership_epoch),
        placement_hash=change.get("placement", mine.placement_hash),
    )
    for each in kits.values():
        other = sign(other, each.key, each.certificate)
    sides = [start(kits["alder"], mine, run="a"), start(kits["birch"], other, run=change.get("run", "a"))]
    for side in sides:
        with pytest.raises(CoterieError, match=sentence) as caught:
            side.connect(8.0)
        assert caught.value.code == code
        assert side.connected() == frozenset()


def test_another_protocol_version_is_named_on_both_sides() -> None:
    one = Hello("alder", "birch", 0, "demo", 1, "r", "run")
    other = replace(one, sender="birch", receiver="alder", protocol=PROTOCOL_VERSION + 1)
    for ours, theirs, peer in [(one, other, "birch"), (other, one, "alder")]:
        problem = compare(ours, theirs, peer)
        assert problem is not None
        assert problem.code == "handshake-protocol"
        assert f"{peer} speaks protocol version {theirs.protocol}, we speak {ours.protocol}" in problem.message


def test_a_later_protocol_may_say_more() -> None:
    hello = Hello("alder", "birch", 0, "demo", 1, "r", "run", protocol=9)
    assert decode_hello(hello.encode()[:-1] + b', "more": [1]}', "alder") == hello


# ---- connections that break, and peers that return


def test_a_peer_that_returns_is_connected_again_and_old_requests_have_failed(
    kits: dict[str, Kit], start: Start
) -> None:
    gate = threading.Event()
    birch = start(kits["birch"])
    alder = start(kits["alder"], handler=lambda *_: gate.wait(10) and None)
    birch.connect(10.0)
    pending = birch.request_async("alder", Lane.FORWARD, Message("dispatch"), 30.0)
    alder.close()
    with pytest.raises(TransportError) as caught:
        pending.result(10)
    assert caught.value.code == "connection-lost"
    gate.set()
    start(kits["alder"])
    birch.connect(10.0)
    assert birch.request("alder", Lane.FORWARD, Message("again", Address(round=2)), 5.0).address.round == 2


def test_a_listener_hears_again_from_a_dialler_that_returns(kits: dict[str, Kit], start: Start) -> None:
    alder = start(kits["alder"])
    for attempt in range(3):
        birch = start(kits["birch"])
        alder.connect(10.0)
        message = Message("grad", Address(attempt=attempt))
        assert alder.request("birch", Lane.BACKWARD, message, 5.0).address == message.address
        birch.close()


def test_a_dialler_that_returns_is_not_held_back_by_what_it_sent_before(kits: dict[str, Kit], start: Start) -> None:
    gate = threading.Event()
    handled: list[int] = []

    def wait(peer: str, lane: Lane, message: Message) -> None:
        gate.wait(20)
        handled.append(message.address.round)

    start(kits["alder"], handler=wait)
    for attempt in range(3):
        birch = start(kits["birch"])
        birch.connect(10.0)
        futures = [
            birch.request_async(
                "alder", Lane.FORWARD, Message("dispatch", Address(round=10 * attempt + number)), 20.0
            )
            for number in range(QUICK.window)
        ]
        if attempt < 2:
            birch.close()
    gate.set()
    for future in futures:
        future.result(10)
    assert handled[-QUICK.window :] == [20, 21, 22, 23]
    assert handled == sorted(handled)


def test_a_peer_that_ignores_the_window_is_disconnected(kits: dict[str, Kit], start: Start) -> None:
    gate = threading.Event()
    start(kits["alder"], handler=lambda *_: gate.wait(20) and None)
    birch = start(kits["birch"], settings=replace(QUICK, window=50))
    birch.connect(10.0)
    futures = [birch.request_async("alder", Lane.FORWARD, Message("dispatch"), 20.0) for _ in range(10)]
    with pytest.raises(TransportError) as caught:
        futures[-1].result(10)
    assert caught.value.code == "connection-lost"
    gate.set()


def test_replies_already_given_still_leave_when_a_side_closes(kits: dict[str, Kit], start: Start) -> None:
    tensor = torch.ones(2_000_000)
    alder = start(kits["alder"], handler=lambda *_: Message("weights", tensors=(tensor,)))
    birch = start(kits["birch"])
    birch.connect(10.0)
    pending = birch.request_async("alder", Lane.FORWARD, Message("get"), 10.0)
    while alder.counters().total("birch", Lane.FORWARD).messages_sent == 0:
        time.sleep(0.01)
    alder.close()
    assert torch.equal(pending.result(10).tensors[0], tensor)


class Relay:
    """Passes bytes between a port and an endpoint until `freeze`, then keeps connections open and passes nothing."""

    def __init__(self, target: str) -> None:
        self._target = (target.split(":")[0], int(target.split(":")[1]))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._flow = threading.Event()
        self._flow.set()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._flow.clear()

    def thaw(self) -> None:
        self._flow.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self._flow.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._flow.set()
        for each in [self._server, *self._sockets]:
            each.close()


@pytest.mark.parametrize("noticed_by", ["missing heartbeats", "http/2 ping"])
def test_a_peer_that_falls_silent_is_noticed_and_comes_back(tmp_path: Path, start: Start, noticed_by: str) -> None:
    # With an endless silence allowed, only gRPC's own ping can tell that nobody is there.
    settings = QUICK if noticed_by == "missing heartbeats" else replace(QUICK, silence_s=3600.0)
    (listen,) = free_endpoints(1)
    relay = Relay(listen)
    try:
        authority = certificates.new_authority("demo")
        members = [Member("alder", Role.PARTY, relay.endpoint), Member("birch", Role.PARTY, free_endpoints(1)[0])]
        keys = {m.name: certificates.new_key() for m in members}
        issued = {m.name: authority.issue(m, keys[m.name].public_key()) for m in members}
        roster = draft("demo", 1, members, issued, config_hash="", placement_hash="")
        for name, key in keys.items():
            roster = sign(roster, key, issued[name])
        made = {n: Kit(tmp_path, n, Role.PARTY, "demo", keys[n], issued[n], authority.certificate) for n in keys}

        def slow_once(peer: str, lane: Lane, message: Message) -> Message:
            if message.kind == "slow":
                time.sleep(2 * QUICK.silence_s)
            return message

        alder = start(made["alder"], roster, handler=slow_once, listen=listen, settings=settings)
        birch = start(made["birch"], roster, settings=settings)
        birch.connect(10.0)
        birch.request("alder", Lane.FORWARD, Message("slow"), 20.0)  # heartbeats keep an idle connection
        relay.freeze()
        pending = birch.request_async("alder", Lane.FORWARD, Message("dispatch"), 60.0)
        with pytest.raises(TransportError) as caught:
            pending.result(20)
        assert caught.value.code == "connection-lost"
        until(lambda: not alder.connected())
        relay.thaw()
        birch.connect(20.0)
        assert birch.request("alder", Lane.FORWARD, Message("again", Address(round=3)), 10.0).address.round == 3
    finally:
        relay.close()


# ---- many parties, many bytes


def test_eight_parties_with_large_tensors_in_both_directions_at_once(tmp_path: Path, start: Start) -> None:
    """Every party asks every other on both lanes at the same time; each reply is as large as its request."""
    names = [f"party{n}" for n in range(8)]
    kits = local_kits(tmp_path / "kits", names)
    usual = Settings()
    members = [start(kit, handler=lambda _, __, m: replace(m, kind="back"), settings=usual) for kit in kits.values()]
    for member in members:
        member.connect(30.0)
    tensor = torch.arange(2 * CHUNK_BYTES // 4 + 999, dtype=torch.int32)
    futures = [
        member.request_async(peer, lane, Message("there", Address(round=number), tensors=(tensor,)), 60.0)
        for number in range(2)
        for member in members
        for peer in member.peers
        for lane in (Lane.FORWARD, Lane.BACKWARD)
    ]
    assert len(futures) == 2 * 8 * 7 * 2
    for future in futures:
        reply = future.result(60.0)
        assert torch.equal(reply.tensors[0], tensor)
    for member in members:
        total = member.counters().total()
        assert total.tensor_bytes_sent == total.tensor_bytes_received == 2 * 2 * 7 * 2 * tensor.nbytes
        assert total.payload_bytes_sent <= 1.03 * total.tensor_bytes_sent


def test_payload_is_at_most_three_percent_above_the_tensors_that_move(kits: dict[str, Kit], start: Start) -> None:
    """Rows of a small exchange: 64 tokens of width 512 in bfloat16, ids and weights beside them, there and back."""
    alder, birch = start(kits["alder"]), start(kits["birch"])
    birch.connect(10.0)
    rows, ids, weights = torch.randn(64, 512).bfloat16(), torch.zeros(64, 2, dtype=torch.int32), torch.randn(64, 2)
    for number in range(20):
        message = Message("dispatch", Address(round=number), tensors=(rows, ids, weights), body={"tokens": 64})
        birch.request("alder", Lane.FORWARD, message, 10.0)
    total = birch.counters().total(lane=Lane.FORWARD)
    assert total.tensor_bytes_sent == 20 * (rows.nbytes + ids.nbytes + weights.nbytes)
    assert total.payload_bytes_sent <= 1.03 * total.tensor_bytes_sent
    assert alder.counters().total(lane=Lane.FORWARD).payload_bytes_received <= 1.03 * total.tensor_bytes_sent


def test_members_that_made_their_own_keys_talk_to_each_other(tmp_path: Path, start: Start) -> None:
    """request, approve, install, sign, join: two organisations, each with a key of its own, then they talk."""
    authority = certificates.new_authority("demo")
    endpoints = free_endpoints(2)
    members = certificates.members_of({"alder": endpoints[0], "birch": endpoints[1]}, None)
    told = certificates.fingerprint(authority.certificate)
    installed: dict[str, Kit] = {}
    for member in members:
        asked = kit.request(member, "demo", tmp_path / member.name)
        _, certificate = kit.approve(asked.read_bytes(), members, authority)
        installed[member.name] = kit.install(tmp_path / member.name, certificate, authority.certificate, told)
    issued = {name: k.certificate for name, k in installed.items()}
    blank = draft("demo", 1, members, issued, config_hash="c", placement_hash="p")
    agreed = join([sign(blank, k.key, k.certificate) for k in installed.values()])
    for each in installed.values():
        install_roster(each, agreed)
    started = [start(load_kit(tmp_path / name)) for name in installed]
    started[1].connect(10.0)
    assert started[1].request("alder", Lane.CONTROL, Message("hello", Address(round=5)), 5.0).address.round == 5
