"""Everybody who is not a member, at the port of one: nothing is handled, and members are served all the while."""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from record import RECORD

from coterie.federation.identity import certificates
from coterie.federation.identity.certificates import Member, Role
from coterie.federation.identity.kit import load_authority
from coterie.federation.identity.provision import local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.transport import Lane, Message
from coterie.federation.wire.unreachable import split_endpoint

PART = "Strangers"
QUICK = Settings(close_s=2.0, redial_s=0.05, heartbeat_s=0.3, silence_s=5.0, handshake_s=1.0)
TIMES = 20
Pair = tuple[bytes, bytes]

GARBAGE = (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(65536))


def fresh(folder: Path, federation: str, name: str, **options: object) -> Pair:
    """A key and a certificate for it by the CA of a folder."""
    key = certificates.new_key()
    authority = load_authority(folder / "ca")
    made = authority.issue(Member(name, Role.PARTY, "127.0.0.1:1"), key.public_key(), **options)  # type: ignore[arg-type]
    return certificates.key_pem(key), certificates.cert_pem(made)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None], list[str]]]:
    """A folder of kits, a check that birch is served by alder, and the messages that alder handled."""
    folder, handled = tmp_path / "kits", list[str]()
    kits = local_kits(folder, ["alder", "birch"], federation="demo")
    members = {name: GrpcTransport(name, load_roster(kit), kit, settings=QUICK) for name, kit in kits.items()}

    def handle(peer: str, lane: Lane, message: Message) -> None:
        handled.append(message.kind)

    try:
        for member in members.values():
            member.start(handle)
        members["birch"].connect(20.0)
        yield folder, lambda: members["birch"].request("alder", Lane.CONTROL, Message("fine"), 10.0) and None, handled
    finally:
        for member in members.values():
            member.close()


def address(folder: Path) -> tuple[str, int]:
    kits = {name: folder / name for name in ("alder",)}
    from coterie.federation.identity.kit import load_kit

    return split_endpoint(load_roster(load_kit(kits["alder"])).entry("alder").endpoint)


def speak(folder: Path, pair: Pair | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """What comes back from alder's port for the beginning of HTTP/2, up to the end of the connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if pair is not None:
        for name, content in zip(("s.key", "s.crt"), pair, strict=True):
            (folder / name).write_bytes(content)
        context.load_cert_chain(folder / "s.crt", folder / "s.key")
    said = b""
    with (
        contextlib.suppress(ssl.SSLError, ConnectionError, TimeoutError),
        socket.create_connection(address(folder), timeout=QUICK.handshake_s + 4.0) as plain,
        context.wrap_socket(plain) as secured,
    ):
        secured.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
        while more := secured.recv(4096):
            said += more
    return said


@pytest.mark.parametrize(
    "who",
    [
        "without a certificate",
        "with a certificate of another CA",
        "with an expired certificate",
        "with a certificate of this CA that the roster does not list",
        "member of another run with the same CA's name",
        "with a member's key over TLS 1.2",
        "half-open and silent",
        "with words that are no TLS",
    ],
)
def test_strangers_of_every_class_get_nowhere_and_members_are_served(
    world: tuple[Path, Callable[[], None], list[str]], tmp_path: Path, who: str
) -> None:
    folder, served, handled = world
    served()
    if who == "half-open and silent":
        with contextlib.ExitStack() as stack:
            for _ in range(TIMES):
                stack.enter_context(socket.create_connection(address(folder), timeout=5))
            served()
    elif who == "with words that are no TLS":
        for index in range(TIMES):
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(address(folder), timeout=QUICK.handshake_s + 4.0) as plain,
            ):
                plain.sendall(GARBAGE[index % len(GARBAGE)])
                while plain.recv(4096):
                    pass
            served()
    else:
        then = dt.datetime.now(dt.UTC) - dt.timedelta(days=9)
        local_kits(tmp_path / "other", ["alder", "birch"], federation="demo")
        from coterie.federation.identity.kit import load_kit

        birch = load_kit(folder / "birch")
        pair: Pair | None = {
            "without a certificate": lambda: None,
            "with a certificate of another CA": lambda: fresh(tmp_path / "other", "demo", "mallory"),
            "with an expired certificate": lambda: fresh(folder, "demo", "birch", days=3, now=then),
            "with a certificate of this CA that the roster does not list": lambda: fresh(folder, "demo", "birch"),
            "member of another run with the same CA's name": lambda: fresh(tmp_path / "other", "demo", "birch"),
            "with a member's key over TLS 1.2": lambda: (
                certificates.key_pem(birch.key),
                certificates.cert_pem(birch.certificate),
            ),
        }[who]()
        old = "1.2" in who
        for _ in range(TIMES // 4):
            said = speak(folder, pair, ssl.TLSVersion.TLSv1_2 if old else ssl.TLSVersion.TLSv1_3)
            # Whoever has a certificate of the CA sees gRPC's own settings frame, and nothing of ours.
            assert b"coterie" not in said
            served()
    assert set(handled) == {"fine"}
    RECORD.tried(PART, who, "cut off within seconds; members are served", TIMES if "with" not in who else TIMES // 4)
