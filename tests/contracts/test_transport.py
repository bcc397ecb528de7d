"""Every transport keeps the rules in `coterie.federation.wire.transport`; the same tests run over each of them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coterie.errors import DeadlineError, FrameError, RoundError, TransportError
from coterie.federation.cancel import CancelToken
from coterie.federation.identity.provision import local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire import base_transport
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.frame import PROTOCOL_VERSION
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.transport import Address, Handler, Lane, Message, Transport

SETTINGS = Settings(window=4, window_bytes=8 << 20, close_s=2.0, redial_s=0.05, send_deadline_s=10.0, refusal_s=0.3)
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


class TransportWorld:
    """Transports of one kind, closed when the test ends."""

    def __init__(self, make: Callable[[tuple[str, ...], str | None], dict[str, Transport]], stack: ExitStack) -> None:
        self._make = make
        self._stack = stack

    def unstarted(self, *names: str, coordinator: str | None = None) -> dict[str, Transport]:
        members = self._make(names, coordinator)
        for transport in members.values():
            self._stack.callback(transport.close)
        return members

    def started(self, handlers: dict[str, Handler], coordinator: str | None = None) -> dict[str, Transport]:
        members = self.unstarted(*[n for n in handlers if n != coordinator], coordinator=coordinator)
        for name, handler in handlers.items():
            members[name].start(handler)
        for transport in members.values():
            transport.connect(20.0)
        return members


def _in_process(names: tuple[str, ...], coordinator: str | None, folder: Path) -> dict[str, Transport]:
    hub = InProcessHub(names, coordinator=coordinator, settings=SETTINGS)
    everybody = names if coordinator is None else (coordinator, *names)
    return {name: hub.transport(name) for name in everybody}


def _grpc(names: tuple[str, ...], coordinator: str | None, folder: Path) -> dict[str, Transport]:
    kits = local_kits(folder / "kits", names, coordinator=coordinator is not None)
    return {name: GrpcTransport(name, load_roster(kit), kit, settings=SETTINGS) for name, kit in kits.items()}


@pytest.fixture(params=[_in_process, _grpc], ids=["inprocess", "grpc"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TransportWorld]:
    with ExitStack() as stack:
        yield TransportWorld(lambda names, coordinator: request.param(names, coordinator, tmp_path), stack)


def echo(peer: str, lane: Lane, message: Message) -> Message:
    return message


def silent(peer: str, lane: Lane, message: Message) -> None:
    return None


def _example(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=torch.Generator().manual_seed(7))
    return values.to(dtype)


def test_every_dtype_comes_back_bit_for_bit(world: TransportWorld) -> None:
    alder = world.started({"alder": silent, "birch": echo})["alder"]
    tensors = tuple(_example(dtype, 3, 5) for dtype in DTYPES)
    reply = alder.request("birch", Lane.FORWARD, Message("dispatch", tensors=tensors), 10.0)
    for sent, came in zip(tensors, reply.tensors, strict=True):
        assert came.dtype == sent.dtype
        assert torch.equal(came, sent)


def test_all_header_fields_and_the_body_come_back(world: TransportWorld) -> None:
    alder = world.started({"alder": silent, "birch": echo})["alder"]
    message = Message(
        "grad",
        Address(round=2**40, attempt=3, micro_batch=4, layer=5, call=2**50, part=6, chunk=7),
        body={"rows": [1, 2], "name": "é", "none": None, "x": 0.5},
    )
    assert alder.request("birch", Lane.BACKWARD, message, 10.0) == message


def test_empty_scalar_strided_and_non_finite_tensors_arrive(world: TransportWorld) -> None:
    alder = world.started({"alder": silent, "birch": echo})["alder"]
    tensors = (
        torch.empty(0, 7),
        torch.tensor(3.5),
        torch.arange(12.0).view(3, 4).t(),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.ones(1).expand(5),
    )
    reply = alder.request("birch", Lane.FORWARD, Message("dispatch", tensors=tensors), 10.0)
    for sent, came in zip(tensors, reply.tensors, strict=True):
        assert came.shape == sent.shape
        assert torch.equal(torch.nan_to_num(came, 9.0), torch.nan_to_num(sent, 9.0))


def test_tensors_larger_than_many_chunks_arrive_whole_and_writable(world: TransportWorld) -> None:
    alder = world.started({"alder": silent, "birch": echo})["alder"]
    big = torch.randn(3_000_001, generator=torch.Generator().manual_seed(1)).to(torch.float32)
    small = torch.arange(5)
    reply = alder.request("birch", Lane.FORWARD, Message("dispatch", tensors=(small, big, small)), 20.0)
    assert torch.equal(reply.tensors[1], big)
    assert torch.equal(reply.tensors[0], small)
    reply.tensors[1].add_(1)
    assert torch.equal(reply.tensors[2], small)


def test_the_sender_may_overwrite_its_tensor_once_the_call_returned(world: TransportWorld) -> None:
    came: list[torch.Tensor] = []
    gate = threading.Event()

    def slow(peer: str, lane: Lane, message: Message) -> None:
        gate.wait(10)
        came.append(message.tensors[0])

    alder = world.started({"alder": silent, "birch": slow})["alder"]
    tensor = torch.ones(100_000)
    future = alder.request_async("birch", Lane.FORWARD, Message("dispatch", tensors=(tensor,)), 10.0)
    tensor.zero_()
    gate.set()
    future.result(10)
    assert came[0].sum() == 100_000


def test_requests_of_a_peer_on_a_lane_are_handled_in_the_order_sent(world: TransportWorld) -> None:
    order: list[int] = []

    def note(peer: str, lane: Lane, message: Message) -> None:
        if message.address.round % 7 == 0:
            time.sleep(0.002)
        order.append(message.address.round)

    alder = world.started({"alder": silent, "birch": note})["alder"]
    for number in range(60):
        if number % 2:
            alder.send("birch", Lane.CONTROL, Message("note", Address(round=number)))
        else:
            last = alder.request_async("birch", Lane.CONTROL, Message("note", Address(round=number)), 10.0)
    alder.request("birch", Lane.CONTROL, Message("note", Address(round=60)), 10.0)
    last.result(10)
    assert order == list(range(61))


def test_a_handler_that_waits_holds_up_neither_other_lanes_nor_other_peers(world: TransportWorld) -> None:
    gate = threading.Event()

    def wait_for_alder_forward(peer: str, lane: Lane, message: Message) -> None:
        if (peer, lane) == ("alder", Lane.FORWARD):
            gate.wait(10)

    members = world.started({"alder": silent, "birch": wait_for_alder_forward, "cedar": silent})
    stuck = members["alder"].request_async("birch", Lane.FORWARD, Message("dispatch"), 10.0)
    members["alder"].request("birch", Lane.BACKWARD, Message("grad"), 5.0)
    members["cedar"].request("birch", Lane.FORWARD, Message("dispatch"), 5.0)
    assert not stuck.done()
    gate.set()
    stuck.result(5)


def test_replies_find_their_requests_when_many_threads_ask_at_once(world: TransportWorld) -> None:
    members = world.started({"alder": silent, "birch": echo})
    wrong: list[int] = []

    def ask(thread: int) -> None:
        for step in range(15):
            number = thread * 1000 + step
            tensor = torch.full((50,), number)
            message = Message("ask", Address(round=number), tensors=(tensor,))
            reply = members["alder"].request("birch", Lane.FORWARD, message, 20.0)
            if reply.address.round != number or not torch.equal(reply.tensors[0], tensor):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_both_sides_can_ask_each_other_inside_their_handlers(world: TransportWorld) -> None:
    members: dict[str, Transport] = {}

    def ask_back(peer: str, lane: Lane, message: Message) -> Message:
        return members["birch"].request(peer, Lane.BACKWARD, Message("back", message.address), 5.0)

    members.update(world.started({"alder": echo, "birch": ask_back}))
    reply = members["alder"].request("birch", Lane.FORWARD, Message("there", Address(round=9)), 10.0)
    assert reply.address.round == 9


@pytest.mark.parametrize("theirs", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1])
def test_a_peer_of_another_protocol_version_is_refused_on_both_sides_and_the_others_go_on(
    world: TransportWorld, theirs: int
) -> None:
    members = world.unstarted("alder", "birch", "cedar")
    birch = members["birch"]
    birch._scope = replace(birch._scope, protocol=theirs)  # type: ignore[attr-defined]
    for member in members.values():
        member.start(echo)
    for name, peer in (("alder", "birch"), ("birch", "alder"), ("cedar", "birch")):
        with pytest.raises(TransportError) as caught:
            members[name].connect(20.0, [peer])
        assert caught.value.code == "handshake-protocol"
        assert {str(theirs), str(PROTOCOL_VERSION)} <= set(re.findall(r"\d+", caught.value.message))
        with pytest.raises(TransportError) as unsent:
            members[name].request(peer, Lane.CONTROL, Message("hello"), 1.0)
        assert unsent.value.code == "not-connected"
    members["alder"].connect(20.0, ["cedar"])
    assert members["alder"].request("cedar", Lane.CONTROL, Message("hello"), 5.0).kind == "hello"


def test_a_reply_is_about_what_its_request_was_about() -> None:
    address = Address(round=4, attempt=2, micro_batch=3, layer=1, call=5, part=6, chunk=7)
    reply = Message("dispatch", address, {"keep": True}, (torch.ones(2),)).reply("outputs")
    assert (reply.kind, reply.address, reply.body, reply.tensors) == ("outputs", address, {}, ())


def test_an_error_of_the_handler_crosses_as_class_code_step_and_field_without_its_text(world: TransportWorld) -> None:
    def refuse(peer: str, lane: Lane, message: Message) -> None:
        raise RoundError(
            "secret text of a record", code="round-aborted", where="/home/secret", why="secret", field="micro_batch"
        )

    alder = world.started({"alder": silent, "birch": refuse})["alder"]
    with pytest.raises(RoundError) as caught:
        alder.request("birch", Lane.FORWARD, Message("dispatch", Address(round=3, attempt=1, part=2)), 10.0)
    assert caught.value.where == "birch, lane forward, round 3, attempt 1, part 2"
    assert caught.value.code == "round-aborted"
    assert caught.value.field == "micro_batch"
    assert "birch answered `dispatch` with error `round-aborted`" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_unexpected_exception_crosses_as_remote_failure_without_its_text(world: TransportWorld) -> None:
    def crash(peer: str, lane: Lane, message: Message) -> None:
        raise ValueError("secret text of a record")

    alder = world.started({"alder": silent, "birch": crash})["alder"]
    with pytest.raises(TransportError) as caught:
        alder.request("birch", Lane.FORWARD, Message("dispatch"), 10.0)
    assert caught.value.code == "remote-failure"
    assert "secret" not in str(caught.value)
    assert "ValueError" not in str(caught.value)


def test_a_reply_that_cannot_be_sent_fails_the_request_and_not_the_connection(world: TransportWorld) -> None:
    def bad(peer: str, lane: Lane, message: Message) -> Message:
        unsendable = message.reply("reply", tensors=(torch.zeros(2, dtype=torch.complex64),))
        return message if message.address.round else unsendable

    alder = world.started({"alder": silent, "birch": bad})["alder"]
    with pytest.raises(FrameError) as caught:
        alder.request("birch", Lane.FORWARD, Message("dispatch"), 10.0)
    assert caught.value.code == "frame-dtype"
    assert alder.request("birch", Lane.FORWARD, Message("dispatch", Address(round=1)), 10.0).address.round == 1


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Message("Not A Kind"), "kind"),
        (Message("x" * 25), "kind"),
        (Message("m", tensors=(torch.zeros(1, dtype=torch.complex64),)), "dtype"),
        (Message("m", tensors=(torch.zeros([1] * 9),)), "rank"),
        (Message("m", Address(round=-1)), "number"),
        (Message("m", Address(layer=2**32)), "number"),
        (Message("m", body={"x": "y" * 70_000}), "body_length"),
        (Message("m", body={"x": float("nan")}), "body"),
        (Message("m", body={"x": b"bytes"}), "body"),
    ],
)
def test_a_message_that_breaks_a_limit_is_refused_where_it_is_made(
    world: TransportWorld, message: Message, field: str
) -> None:
    alder = world.started({"alder": silent, "birch": echo})["alder"]
    with pytest.raises(FrameError) as caught:
        alder.request("birch", Lane.FORWARD, message, 5.0)
    assert caught.value.field == field
    assert alder.request("birch", Lane.FORWARD, Message("fine"), 5.0).kind == "fine"


def test_a_request_without_reply_in_time_raises_deadline_and_names_the_peer(world: TransportWorld) -> None:
    gate = threading.Event()
    alder = world.started({"alder": silent, "birch": lambda *_: gate.wait(10) and None})["alder"]
    with pytest.raises(DeadlineError, match=r"birch did not answer `dispatch` within 0\.2 s"):
        alder.request("birch", Lane.FORWARD, Message("dispatch"), 0.2)
    gate.set()
    alder.request("birch", Lane.FORWARD, Message("dispatch"), 5.0)  # the late reply is no answer to this one


def test_no_more_than_the_window_is_unanswered_and_the_next_one_waits_for_room(world: TransportWorld) -> None:
    gate = threading.Event()
    handled: list[int] = []

    def wait(peer: str, lane: Lane, message: Message) -> None:
        gate.wait(10)
        handled.append(message.address.round)

    alder = world.started({"alder": silent, "birch": wait})["alder"]
    futures = [
        alder.request_async("birch", Lane.FORWARD, Message("dispatch", Address(round=n)), 10.0) for n in range(4)
    ]
    with pytest.raises(DeadlineError) as caught:
        alder.request_async("birch", Lane.FORWARD, Message("dispatch", Address(round=4)), 0.2)
    assert caught.value.code == "queue-full"
    gate.set()
    for future in futures:
        future.result(5)
    assert handled == [0, 1, 2, 3]


def test_close_fails_the_requests_of_both_sides(world: TransportWorld) -> None:
    gate = threading.Event()
    members = world.started({"alder": silent, "birch": lambda *_: gate.wait(10) and None})
    pending = members["alder"].request_async("birch", Lane.FORWARD, Message("dispatch"), 30.0)
    closer = threading.Thread(target=members["birch"].close)
    closer.start()
    with pytest.raises(TransportError) as caught:
        pending.result(10)
    assert caught.value.code == "connection-lost"
    gate.set()
    closer.join(60)
    members["alder"].close()
    with pytest.raises(TransportError) as caught:
        members["alder"].request("birch", Lane.FORWARD, Message("dispatch"), 5.0)
    assert caught.value.code == "closed"


def test_closing_ones_own_end_fails_ones_own_requests(world: TransportWorld) -> None:
    gate = threading.Event()
    members = world.started({"alder": silent, "birch": lambda *_: gate.wait(10) and None})
    pending = members["alder"].request_async("birch", Lane.FORWARD, Message("dispatch"), 30.0)
    members["alder"].close()
    with pytest.raises(TransportError) as caught:
        pending.result(5)
    assert caught.value.code == "closed"
    gate.set()


def test_a_missing_peer_is_named_when_the_deadline_passes(world: TransportWorld) -> None:
    members = world.unstarted("alder", "birch", "cedar")
    members["alder"].start(silent)
    members["birch"].start(silent)
    members["alder"].connect(10.0, ["birch"])
    with pytest.raises(DeadlineError, match=r"cedar did not arrive within 0\.3 s") as caught:
        members["alder"].connect(0.3)
    assert caught.value.code == "peer-missing"
    assert members["alder"].connected() == {"birch"}
    with pytest.raises(TransportError) as refused:
        members["alder"].request("cedar", Lane.CONTROL, Message("hello"), 1.0)
    assert refused.value.code == "not-connected"


def test_unanswered_requests_are_bounded_in_bytes_and_a_large_one_goes_alone(world: TransportWorld) -> None:
    gate, seen = threading.Event(), []

    def slow(peer: str, lane: Lane, message: Message) -> None:
        seen.append(message.kind)
        gate.wait(10)

    members = world.started({"alder": silent, "birch": slow})
    half, double = (
        torch.zeros(SETTINGS.window_bytes // 2, dtype=torch.uint8),
        torch.zeros(2 * SETTINGS.window_bytes, dtype=torch.uint8),
    )
    first = members["alder"].request_async("birch", Lane.FORWARD, Message("first", tensors=(half,)), 30.0)
    second = members["alder"].request_async("birch", Lane.FORWARD, Message("second", tensors=(half,)), 30.0)
    with pytest.raises(DeadlineError) as caught:
        members["alder"].request("birch", Lane.FORWARD, Message("third", tensors=(half[:1],)), 0.2)
    assert caught.value.code == "queue-full"
    empty = members["alder"].request_async("birch", Lane.FORWARD, Message("empty"), 30.0)
    gate.set()
    for each in (first, second, empty):
        each.result(10)
    members["alder"].request("birch", Lane.FORWARD, Message("large", tensors=(double,)), 30.0)
    assert seen == ["first", "second", "empty", "large"]


def test_wait_for_a_peer_can_be_given_up(world: TransportWorld) -> None:
    members = world.unstarted("alder", "birch")
    members["alder"].start(silent)
    asked = iter([True, True, False])
    members["alder"].connect(600.0, cancel=CancelToken(lambda: not next(asked)))
    assert members["alder"].connected() == set()


def test_close_waits_once_for_all_handlers_together(world: TransportWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, arrived = threading.Event(), threading.Semaphore(0)

    def stuck(peer: str, lane: Lane, message: Message) -> None:
        arrived.release()
        gate.wait(60)

    members = world.started({"alder": stuck, "birch": silent, "cedar": silent})
    for name in ("birch", "cedar"):
        for lane in Lane:
            members[name].request_async("alder", lane, Message("dispatch"), 30.0)
    assert all(arrived.acquire(timeout=60) for _ in range(6))
    waits: list[float] = []
    clock = [1000.0]

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if "alder-" in thread.name and thread.name.endswith(tuple(lane.name.lower() for lane in Lane)):
            waits.append(timeout or 0.0)
            clock[0] += timeout or 0.0

    monkeypatch.setattr(threading.Thread, "join", join)
    monkeypatch.setattr(base_transport, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    members["alder"].close()
    monkeypatch.undo()
    gate.set()
    assert len(waits) == 6
    assert sum(waits) <= SETTINGS.close_s


def test_the_coordinator_has_the_control_lane_alone_and_sees_no_tensor(world: TransportWorld) -> None:
    members = world.started({"coordinator": echo, "alder": echo, "birch": echo}, coordinator="coordinator")
    ready, begin = Message("ready", body={"round": 4}), Message("begin", body={"round": 5})
    assert members["alder"].request("coordinator", Lane.CONTROL, ready, 5.0) == ready
    assert members["coordinator"].request("alder", Lane.CONTROL, begin, 5.0) == begin
    with pytest.raises(TransportError) as caught:
        members["alder"].request("coordinator", Lane.FORWARD, Message("dispatch"), 5.0)
    assert caught.value.code == "no-such-lane"
    with pytest.raises(TransportError) as caught:
        members["alder"].request("coordinator", Lane.CONTROL, Message("ready", tensors=(torch.ones(1),)), 5.0)
    assert caught.value.code == "tensors-on-control"


def test_counters_give_payload_and_tensor_bytes_per_peer_and_lane(world: TransportWorld) -> None:
    members = world.started({"alder": silent, "birch": silent, "cedar": silent})
    tensor = torch.zeros(1000, 1000, dtype=torch.bfloat16)
    members["alder"].request("birch", Lane.FORWARD, Message("dispatch", tensors=(tensor,)), 10.0)
    sent = members["alder"].counters().total("birch", Lane.FORWARD)
    came = members["birch"].counters().total("alder", Lane.FORWARD)
    assert sent.tensor_bytes_sent == came.tensor_bytes_received == 2_000_000
    assert 2_000_000 < sent.payload_bytes_sent <= 2_001_000
    assert came.payload_bytes_received == sent.payload_bytes_sent
    assert (sent.messages_sent, sent.messages_received) == (1, 1)
    assert members["alder"].counters().total("cedar", Lane.FORWARD).tensor_bytes_sent == 0
    assert members["alder"].counters().total().tensor_bytes_sent == 2_000_000
