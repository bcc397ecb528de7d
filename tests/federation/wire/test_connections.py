"""Who has not shown a member's certificate, or sends more than is good, takes nothing from those who have."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import torch

from coterie.errors import DataError, TransportError
from coterie.federation.identity import certificates
from coterie.federation.identity.kit import Kit
from coterie.federation.identity.provision import local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire import newcomers
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.frame import FrameType, encode
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.handshake import decode_hello
from coterie.federation.wire.newcomers import NEWCOMERS, Newcomers, parse_peer
from coterie.federation.wire.pace import BURST, RATE, Pace
from coterie.federation.wire.seldom import EVERY_S, Seldom
from coterie.federation.wire.transport import Lane, Message
from coterie.federation.wire.unreachable import split_endpoint

QUICK = Settings(window=4, close_s=2.0, redial_s=0.05, refusal_s=0.3, heartbeat_s=0.3, silence_s=5.0, handshake_s=2.0)
HALF_OPEN = 1500

Start = Callable[..., GrpcTransport]


@pytest.fixture
def kits(tmp_path: Path) -> dict[str, Kit]:
    return local_kits(tmp_path / "kits", ["alder", "birch", "cedar"], federation="demo")


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def make(kit: Kit, handler: object = lambda peer, lane, message: message) -> GrpcTransport:
            transport = GrpcTransport(kit.name, load_roster(kit), kit, settings=QUICK)
            stack.callback(transport.close)
            transport.start(handler)  # type: ignore[arg-type]
            return transport

        yield make


def address_of(kits: dict[str, Kit], name: str) -> tuple[str, int]:
    return split_endpoint(load_roster(kits["alder"]).entry(name).endpoint)


def own_sockets() -> int:
    """Sockets of this process, both ends of its own connections included."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread closed it meanwhile
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket")
    return found


def ended(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection over which nothing was sent."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_half_open_connections_are_few_and_short_lived_and_members_come_in_among_them(
    kits: dict[str, Kit], start: Start
) -> None:
    alder = start(kits["alder"])
    before = own_sockets()
    with ExitStack() as stack:
        opened: list[socket.socket] = []
        flooding = threading.Event()

        def flood() -> None:
            """Keeps ``HALF_OPEN`` connections open for as long as it runs, a new one for each that was ended."""
            while not flooding.is_set():
                with contextlib.suppress(OSError):
                    opened.append(stack.enter_context(socket.create_connection(address_of(kits, "alder"), timeout=2)))
                if len(opened) >= HALF_OPEN:
                    time.sleep(0.002)
                    opened.pop(0).close()

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            time.sleep(0.5)
            birch = start(kits["birch"])
            birch.connect(20.0, ["alder"])
            assert birch.request("alder", Lane.CONTROL, Message("fine"), 5.0).kind == "fine"
            # Our own ends of the flood are descriptors of this process, too.
            held_by_us = own_sockets() - before - len(opened)
            assert held_by_us < 2 * newcomers.most_connections(9)
        finally:
            flooding.set()
            thread.join()
        until = time.monotonic() + QUICK.handshake_s + 5.0
        while not all(ended(each) for each in opened) and time.monotonic() < until:
            time.sleep(0.05)
        assert all(ended(each) for each in opened)
        assert birch.request("alder", Lane.CONTROL, Message("fine"), 5.0).kind == "fine"
        assert alder.connected() == {"birch"}


def test_one_that_talks_tls_and_then_nothing_is_ended_as_well(kits: dict[str, Kit], start: Start) -> None:
    """A handshake with a member's own key, and no stream."""
    start(kits["alder"])
    with secured(kits, ssl.TLSVersion.TLSv1_3) as connection:
        assert connection.version() == "TLSv1.3"
        connection.settimeout(QUICK.handshake_s + 5.0)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while connection.recv(4096):
                pass


