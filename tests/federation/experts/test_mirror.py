"""The owner's mirror of the pool: layers usable as they come, nothing half-fetched ever used."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from coterie.errors import RoundError
from coterie.federation.experts.fetch_weights import WeightFetcher
from coterie.federation.experts.host import DECLARE, ExpertsHost
from coterie.federation.experts.owner import Mirror
from coterie.federation.experts.parts import Part, digest_of, expert_parts
from coterie.federation.experts.serve_weights import CHUNK, WeightService
from coterie.federation.experts.shared_trunk import TrunkHost
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.transport import Lane, Message
from coterie.models.streaming.cache import MemoryStore, WeightCache

PARTIES = ("alder", "birch")
LAYERS, EXPERTS = 3, 4
PARTS = expert_parts(
    [{"gate_up_proj": (EXPERTS, 6, 5), "down_proj": (EXPERTS, 5, 3)}] * LAYERS,
    [["alder", "birch", "alder", "birch"]] * LAYERS,
    PARTIES,
    {"norm": (3,)},
)


class OwnParts:
    """What a `ExpertsHost` is to a mirror."""

    me = "alder"

    def __init__(self, world: MirrorWorld) -> None:
        self._world = world

    def own_bytes(self, number: int, attempt: Attempt) -> Tensor:
        part = PARTS[number]
        return part.encode(self._world.weights(part), torch.float32)

    def own_digest(self, number: int, attempt: Attempt) -> str:
        return digest_of(self.own_bytes(number, attempt))


class MirrorWorld:
    """alder mirrors its own parts and birch's; `before` sees every request to birch and may wait or raise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = [
            {name: torch.randn(EXPERTS, *shape, generator=generator) for name, shape in SHAPES.items()}
            for _ in range(LAYERS)
        ]
        self.seen: list[tuple[str, int]] = []
        self.trunks: list[int] = []
        self.before = lambda message: None
        hub = InProcessHub(PARTIES)
        self.alder, birch = hub.transport("alder"), hub.transport("birch")
        self.service = WeightService(tuple(p for p in PARTS if p.host == "birch"), self.weights, torch.float32)
        self.alder.start(lambda *_: None)
        birch.start(self.handle)
        self.alder.connect(5)
        self.ends = (self.alder, birch)
        self.mirror = Mirror(
            PARTS, [EXPERTS] * LAYERS, WeightCache(MemoryStore(), LAYERS), OwnParts(self),  # type: ignore[arg-type]
            WeightFetcher(self.alder, deadline_s=5), torch.float32,
            set_trunk=lambda tensors: self.trunks.append(1), wait_s=5,
        )  # fmt: skip

    def weights(self, part: Part) -> dict[str, Tensor]:
        if part.layer < 0:
            return {"norm": torch.ones(3)}
        return {name: tensor[list(part.experts)] for name, tensor in self.layers[part.layer].items()}

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        self.seen.append((message.kind, message.address.part))
        self.before(message)
        return self.service.handle(peer, message)

    def begin(self, round_no: int) -> None:
        attempt = Attempt(round_no, 1)
        self.service.begin(attempt)
        self.mirror.start(attempt, self.mirror.versions(attempt))

    def whole_round(self, round_no: int) -> None:
        """Fetch everything. A fault shows at the start already, or at the end."""
        self.begin(round_no)
        self.mirror.join()

    def assert_right(self, layer: int) -> None:
        for name, tensor in self.mirror.get(layer).items():
            torch.testing.assert_close(tensor, self.layers[layer][name], rtol=0, atol=0)


SHAPES = {"gate_up_proj": (6, 5), "down_proj": (5, 3)}


@pytest.fixture
def world() -> Iterator[MirrorWorld]:
    running = MirrorWorld()
    yield running
    running.mirror.cancel()
    running.mirror.join(check=False)
    for end in running.ends:
        end.close()


