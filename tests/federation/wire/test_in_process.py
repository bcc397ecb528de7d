"""What the in-process hub offers beyond the contract of all transports: cut cables and restarted parties."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from coterie.errors import TransportError
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.transport import Address, Lane, Message


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_cut_cable_fails_the_requests_of_both_ends(stack: ExitStack) -> None:
    gate = threading.Event()
    hub = InProcessHub(["alder", "birch", "cedar"])
    members = {name: hub.transport(name) for name in ("alder", "birch", "cedar")}
    for member in members.values():
        stack.callback(member.close)
        member.start(lambda *_: gate.wait(10) and None)
    there = members["alder"].request_async("birch", Lane.FORWARD, Message("dispatch"), 30.0)
    back = members["birch"].request_async("alder", Lane.FORWARD, Message("dispatch"), 30.0)
    aside = members["alder"].request_async("cedar", Lane.FORWARD, Message("dispatch"), 30.0)
    hub.disconnect("alder", "birch")
    for future in (there, back):
        with pytest.raises(TransportError) as caught:
            future.result(5)
        assert caught.value.code == "connection-lost"
    assert members["alder"].connected() == {"cedar"}
    gate.set()
    aside.result(5)


def test_a_restarted_party_is_connected_again(stack: ExitStack) -> None:
    hub = InProcessHub(["alder", "birch"])
    alder, birch = hub.transport("alder"), hub.transport("birch")
    alder.start(lambda peer, lane, message: message)
    birch.start(lambda peer, lane, message: message)
    stack.callback(alder.close)
    birch.close()
    assert alder.connected() == frozenset()
    again = hub.transport("birch")
    stack.callback(again.close)
    again.start(lambda peer, lane, message: message)
    assert alder.request("birch", Lane.BACKWARD, Message("grad", Address(round=3)), 5.0).address.round == 3


def test_a_party_cannot_run_twice_and_a_stranger_not_at_all(stack: ExitStack) -> None:
    hub = InProcessHub(["alder"])
    first = hub.transport("alder")
    stack.callback(first.close)
    first.start(lambda *_: None)
    with pytest.raises(TransportError) as caught:
        hub.transport("alder").start(lambda *_: None)
    assert caught.value.code == "port-taken"
    with pytest.raises(TransportError) as caught:
        hub.transport("mallory")
    assert caught.value.code == "no-such-peer"


def test_closing_while_a_handlers_thread_is_being_started_waits_for_it(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message arrives in the moment of closing: seen once in thousands of runs, as a crash of `close`."""
    hub = InProcessHub(["alder", "birch"])
    alder, birch = hub.transport("alder"), hub.transport("birch")
    stack.callback(alder.close)
    alder.start(lambda *_: None)
    birch.start(lambda *_: None)
    starting, start = threading.Event(), threading.Thread.start

    def slowly(self: threading.Thread) -> None:
        if self.name == "birch-alder-control":
            starting.set()
            time.sleep(0.3)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    sender = threading.Thread(target=alder.send, args=("birch", Lane.CONTROL, Message("hello")))
    sender.start()
    assert starting.wait(60.0)
    birch.close()
    sender.join(60.0)
    assert not [t for t in threading.enumerate() if t.name == "birch-alder-control"]