@contextlib.contextmanager
def secured(kits: dict[str, Kit], version: ssl.TLSVersion) -> Iterator[ssl.SSLSocket]:
    """A connection to alder with birch's key and certificate, in one version of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    key, chain = (kits["birch"].folder / name for name in ("probe.key", "probe.crt"))
    key.write_bytes(certificates.key_pem(kits["birch"].key))
    chain.write_bytes(certificates.cert_pem(kits["birch"].certificate))
    context.load_cert_chain(chain, key)
    with (
        socket.create_connection(address_of(kits, "alder"), timeout=5) as plain,
        context.wrap_socket(plain) as connection,
    ):
        yield connection


def test_an_older_tls_is_refused_even_with_a_members_key(kits: dict[str, Kit], start: Start) -> None:
    start(kits["alder"])
    with pytest.raises((ssl.SSLError, ConnectionError)), secured(kits, ssl.TLSVersion.TLSv1_2):
        pass


def test_a_member_does_not_talk_to_an_older_tls(kits: dict[str, Kit], start: Start) -> None:
    """Somebody with alder's own key who answers in TLS 1.2 alone hears no greeting."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    key, chain = (kits["alder"].folder / name for name in ("probe.key", "probe.crt"))
    key.write_bytes(certificates.key_pem(kits["alder"].key))
    chain.write_bytes(certificates.cert_pem(kits["alder"].certificate))
    context.load_cert_chain(chain, key)
    with socket.create_server(address_of(kits, "alder")) as server:
        server.settimeout(10)
        start(kits["birch"])
        refused = 0
        while refused < 3:
            plain, _ = server.accept()
            with plain, pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(plain, server_side=True)
            refused += 1


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x00" * 4096, b""])
def test_words_that_are_no_tls_get_no_answer_but_an_end(kits: dict[str, Kit], start: Start, words: bytes) -> None:
    start(kits["alder"])
    with socket.create_connection(address_of(kits, "alder"), timeout=QUICK.handshake_s + 5.0) as connection:
        connection.sendall(words)
        said = b""
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(4096):
                said += more
        assert len(said) < 64  # a TLS alert at most


# ---- a member that sends too much


def flood_of(kits: dict[str, Kit], kind: str, stop: threading.Event) -> int:
    """As birch, send small one-way messages to alder as fast as it takes them; how many went out."""
    roster = load_roster(kits["alder"])
    sent = 0
    transport = GrpcTransport("birch", roster, kits["birch"], settings=QUICK)
    hello = transport._hello("alder", Lane.FORWARD)
    (chunk,) = encode(transport._scope, FrameType.ONE_WAY, Lane.FORWARD, 1, Message(kind)).chunks()

    def words() -> Iterator[bytes]:
        nonlocal sent
        yield hello.encode()
        while not stop.is_set():
            sent += 1
            yield chunk

    credentials = grpc.ssl_channel_credentials(
        certificates.cert_pem(kits["alder"].certificate),
        certificates.key_pem(kits["birch"].key),
        certificates.cert_pem(kits["birch"].certificate),
    )
    options = [("grpc.ssl_target_name_override", "alder")]
    with grpc.secure_channel(roster.entry("alder").endpoint, credentials, options=options) as channel:
        call = channel.stream_stream("/coterie.Lanes/Open", None, None)(words())
        with contextlib.suppress(grpc.RpcError, StopIteration):
            assert decode_hello(next(call), "alder").sender == "alder"
            while not stop.is_set():
                next(call)
        stop.set()
        call.cancel()
    return sent


def test_a_member_that_sends_without_end_is_read_at_a_pace_and_the_others_are_served(
    kits: dict[str, Kit], start: Start
) -> None:
    handled = 0

    def handler(peer: str, lane: Lane, message: Message) -> Message:
        nonlocal handled
        handled += peer == "birch"
        return message

    start(kits["alder"], handler)
    cedar = start(kits["cedar"])
    cedar.connect(10.0, ["alder"])
    stop, begun = threading.Event(), time.monotonic()
    thread = threading.Thread(target=flood_of, args=(kits, "noise", stop))
    thread.start()
    try:
        tensor = torch.zeros(1000)
        for _ in range(200):
            reply = cedar.request("alder", Lane.FORWARD, Message("work", tensors=(tensor,)), 5.0)
            assert reply.tensors[0].shape == tensor.shape
        time.sleep(max(0.0, begun + 4.0 - time.monotonic()))
    finally:
        stop.set()
        thread.join()
    assert handled <= BURST + RATE * (time.monotonic() - begun) + 10