def test_a_layer_is_usable_while_the_next_one_is_still_on_its_way(world: MirrorWorld):
    go_on = threading.Event()
    world.before = lambda message: (
        go_on.wait(5) if message.kind == CHUNK and PARTS[message.address.part].layer == 1 else None
    )
    world.begin(1)
    world.assert_right(0)
    assert world.mirror.fetch_s == 0
    go_on.set()
    for layer in (1, 2):
        world.assert_right(layer)
    world.mirror.join()
    assert world.mirror.fetch_s > 0


def test_following_parts_are_asked_for_before_the_first_one_has_come(world: MirrorWorld):
    asked = threading.Event()
    chunks = []

    def before(message: Message) -> None:
        if message.kind == CHUNK:
            chunks.append(message.address.part)
            assert asked.wait(60), "the second part was not asked for while the first was on its way"

    begin = world.mirror._fetcher.begin
    begun: list[int] = []

    def counted(part: Part, *rest):  # type: ignore[no-untyped-def]
        begun.append(part.number)
        if len(begun) == LAYERS:
            asked.set()
        return begin(part, *rest)

    world.before, world.mirror._fetcher.begin = before, counted  # type: ignore[method-assign]
    world.begin(1)
    world.mirror.join()
    assert chunks == begun == sorted(begun), "in the order in which layers are used"


def test_a_part_whose_layer_never_became_whole_comes_again(world: MirrorWorld):
    world.begin(1)
    world.mirror.join()
    for layer in world.layers:
        for tensor in layer.values():
            tensor.add_(1)

    def broken(message: Message) -> None:
        if message.kind == CHUNK:
            raise RoundError("birch gave the attempt up.", code="round-interrupted")

    world.before = broken
    with pytest.raises(RoundError, match="round-interrupted"):
        world.whole_round(2)
    world.before = lambda message: None
    world.begin(3)
    for layer in range(LAYERS):
        world.assert_right(layer)


def test_trunk_that_was_overwritten_from_elsewhere_is_taken_in_again_though_it_is_the_same(world: MirrorWorld):
    for round_no, taken_in in ((1, 1), (2, 1)):
        world.whole_round(round_no)
        assert len(world.trunks) == taken_in
    world.seen.clear()
    world.mirror.forget_trunk()
    world.whole_round(3)
    assert len(world.trunks) == 2
    assert not [part for kind, part in world.seen if kind == CHUNK and PARTS[part].layer >= 0]


def test_unchanged_parts_are_not_asked_for_again(world: MirrorWorld):
    world.begin(1)
    world.mirror.join()
    world.seen.clear()
    world.layers[1]["down_proj"].add_(1)
    world.begin(2)
    world.mirror.join()
    assert {PARTS[part].layer for kind, part in world.seen if kind == CHUNK} == {1}
    for layer in range(LAYERS):
        world.assert_right(layer)


def test_messages_for_a_line_that_was_given_up_hold_up_nothing() -> None:
    """One thread serves a lane: a request that waits for a round which never comes would delay all that follow."""
    home = TrunkHost({}, lambda params: None)  # type: ignore[arg-type, return-value]
    pool = ExpertsHost(
        "birch",
        ("alder", "birch"),
        [],
        None,  # type: ignore[arg-type]
        home,
        lend=lambda part: {},
        ahead=2,
    )
    pool.begin(Attempt(8, 1))
    refused: list[str] = []

    def ask(round_no: int) -> None:
        try:
            body = {"contributes": False, "weight": 0.0}
            pool.handle("alder", Lane.CONTROL, Message(DECLARE, Attempt(round_no, 1).address(), body), wait_s=30.0)
        except RoundError as error:
            refused.append(str(error.code))

    early = threading.Thread(target=ask, args=(9,))  # the next round: it waits
    early.start()
    early.join(0.2)
    assert early.is_alive()
    pool.forget()
    pool.go_on_after(4)
    early.join(60.0)
    assert not early.is_alive()
    ask(9)  # one that was queued behind it
    assert refused == ["round-given-up"] * 2
    next_one = threading.Thread(target=ask, args=(5,))  # the next round of the line that counts
    next_one.start()
    next_one.join(0.2)
    assert next_one.is_alive()
    pool.begin(Attempt(5, 1))
    next_one.join(60.0)
    assert not next_one.is_alive()
    assert len(refused) == 2
