"""Connections carried by messages: every byte arrives, and only at members that the site itself named."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from coterie.flare import tunnel as tunnels
from coterie.flare.tunnel import PIECE, STREAMS, Tunnel


class Echo:
    """A process of a member: answers everything with itself, until the other side ends."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.ended = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                end, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(end,), daemon=True).start()

    def _answer(self, end: socket.socket) -> None:
        with end:
            while data := end.recv(1 << 16):
                end.sendall(data)
        self.ended.set()


class Carrier:
    """What FLARE is in a federation: hands messages over, and says truly who sent them."""

    def __init__(self, here: Mapping[str, Mapping[str, str]]) -> None:
        self.seen: list[tuple[str, str, Mapping[str, Any]]] = []
        self.cut = False
        sites = {member: site for site, members in here.items() for member in members}
        self.tunnels = {
            site: Tunnel(
                members,
                {member: other for member, other in sites.items() if other != site},
                lambda other, body, site=site: self.deliver(site, other, body),  # type: ignore[misc]
            )
            for site, members in here.items()
        }

    def deliver(self, source: str, target: str, body: Mapping[str, Any]) -> None:
        if self.cut:
            raise OSError("the hub is gone")
        self.seen.append((source, target, body))
        self.tunnels[target].handle(source, body)


@pytest.fixture
def carrier() -> Iterator[tuple[Carrier, Echo]]:
    with ExitStack() as stack:
        birch = Echo()
        stack.callback(birch.listener.close)
        made = Carrier({"north": {"alder": "127.0.0.1:1"}, "south": {"birch": birch.address}, "east": {}})
        for tunnel in made.tunnels.values():
            stack.callback(tunnel.close)
        yield made, birch


def dialled(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    end = socket.create_connection((host, int(port)), timeout=60)
    end.settimeout(60)
    return end


def received(end: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (data := end.recv(1 << 16)):
        found += data
    return found


def test_bytes_arrive_whole_and_in_order_both_ways(carrier: tuple[Carrier, Echo]) -> None:
    made, birch = carrier
    sent = bytes(range(256)) * 12_000  # 3 MB: several messages
    with dialled(made.tunnels["north"].start()["birch"]) as end:
        threading.Thread(target=end.sendall, args=(sent,), daemon=True).start()
        assert received(end, len(sent)) == sent
    assert birch.ended.wait(60)
    assert {(source, target) for source, target, _ in made.seen} == {("north", "south"), ("south", "north")}


def test_connections_at_the_same_time_do_not_mix(carrier: tuple[Carrier, Echo]) -> None:
    made, _ = carrier
    address = made.tunnels["north"].start()["birch"]
    with dialled(address) as one, dialled(address) as two:
        one.sendall(b"one" * 1000)
        two.sendall(b"two" * 1000)
        assert received(two, 3000) == b"two" * 1000
        assert received(one, 3000) == b"one" * 1000


def test_a_piece_that_comes_again_is_not_handed_on_again(carrier: tuple[Carrier, Echo]) -> None:
    """However it comes again: FLARE's second try, or a hub that kept it."""
    made, _ = carrier
    with dialled(made.tunnels["north"].start()["birch"]) as end:
        for word in (b"one", b"two"):
            end.sendall(word)
            assert received(end, 3) == word
        for source, target, body in list(made.seen):
            if body["op"] == "data":
                made.tunnels[target].handle(source, body)
        end.sendall(b"three")
        assert received(end, 5) == b"three"


def test_where_a_piece_is_missing_both_ends_close(carrier: tuple[Carrier, Echo]) -> None:
    made, birch = carrier
    with dialled(made.tunnels["north"].start()["birch"]) as end:
        end.sendall(b"one")
        assert received(end, 3) == b"one"
        later = {"op": "data", "stream": made.seen[0][2]["stream"], "number": 2, "data": b"three"}
        with pytest.raises(OSError, match="piece 1 is missing"):
            made.tunnels["south"].handle("north", later)
        assert end.recv(1) == b""
    assert birch.ended.wait(60)


def test_a_process_that_takes_nothing_holds_up_its_own_connection_for_a_while_and_no_other(
    carrier: tuple[Carrier, Echo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnels, "TAKEN_S", 1)
    _, birch = carrier
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        here = {"elm": f"127.0.0.1:{frozen.getsockname()[1]}", "birch": birch.address}
        south = Tunnel(here, {}, lambda site, body: None)
        for member in here:
            south.handle("north", {"op": "open", "stream": member, "member": member})

        def send_until_it_ends() -> None:
            for number in range(64):
                piece = {"op": "data", "stream": "elm", "number": number, "data": bytes(PIECE)}
                south.handle("north", piece)

        with pytest.raises(OSError, match=r"."):
            send_until_it_ends()
        with pytest.raises(OSError, match="no such connection"):
            south.handle("north", {"op": "data", "stream": "elm", "number": 0, "data": b""})
        south.handle("north", {"op": "data", "stream": "birch", "number": 0, "data": b"hello"})
        south.close()


def test_a_message_opens_nothing_but_what_the_site_named(carrier: tuple[Carrier, Echo]) -> None:
    made, birch = carrier
    south = made.tunnels["south"]
    for member in ("alder", birch.address, "127.0.0.1:22", ""):
        with pytest.raises(OSError, match="no such member"):
            south.handle("north", {"op": "open", "stream": "s", "member": member})


def test_a_site_reaches_no_connection_of_another(carrier: tuple[Carrier, Echo]) -> None:
    made, _ = carrier
    south = made.tunnels["south"]
    with dialled(made.tunnels["north"].start()["birch"]) as end:
        end.sendall(b"hello")
        assert received(end, 5) == b"hello"
        stream = made.seen[0][2]["stream"]
        with pytest.raises(OSError, match="no such connection"):
            south.handle("east", {"op": "data", "stream": stream, "data": b"forged"})
        south.handle("east", {"op": "close", "stream": stream})
        end.sendall(b"again")
        assert received(end, 5) == b"again"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"op": "open"},
        {"op": "data", "stream": "x", "data": b""},
        {"op": "data", "stream": "x", "data": b"", "number": 0},
        {"op": "data", "stream": 3},
        {"stream": "x" * 65},
    ],
)
def test_a_message_of_another_form_is_refused(carrier: tuple[Carrier, Echo], body: dict[str, Any]) -> None:
    with pytest.raises(OSError, match=r"."):
        carrier[0].tunnels["south"].handle("north", body)