def test_large_chunks_are_not_slowed_and_small_ones_only_beyond_the_rate() -> None:
    pace = Pace(now=0.0)
    assert all(pace.pause(1 << 20, 0.0) == 0.0 for _ in range(10_000))
    assert all(pace.pause(100, 0.0) == 0.0 for _ in range(int(BURST)))
    assert pace.pause(100, 0.0) > 0
    assert pace.pause(100, 60.0) == 0.0
    now, read = 0.0, 0
    pace = Pace(now)
    while now < 10.0:
        now += pace.pause(100, now) or 1e-5
        read += 1
    assert read <= BURST + 10.0 * RATE + 1


# ---- what is logged


def test_a_refused_message_costs_no_line_each(
    kits: dict[str, Kit], start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(peer: str, lane: Lane, message: Message) -> Message:
        raise DataError("no.", code="data-refused")

    caplog.set_level(logging.INFO, logger="coterie")
    start(kits["alder"], refuse)
    cedar = start(kits["cedar"])
    cedar.connect(10.0, ["alder"])
    for _ in range(100):
        with pytest.raises(DataError):
            cedar.request("alder", Lane.CONTROL, Message("push"), 5.0)
    assert sum("failed here" in record.message for record in caplog.records) == 1


def test_what_was_held_back_is_counted_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="seldom")
    now = 0.0
    seldom = Seldom(logging.getLogger("seldom"), lambda: now)
    for _ in range(500):
        seldom.log("birch", logging.INFO, "birch sent nonsense")
        seldom.tick()
    seldom.log("cedar", logging.INFO, "cedar sent nonsense")
    assert [record.message for record in caplog.records] == ["birch sent nonsense", "cedar sent nonsense"]
    now = EVERY_S
    seldom.tick()
    assert [record.message for record in caplog.records][2:] == [
        f"birch sent nonsense (the last of 499 like it in {EVERY_S:.0f} s)"
    ]
    now = 3 * EVERY_S
    seldom.tick()
    seldom.log("birch", logging.INFO, "birch sent nonsense")  # quiet in between: news again
    assert caplog.records[-1].message == "birch sent nonsense"


# ---- the rules for newcomers


def test_the_address_with_the_most_newcomers_gives_up_its_oldest() -> None:
    crowd = [("10.0.0.1", port) for port in range(100)]
    alone = [("10.0.0.2", 1), ("fe80::1", 1)]
    given_up = list(newcomers._too_many([alone[0], *crowd, alone[1]], NEWCOMERS))
    assert given_up == crowd[: 102 - NEWCOMERS]
    assert list(newcomers._too_many(crowd[:NEWCOMERS], NEWCOMERS)) == []


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:4431", ("10.0.0.7", 4431)),
        ("ipv6:%5B::1%5D:4431", ("::1", 4431)),
        ("ipv6:[::ffff:10.0.0.7]:4431", ("10.0.0.7", 4431)),
    ],
)
def test_a_peer_has_one_spelling_however_grpc_writes_it(peer: str, address: tuple[str, int]) -> None:
    assert parse_peer(peer) == address


def test_a_connection_is_left_alone_from_its_admission_to_its_end() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = server.getsockname()[1]
        pairs = []
        for _ in range(2):
            far = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            pairs.append((far, stack.enter_context(server.accept()[0])))
        (member, _), (stranger, accepted) = pairs
        watched = Newcomers(port, patience_s=1.0)
        name = f"ipv4:127.0.0.1:{member.getsockname()[1]}"
        assert watched.look(0.0) == 0
        watched.admit(name)
        assert watched.look(2.0) == 1
        assert (ended(member), ended(stranger)) == (False, True)
        accepted.close()  # as gRPC does
        watched.leave(name)
        assert watched.look(10.0) == 0  # its patience begins anew
        assert watched.look(12.0) >= 1
        assert ended(member)


def test_descriptors_are_raised_as_far_as_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(newcomers.resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(newcomers.resource, "setrlimit", lambda which, limits: asked.append(limits))
    assert newcomers.check_descriptors("alder", 6, 1) == 4096
    assert asked == [(4096, 4096)]


def test_a_process_that_may_open_too_little_does_not_start(
    kits: dict[str, Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newcomers.resource, "getrlimit", lambda which: (128, 256))
    transport = GrpcTransport("alder", load_roster(kits["alder"]), kits["alder"], settings=QUICK)
    with pytest.raises(TransportError) as caught:
        transport.start(lambda peer, lane, message: message)
    assert caught.value.code == "descriptors-few"
    assert "may have 256 files" in caught.value.message
