"""Weights down and sums up: whole parts, pinned for a round, counted once."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import replace
from functools import partial

import pytest
import torch

from coterie.errors import FrameError, MessageError, RoundError, TransportError
from coterie.federation.experts import push_sums
from coterie.federation.experts.fetch_weights import WeightFetcher
from coterie.federation.experts.parts import CHUNK, Part, digest_of, expert_parts
from coterie.federation.experts.push_sums import Push, Pusher
from coterie.federation.experts.serve_weights import CHUNK as WEIGHTS_CHUNK
from coterie.federation.experts.serve_weights import WeightService
from coterie.federation.experts.take_sums import PushService
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.transport import Lane, Message

PARTIES = ("alder", "birch")
SHAPES = [{"gate_up_proj": (4, 6, 5), "down_proj": (4, 5, 3)}] * 2
HOSTS = [["alder", "birch", "alder", "birch"]] * 2


def parts() -> tuple[Part, ...]:
    return expert_parts(SHAPES, HOSTS, PARTIES, {"embed": (7, 3), "norm": (3,), "head": (7, 3)})


def values_of(part: Part, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + part.number)
    return {name: torch.randn(shape, generator=generator) for name, shape in part.shapes}


def test_every_value_of_the_model_is_in_exactly_one_part():
    found = parts()
    values = sum(part.num_values for part in found)
    assert values == 2 * (4 * 6 * 5 + 4 * 5 * 3) + 2 * 7 * 3 + 3
    trunk = [name for part in found if part.layer == -1 for name, _ in part.shapes]
    assert sorted(trunk) == ["embed", "head", "norm"]
    assert {part.host for part in found if part.layer == -1} == set(PARTIES)
    for layer in (0, 1):
        experts = sorted(expert for part in found if part.layer == layer for expert in part.experts)
        assert experts == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_survives_the_wire_form(dtype):
    part = parts()[2]
    sent = values_of(part)
    arrived = part.decode(part.encode(sent, dtype), dtype)
    for name, tensor in sent.items():
        torch.testing.assert_close(arrived[name], tensor.to(dtype), rtol=0, atol=0)
    with pytest.raises(FrameError, match="down_proj` is missing"):
        part.encode({"gate_up_proj": sent["gate_up_proj"]}, dtype)
    with pytest.raises(FrameError, match="has shape"):
        part.encode({**sent, "down_proj": sent["down_proj"][:1]}, dtype)
    with pytest.raises(FrameError, match="bytes, not"):
        part.decode(torch.zeros(3, dtype=torch.uint8), dtype)


BIG = Part(0, "birch", 0, (0,), (("down_proj", (3, CHUNK // 4)),))


class Federation:
    """alder fetches from birch and pushes to it."""

    def __init__(self, part: Part = BIG) -> None:
        self.hub = InProcessHub(PARTIES)
        self.weights = {name: torch.randn(shape) for name, shape in part.shapes}
        self.service = WeightService((part,), lambda _: self.weights, torch.float32)
        self.pushes = PushService((part,), torch.float32, PARTIES)
        self.seen: list[Message] = []
        self.break_at: int | None = None
        self.alder = self.hub.transport("alder")
        birch = self.hub.transport("birch")
        self.alder.start(lambda *_: None)
        birch.start(self.handle)
        self.alder.connect(5)
        self.ends = (self.alder, birch)

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        self.seen.append(message)
        if self.break_at is not None and len(self.seen) == self.break_at:
            self.break_at = None
            raise TransportError("the line broke")
        if message.kind.startswith("weights"):
            return self.service.handle(peer, message)
        return self.pushes.handle(peer, message)

    def close(self) -> None:
        for end in self.ends:
            end.close()


@pytest.fixture
def federation():
    running = Federation()
    yield running
    running.close()


def test_a_fetched_part_is_the_hosts_own_bytes(federation):
    federation.service.begin(Attempt(4, 1))
    fetcher = WeightFetcher(federation.alder, deadline_s=5)
    digest = fetcher.offers([BIG], Attempt(4, 1), torch.float32)[0].digest
    blob = fetcher.fetch(BIG, Attempt(4, 1), torch.float32, digest)
    torch.testing.assert_close(BIG.decode(blob, torch.float32), federation.weights, rtol=0, atol=0)
    assert sum(message.kind == WEIGHTS_CHUNK for message in federation.seen) == 3
    federation.service.begin(Attempt(5, 1))
    assert fetcher.offers([BIG], Attempt(5, 1), torch.float32)[0].digest == digest == digest_of(blob)


def test_a_broken_transfer_goes_on_at_the_missing_chunk(federation):
    federation.service.begin(Attempt(1, 1))
    federation.break_at = 3
    fetcher = WeightFetcher(federation.alder, deadline_s=5)
    blob = fetcher.fetch(
        BIG, Attempt(1, 1), torch.float32, fetcher.offers([BIG], Attempt(1, 1), torch.float32)[0].digest
    )
    torch.testing.assert_close(BIG.decode(blob, torch.float32), federation.weights, rtol=0, atol=0)
    assert sum(message.kind == WEIGHTS_CHUNK for message in federation.seen) == 4


def test_weights_are_frozen_while_a_round_is_open(federation):
    federation.service.begin(Attempt(1, 1))
    fetcher = WeightFetcher(federation.alder, deadline_s=5)
    before = fetcher.offers([BIG], Attempt(1, 1), torch.float32)[0].digest
    federation.weights["down_proj"].add_(1)
    assert fetcher.offers([BIG], Attempt(1, 1), torch.float32)[0].digest == before
    federation.service.begin(Attempt(2, 1))
    assert fetcher.offers([BIG], Attempt(2, 1), torch.float32)[0].digest != before
    with pytest.raises(RoundError, match="weights-round"):
        fetcher.offers([BIG], Attempt(1, 1), torch.float32)


def test_a_host_that_serves_other_bytes_than_it_offered_is_found_out(federation):
    federation.service.begin(Attempt(1, 1))
    honest = federation.service.handle

    def dishonest(peer: str, message: Message) -> Message:
        reply = honest(peer, message)
        if message.kind != WEIGHTS_CHUNK:
            return reply
        return replace(reply, tensors=(reply.tensors[0] ^ 1,))

    federation.service.handle = dishonest
    fetcher = WeightFetcher(federation.alder, deadline_s=5)
    digest = fetcher.offers([BIG], Attempt(1, 1), torch.float32)[0].digest
    with pytest.raises(MessageError, match="other bytes than it offered"):
        fetcher.fetch(BIG, Attempt(1, 1), torch.float32, digest)


def push(federation: Federation, blob: torch.Tensor, *, round_no: int = 7, attempt: int = 1, weights: str = "w"):
    Pusher(federation.alder, deadline_s=5).push_all([Push(BIG, lambda: blob, weights)], Attempt(round_no, attempt))


@pytest.fixture
def open_round(federation):
    federation.pushes.begin(Attempt(7, 1), {0: "w"})
    return federation


def blob_of(value: float) -> torch.Tensor:
    return BIG.encode({"down_proj": torch.full((3, CHUNK // 4), value)}, torch.float32)


def test_a_push_sent_twice_counts_once(open_round):
    push(open_round, blob_of(2.0))
    chunks = sum(message.kind == "push-chunk" for message in open_round.seen)
    push(open_round, blob_of(2.0))
    assert sum(message.kind == "push-chunk" for message in open_round.seen) == chunks
    assert open_round.pushes.complete("alder")
    assert float(open_round.pushes.sums(0, ("alder",))["down_proj"].max()) == 2.0


def test_a_broken_push_is_resumed_byte_for_byte(open_round):
    open_round.break_at = 3
    push(open_round, blob_of(3.0))
    assert float(open_round.pushes.sums(0, ("alder",))["down_proj"].min()) == 3.0
    assert sum(message.kind == "push-chunk" for message in open_round.seen) == 4


MANY = tuple(Part(n, "birch", n, (0,), (("down_proj", (2, CHUNK // 4 + n)),)) for n in range(4))


@pytest.mark.parametrize("break_at", [None, 1, 2, 4, 6, 9, 14, 19, 20])
def test_parts_pushed_together_are_all_staged_wherever_the_line_breaks(break_at):
    federation = Federation()
    federation.pushes = PushService(MANY, torch.float32, PARTIES)
    federation.pushes.begin(Attempt(7, 1), dict.fromkeys(range(4), "w"))
    federation.break_at = break_at
    sums = [part.encode({"down_proj": torch.full((2, CHUNK // 4 + part.number), float(part.number))}, torch.float32)
            for part in MANY]  # fmt: skip
    items = [Push(part, partial(sums.__getitem__, part.number), "w") for part in MANY]
    Pusher(federation.alder, deadline_s=5).push_all(items, Attempt(7, 1))
    federation.close()
    assert federation.pushes.complete("alder")
    for part, blob in zip(MANY, sums, strict=True):
        found = part.encode(federation.pushes.sums(part.number, ("alder",)), torch.float32)
        assert torch.equal(found, blob)
    if break_at is None:
        kinds = [(message.kind, message.address.part) for message in federation.seen]
        assert [layer for kind, layer in kinds if kind == "push-begin"] == [0, 1, 2, 3]
        assert kinds.index(("push-begin", 3)) < kinds.index(("push-end", 0)), "the next parts do not wait for one"
        assert sum(kind == "push-chunk" for kind, _ in kinds) == 2 + 3 * 3


def test_of_large_parts_no_more_than_two_are_in_memory_while_they_are_pushed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(push_sums, "AHEAD", 1)
    federation = Federation()
    federation.seen = deque(maxlen=0)  # it would keep what passes
    federation.pushes = PushService(MANY, torch.float32, PARTIES)
    federation.pushes.begin(Attempt(7, 1), dict.fromkeys(range(4), "w"))
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def made(part: Part) -> torch.Tensor:
        nonlocal alive, most
        values = torch.ones(2, CHUNK // 4 + part.number)
        alive, most = alive + 1, max(most, alive + 1)
        blob = part.encode({"down_proj": values}, torch.float32)
        weakref.finalize(blob.untyped_storage(), gone)
        return blob

    Pusher(federation.alder, deadline_s=5).push_all(
        [Push(part, partial(made, part), "w") for part in MANY], Attempt(7, 1)
    )
    federation.close()
    assert federation.pushes.complete("alder")
    assert 1 <= most <= 2


def test_a_retry_that_brings_the_same_bytes_keeps_what_was_staged(open_round):
    """As many attempts as a round may need, under as many epochs: no number ever stands for another one."""
    open_round.pushes.begin(Attempt(7, 1), {0: "w"}, (7, 0))
    push(open_round, blob_of(2.0))
    for number in (2, 1022, 1023, 1024, 1025, 2**32 - 1):
        open_round.pushes.begin(Attempt(7, number), {0: "w"}, (7, 0))
        assert open_round.pushes.complete("alder")
    open_round.pushes.begin(Attempt(7, 2), {0: "w"}, (7, 1023))
    assert not open_round.pushes.complete("alder"), "another epoch"
    push(open_round, blob_of(3.0), attempt=2)
    open_round.pushes.begin(Attempt(7, 3), {0: "other weights"}, (7, 1023))
    assert not open_round.pushes.complete("alder")


def test_attempts_whose_bytes_may_differ_share_nothing(open_round):
    push(open_round, blob_of(2.0))
    open_round.pushes.begin(Attempt(7, 2), {0: "w"})
    assert not open_round.pushes.complete("alder")
    push(open_round, blob_of(5.0), attempt=2)
    assert float(open_round.pushes.sums(0, ("alder",))["down_proj"].max()) == 5.0


def test_attempts_follow_each_other_and_the_end_of_their_round_follows_them_all():
    in_order = [
        Attempt(1, 1), Attempt(1, 2), Attempt(1, 1023), Attempt(1, 1024), Attempt(1, 2**32 - 1), Attempt(1),
        Attempt(2, 1), Attempt(2), Attempt(1025, 1),
    ]  # fmt: skip
    for index, one in enumerate(in_order):
        for place, other in enumerate(in_order):
            assert one.is_before(other) == (index < place)
    assert len({attempt.address() for attempt in in_order}) == len(in_order)


@pytest.mark.parametrize(
    ("blob", "options", "code"),
    [
        (blob_of(float("nan")), {}, "message-not-finite"),
        (blob_of(float("inf")), {}, "message-not-finite"),
        (blob_of(1.0)[:-4], {}, "message-unfit"),
        (blob_of(1.0), {"round_no": 6}, "push-round"),
        (blob_of(1.0), {"attempt": 2}, "push-round"),
        (blob_of(1.0), {"attempt": 0}, "push-round"),
        (blob_of(1.0), {"weights": "older"}, "push-stale-weights"),
    ],
)
def test_a_push_that_does_not_fit_is_refused_by_its_code_and_leaves_nothing(open_round, blob, options, code):
    with pytest.raises((RoundError, FrameError)) as caught:
        push(open_round, blob, **options)
    assert caught.value.code == code
    assert not open_round.pushes.complete("alder")


def test_other_bytes_for_the_same_round_are_refused_and_the_first_stay(open_round):
    push(open_round, blob_of(2.0))
    with pytest.raises(RoundError) as caught:
        push(open_round, blob_of(5.0))
    assert caught.value.code == "push-changed"
    assert float(open_round.pushes.sums(0, ("alder",))["down_proj"].max()) == 2.0


def test_a_party_outside_the_roster_cannot_push():
    service = PushService((BIG,), torch.float32, PARTIES)
    service.begin(Attempt(7, 1), {0: "w"})
    with pytest.raises(RoundError, match="cedar is not a party"):
        service.handle("cedar", Message("push-begin", Attempt(7, 1).address()))


def test_sums_are_added_in_roster_order_whatever_arrived_first():
    sums = []
    for order in (PARTIES, PARTIES[::-1]):
        service = PushService((BIG,), torch.float32, PARTIES)
        service.begin(Attempt(1, 1), {0: "w"})
        for party in order:
            blob = BIG.encode({"down_proj": torch.randn((3, CHUNK // 4), generator=seeded(party))}, torch.float32)
            begin = {"digest": digest_of(blob), "size": blob.numel(), "weights": "w"}
            service.handle(party, Message("push-begin", Attempt(1, 1).address(), begin))
            for number in (2, 0, 1):
                chunk = blob[number * CHUNK : (number + 1) * CHUNK]
                service.handle(party, Message("push-chunk", Attempt(1, 1).address(chunk=number), tensors=(chunk,)))
            service.handle(party, Message("push-end", Attempt(1, 1).address()))
        sums.append(service.sums(0, PARTIES)["down_proj"])
    assert torch.equal(*sums)
    only_alder = torch.randn((3, CHUNK // 4), generator=seeded("alder"))
    birch = torch.randn((3, CHUNK // 4), generator=seeded("birch"))
    assert torch.equal(sums[0], only_alder + birch)


def seeded(party: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, party)))


def test_a_missing_push_is_named():
    service = PushService((BIG,), torch.float32, PARTIES)
    service.begin(Attempt(1, 1), {0: "w"})
    with pytest.raises(RoundError, match="push of birch for part 0 is not complete"):
        service.sums(0, ("birch",))


def test_two_owners_can_push_at_the_same_time():
    service = PushService((BIG,), torch.float32, PARTIES)
    service.begin(Attempt(1, 1), {0: "w"})
    blob = blob_of(1.0)

    def whole(party: str) -> None:
        service.handle(
            party,
            Message(
                "push-begin",
                Attempt(1, 1).address(),
                {"digest": digest_of(blob), "size": blob.numel(), "weights": "w"},
            ),
        )
        for number in range(3):
            chunk = blob[number * CHUNK : (number + 1) * CHUNK]
            service.handle(party, Message("push-chunk", Attempt(1, 1).address(chunk=number), tensors=(chunk,)))
        service.handle(party, Message("push-end", Attempt(1, 1).address()))

    threads = [threading.Thread(target=whole, args=(party,)) for party in PARTIES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert float(service.sums(0, PARTIES)["down_proj"].min()) == 2.0