def test_there_is_room_for_every_pair_of_members_however_many_a_site_runs() -> None:
    here = {f"here{number}": "127.0.0.1:1" for number in range(8)}
    there = {f"there{number}": "south" for number in range(9)} | {"elm": "east"}
    tunnel = Tunnel(here, there, lambda site, body: None)
    assert tunnel.room("south") >= 8 * 9 * 3 * 2
    assert tunnel.room("east") < tunnel.room("south")


def test_a_site_opens_only_so_many_connections(
    carrier: tuple[Carrier, Echo], caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = carrier
    south = made.tunnels["south"]
    for number in range(STREAMS + 6):  # alder and birch, three lanes, dialled anew
        south.handle("north", {"op": "open", "stream": str(number), "member": "birch"})
    with pytest.raises(OSError, match="no room"):
        south.handle("north", {"op": "open", "stream": "more", "member": "birch"})
    assert "no room for another connection with north: 70 are open" in caplog.text
    south.handle("east", {"op": "open", "stream": "other", "member": "birch"})


def test_when_messages_fail_both_ends_close(carrier: tuple[Carrier, Echo]) -> None:
    made, _ = carrier
    with dialled(made.tunnels["north"].start()["birch"]) as end:
        end.sendall(b"hello")
        assert received(end, 5) == b"hello"
        made.cut = True
        end.sendall(b"lost")
        assert end.recv(1) == b""


def test_a_closed_tunnel_carries_nothing(carrier: tuple[Carrier, Echo]) -> None:
    made, _ = carrier
    address = made.tunnels["north"].start()["birch"]
    with dialled(address) as end:
        end.sendall(b"hello")
        assert received(end, 5) == b"hello"
        made.tunnels["north"].close()
        assert end.recv(1) == b""
    made.tunnels["south"].close()
    with pytest.raises(OSError, match="no room"):
        made.tunnels["south"].handle("north", {"op": "open", "stream": "s", "member": "birch"})
