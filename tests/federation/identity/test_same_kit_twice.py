"""Two processes with one kit: the newcomer is turned away and both are told; a restart after a death is let in."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coterie.errors import TransportError
from coterie.federation.identity.kit import Kit
from coterie.federation.identity.provision import free_endpoints, local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.handshake import Hello, decode_hello
from coterie.federation.wire.transport import Address, Lane, Message

QUICK = Settings(redial_s=0.05, refusal_s=0.3, heartbeat_s=0.4, silence_s=30.0, close_s=1.0)
_MEMBER = """
import sys, time
from pathlib import Path
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.identity.kit import load_kit
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire.base_transport import Settings
kit = load_kit(Path(sys.argv[1]))
settings = Settings(redial_s=0.05, refusal_s=0.3, heartbeat_s=0.4, silence_s=30.0)
member = GrpcTransport(kit.name, load_roster(kit), kit, listen=sys.argv[2], settings=settings)
member.start(lambda peer, lane, message: message)
member.connect(60.0)
print("connected", flush=True)
time.sleep(600)
"""


@contextmanager
def started(kit: Kit, listen: str | None = None) -> Iterator[GrpcTransport]:
    transport = GrpcTransport(kit.name, load_roster(kit), kit, listen=listen, settings=QUICK)
    transport.start(lambda peer, lane, message: message)
    try:
        yield transport
    finally:
        transport.close()


@contextmanager
def process(kit: Kit) -> Iterator[subprocess.Popen[str]]:
    """A member in a process of its own, connected."""
    command = [sys.executable, "-c", _MEMBER, str(kit.folder), free_endpoints(1)[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "connected\n"
            yield running
        finally:
            running.kill()


@pytest.fixture
def kits(tmp_path: Path) -> dict[str, Kit]:
    return local_kits(tmp_path / "kits", ["alder", "birch"])


def asks(transport: GrpcTransport, number: int) -> int:
    return transport.request("birch", Lane.FORWARD, Message("hello", Address(round=number)), 5.0).address.round


def test_the_newcomer_is_turned_away_both_are_told_and_the_first_goes_on(
    kits: dict[str, Kit], caplog: pytest.LogCaptureFixture
) -> None:
    with started(kits["alder"]) as alder, started(kits["birch"]):
        alder.connect(10.0)
        with caplog.at_level(logging.WARNING), started(kits["birch"], free_endpoints(1)[0]) as newcomer:
            with pytest.raises(TransportError) as caught:
                newcomer.connect(20.0)
            assert caught.value.code == "identity-in-use"
            assert "another process with our kit" in caught.value.message
            assert asks(alder, 5) == 5
        told = caplog.text
        assert "another process with birch's kit is connected to alder" in told  # at the one that turned it away
        assert "another process with our kit tried to connect to alder" in told  # at the one that goes on
        assert asks(alder, 6) == 6


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_restart_after_a_death_or_a_freeze_is_let_in_and_a_thawed_process_is_not(
    kits: dict[str, Kit], end: signal.Signals
) -> None:
    with started(kits["alder"]) as alder, process(kits["birch"]) as first:
        alder.connect(30.0)
        os.kill(first.pid, end)
        with process(kits["birch"]):
            assert asks(alder, 1) == 1
            if end is signal.SIGSTOP:
                os.kill(first.pid, signal.SIGCONT)
                until = time.monotonic() + 3.0
                while time.monotonic() < until:
                    assert asks(alder, 2) == 2
                    time.sleep(0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lane", True), ("lane", -1), ("membership_epoch", 2**32), ("protocol", 1.0), ("process", 5), ("process", "\n")],
)
def test_an_introduction_with_a_field_of_another_type_or_range_is_damaged(name: str, value: object) -> None:
    import json

    said = json.loads(Hello("alder", "birch", 0, "demo", 1, "r", "run").encode())
    with pytest.raises(TransportError) as caught:
        decode_hello(json.dumps({**said, name: value}).encode(), "alder")
    assert caught.value.code == "handshake-damaged"
