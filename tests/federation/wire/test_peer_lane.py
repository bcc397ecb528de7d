"""What one peer may queue up here, whatever it sends."""

from __future__ import annotations

from coterie.federation.wire.frame import Encoded, Frame, FrameType
from coterie.federation.wire.peer_lane import Connection, PeerLane
from coterie.federation.wire.transport import Lane, Message

WINDOW, WINDOW_BYTES = 4, 1000


class Silent(Connection):
    def post(self, encoded: Encoded, until: float) -> None: ...

    def close(self) -> None: ...


def frame(tensor_bytes: int) -> Frame:
    return Frame(FrameType.REQUEST, Lane.FORWARD, 1, Message("dispatch"), tensor_bytes=tensor_bytes)


def line() -> PeerLane:
    return PeerLane("birch", Lane.FORWARD, WINDOW, WINDOW_BYTES)


def test_peer_cannot_exceed_its_window_in_number_or_bytes() -> None:
    number, size = line(), line()
    by_number, by_bytes = Silent(), Silent()
    assert [number.take_in(by_number, frame(0)) for _ in range(5)] == [True] * 4 + [False]
    assert [size.take_in(by_bytes, frame(400)) for _ in range(3)] == [True, True, False]
    size.next_request()
    assert size.take_in(by_bytes, frame(400))


def test_large_request_is_taken_when_it_is_the_only_one() -> None:
    one = line()
    link = Silent()
    assert one.take_in(link, frame(5000))
    assert not one.take_in(link, frame(1))
    one.next_request()
    assert one.take_in(link, frame(1))


def test_new_connections_do_not_multiply_what_a_peer_may_hold() -> None:
    one = line()
    taken = sum(one.take_in(Silent(), frame(900)) for _ in range(100))
    assert taken == 4


def test_a_line_that_is_full_can_still_be_ended() -> None:
    one = line()
    while one.take_in(Silent(), frame(0)):
        pass
    one.end()
    assert sum(one.next_request() is not None for _ in range(4 * WINDOW)) == 4 * WINDOW
    assert one.next_request() is None
