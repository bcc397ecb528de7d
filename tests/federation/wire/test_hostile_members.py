"""No message of a member ends an honest process or changes what it holds: the table of messages, field by field."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coterie.errors import CoterieError, MessageError, RoundError
from coterie.federation.experts.host import ExpertsHost, ExpertsHostLimits
from coterie.federation.experts.masking.board import parts_digest
from coterie.federation.experts.masking.grid import GridScale, MaskGrid
from coterie.federation.experts.parts import Part, digest_of, expert_parts
from coterie.federation.experts.shared_trunk import TrunkHost
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.identity.provision import local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.rounds.attempt import Attempt, RecentAttempts
from coterie.federation.rounds.state import Phase, State
from coterie.federation.tokens.host import TokensHostLimits
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.gate import Gate
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.messages import TABLE, check_request
from coterie.federation.wire.transport import Address, Handler, Lane, Message
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.zoo.tiny import tiny_model
from helpers.hostile import POISON, mutations, poisoned
from helpers.tokens_host import dispatch, make_host, rows

PARTIES = ("alder", "birch", "cedar")
LIMITS = ExpertsHostLimits(rounds=4, weight=64, value=1e5)
NOW = Attempt(1, 1)


class Tokens:
    """A host in an open round, with one message of each kind that its peer may send."""

    def __init__(self) -> None:
        self.host = make_host(limits=TokensHostLimits(begin_s=0.05, rounds=4, micro_batches=4, tokens=64, value=1e5))
        self.host.begin(1, 1)
        self.handle: Handler = self.host.handle
        first = dispatch(rows(), round=1, attempt=1)
        out = self.host.handle("birch", Lane.FORWARD, first).tensors[0]
        self.messages = {
            "dispatch": dispatch(rows(), round=1, attempt=1, micro_batch=1),
            "gradient": Message("gradient", NOW.address(), tensors=(torch.ones_like(out),)),
            "tokens": Message("tokens", NOW.address(), {"count": 5}),
        }
        self.lanes = {"dispatch": Lane.FORWARD}

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.host.state_dict().items()}


class Experts:
    """A pool in an open round, with one message of each kind that its peer may send."""

    def __init__(self, *, masked: bool = False) -> None:
        model = tiny_model("olmoe")
        layers = expert_layers(model)
        placement = Placement.round_robin(PARTIES, [layer.num_experts for layer in layers])
        from coterie.config import OptimSpec
        from coterie.federation.shard import Shard
        from coterie.training.optim import make_optimizer
        from helpers.federations import shard_of

        parts = expert_parts(
            [{name: tuple(p.shape) for name, p in layer.parameters().items()} for layer in layers],
            [[placement.host_name(layer.index, e) for e in range(layer.num_experts)] for layer in layers],
            PARTIES,
        )
        self.parts = parts
        make = lambda params: make_optimizer(params, OptimSpec())  # noqa: E731
        shard = Shard(layers, shard_of(model, placement, "alder"), make)
        home = TrunkHost({}, make)
        self.pool = ExpertsHost(
            "alder", PARTIES, parts, shard, home, lend=lambda part: {}, limits=LIMITS, ahead=2, masked=masked
        )
        self.pool.begin(NOW)
        self.handle: Handler = lambda peer, lane, message: self.pool.handle(peer, lane, message, wait_s=0.05)
        self.part = next(part for part in parts if part.host == "alder")
        self.blob = self.part.encode(
            {name: torch.full(shape, 0.5) for name, shape in self.part.shapes}, torch.float32
        )
        number, weights = self.part.number, self.pool.own_digest(self.part.number, NOW)
        begin = {"digest": digest_of(self.blob), "size": self.blob.numel(), "weights": weights}
        at = NOW.address(part=number)
        self.messages = {
            "declare": Message("declare", NOW.address(), {"contributes": True, "weight": 6.0}),
            "weights-offer": Message("weights-offer", at),
            "weights-chunk": Message("weights-chunk", at),
            "push-begin": Message("push-begin", at, begin),
            "push-chunk": Message("push-chunk", at, tensors=(self.blob,)),
            "push-end": Message("push-end", at),
        }
        if masked:
            self.messages = {
                "mask-opening": Message(
                    "mask-opening",
                    NOW.address(),
                    {
                        "nonce": "1" * 64,
                        "serial": 1,
                        "grid": "2" * 64,
                        "can_draw": True,
                        "draw": "3" * 64,
                        "drawn_by": ["alder", "birch"],
                    },
                ),
                "mask-key": Message("mask-key", NOW.address(), {"key": "3" * 64, "signature": "45" * 70}),
                "mask-digest": Message("mask-digest", NOW.address(), {"session": "6" * 64, "digest": "7" * 64}),
            }
        assert self.blob.numel() <= 1 << 20
        self.lanes = {"weights-offer": Lane.FORWARD, "weights-chunk": Lane.FORWARD}
        self.lanes |= dict.fromkeys(("declare", "mask-opening", "mask-key", "mask-digest"), Lane.CONTROL)

    def push(self, blob: Tensor, weight: float = 6.0, part: Part | None = None) -> None:
        """A whole push of birch."""
        number, size = (part or self.part).number, blob.numel()
        at = NOW.address(part=number)
        body = {"digest": digest_of(blob), "size": size, "weights": self.pool.own_digest(number, NOW)}
        for message in (
            Message("declare", NOW.address(), {"contributes": True, "weight": weight}),
            Message("push-begin", at, body),
            Message("push-chunk", at, tensors=(blob,)),
            Message("push-end", at),
        ):
            self.handle("birch", Lane.CONTROL if message.kind == "declare" else Lane.BACKWARD, message)

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.pool.shard.state_dict().items()}


def refusal(action: Callable[[], object]) -> Exception | None:
    """What an action raised, if anything."""
    try:
        action()
    except Exception as error:
        return error
    return None


WORLDS: dict[str, Callable[[], Tokens | Experts]] = {"tokens": Tokens, "experts": Experts}


def world_of(part: str, kind: str) -> Tokens | Experts:
    """Where a message of that kind is taken."""
    return Experts(masked=True) if kind.startswith("mask-") else WORLDS[part]()


KINDS = [(row.topic, row.request.kind) for row in TABLE if row.topic in WORLDS]


@pytest.mark.parametrize(("part", "kind"), KINDS)
def test_a_message_changed_in_any_field_is_refused_by_a_code_or_does_no_harm(part: str, kind: str) -> None:
    world = world_of(part, kind)
    before, tried, refused = world.state(), 0, 0
    lane = world.lanes.get(kind, Lane.BACKWARD)
    for words, message in mutations(world.messages[kind]):
        tried += 1
        error = refusal(lambda message=message: world.handle("birch", lane, message))  # type: ignore[misc]
        refused += error is not None
        assert error is None or isinstance(error, CoterieError), (words, error)
        assert len(str(error)) < 2000, f"{words}: the error repeats what came"
    assert tried > 20
    assert refused > 0.8 * tried
    assert all(torch.equal(value, before[name]) for name, value in world.state().items())


@pytest.mark.parametrize(("part", "kind"), KINDS)
def test_a_message_on_another_lane_or_from_the_coordinator_is_refused_and_its_sender_named(
    part: str, kind: str
) -> None:
    world = world_of(part, kind)
    right = world.lanes.get(kind, Lane.BACKWARD)
    for lane in set(Lane) - {right}:
        with pytest.raises(MessageError) as caught:
            world.handle("birch", lane, world.messages[kind])
        assert (caught.value.peer, caught.value.field) == ("birch", "lane")
    with pytest.raises(MessageError) as caught:
        world.handle(COORDINATOR, right, world.messages[kind])
    assert (caught.value.peer, caught.value.field) == (COORDINATOR, "sender")
    other = "experts" if part == "tokens" else "tokens"
    with pytest.raises(MessageError) as caught:
        check_request(other, "alder", "birch", right, world.messages[kind])
    assert caught.value.field == "kind"


@pytest.mark.parametrize("kind", ["push-chunk", "push-end"])
def test_steps_of_a_push_out_of_order_or_twice_leave_what_was_staged(kind: str) -> None:
    world = Experts()
    with pytest.raises(CoterieError) as caught:
        world.handle("birch", Lane.BACKWARD, world.messages[kind])
    assert caught.value.code == "push-not-begun"
    world.push(world.blob)
    world.push(world.blob)
    with pytest.raises(CoterieError):
        world.push(world.blob ^ 1)
    found = world.pool._pushes.sums(world.part.number, ("birch",))
    assert all(bool((value == 0.5).all()) for value in found.values())


@pytest.mark.parametrize("contributes", [True, False])
def test_who_announced_a_masked_push_and_does_not_bring_it_is_named(contributes: bool) -> None:
    world = Experts(masked=True)
    body = {"contributes": contributes, "weight": 6.0}
    world.handle("birch", Lane.CONTROL, Message("declare", NOW.address(), body))
    world.pool.expect_masked(MaskGrid(2, GridScale(1.0, 2**29)), ("birch",))
    with pytest.raises(MessageError) as caught:
        world.pool.check_masked({"birch": "7" * 64})
    assert (caught.value.code, caught.value.peer) == ("mask-digest", "birch")


def test_who_said_that_it_cannot_draw_and_brings_a_masked_push_is_named_and_nothing_commits() -> None:
    """All others added noise for a sum without it."""
    world = Experts(masked=True)
    before = world.state()
    world.pool.expect_masked(MaskGrid(2, GridScale(1.0, 2**29)), ("alder", "cedar"))
    blobs = [torch.zeros(4 * part.num_values, dtype=torch.uint8) for part in world.parts if part.host == "alder"]
    world.push(blobs[0])
    with pytest.raises(MessageError) as caught:
        world.pool.check_masked({"alder": "7" * 64, "cedar": "7" * 64})
    assert (caught.value.code, caught.value.peer) == ("mask-contributor", "birch")
    with pytest.raises(RoundError):
        world.pool.commit(NOW, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in world.state().items())


def test_a_masked_push_that_comes_before_an_attempt_knows_its_grid_is_refused() -> None:
    """How wide integers are follows from who contributes: bytes of an earlier attempt's width would fit no sum."""
    world = Experts(masked=True)
    world.pool.expect_masked(MaskGrid(2, GridScale(1.0, 2**29)), ("alder", "birch"))
    later = Attempt(1, 2)
    world.pool.begin(later)
    number = world.part.number
    body = {"digest": "7" * 64, "size": 4 * world.part.num_values, "weights": world.pool.own_digest(number, later)}
    early = Message("push-begin", later.address(part=number), body)
    with pytest.raises(RoundError) as caught:
        world.handle("birch", Lane.BACKWARD, early)
    assert caught.value.code == "push-round"
    world.pool.expect_masked(MaskGrid(3, GridScale(1.0, 2**37)), PARTIES)
    with pytest.raises(MessageError):
        world.handle("birch", Lane.BACKWARD, early)


def test_who_brings_another_masked_push_than_it_announced_is_named() -> None:
    world = Experts(masked=True)
    world.pool.begin(NOW, active=("alder", "birch"))
    world.pool.expect_masked(MaskGrid(2, GridScale(1.0, 2**29)), ("alder", "birch"))
    theirs = [part for part in world.parts if part.host == "alder"]
    blobs = {part.number: torch.zeros(4 * part.num_values, dtype=torch.uint8) for part in theirs}
    for part in theirs:
        world.push(blobs[part.number], part=part)
        world.pool.stage_own(part, NOW, blobs[part.number], world.pool.own_digest(part.number, NOW))
    told = parts_digest([digest_of(blobs[part.number]) for part in theirs])
    world.pool.check_masked({"birch": told, "alder": told})
    with pytest.raises(MessageError) as caught:
        world.pool.check_masked({"birch": "7" * 64, "alder": told})
    assert (caught.value.code, caught.value.peer) == ("mask-digest", "birch")


@pytest.mark.parametrize("value", POISON)
def test_poison_in_tokens_is_refused_before_it_is_staged(value: float) -> None:
    world = Tokens()
    for kind, index in [("dispatch", 0), ("dispatch", 3), ("gradient", 0)]:
        message = world.messages[kind]
        spoilt = poisoned(message.tensors[index], value)
        tensors = (*message.tensors[:index], spoilt, *message.tensors[index + 1 :])
        with pytest.raises(MessageError) as caught:
            world.handle("birch", world.lanes.get(kind, Lane.BACKWARD), replace(message, tensors=tensors))
        assert caught.value.code in ("message-not-finite", "message-too-large")
        assert caught.value.peer == "birch"
    world.handle("birch", Lane.BACKWARD, world.messages["gradient"])  # the honest one still counts
    world.handle("birch", Lane.BACKWARD, world.messages["tokens"])


@pytest.mark.parametrize("value", POISON)
def test_poison_in_a_push_is_refused_and_an_honest_push_still_counts(value: float) -> None:
    world = Experts()
    with pytest.raises(MessageError) as caught:
        world.push(poisoned(world.blob.view(torch.float32), value).view(torch.uint8))
    assert caught.value.peer == "birch"
    world.push(world.blob)
    assert bool((next(iter(world.pool._pushes.sums(world.part.number, ("birch",)).values())) == 0.5).all())


def test_a_sum_may_be_as_large_as_its_weight_allows_and_no_larger() -> None:
    for factor, fits in [(0.99, True), (1.01, False)]:
        world = Experts()
        blob = torch.full_like(world.blob.view(torch.float32), factor * LIMITS.value * 6).view(torch.uint8)
        if fits:
            world.push(blob)
            continue
        with pytest.raises(MessageError, match="beyond 6e\\+05"):
            world.push(blob)


@pytest.mark.parametrize("weight", [10**400, 65, 0.5, 2**53])
def test_a_weight_that_would_drown_or_lift_everybodys_sums_is_refused(weight: float) -> None:
    world = Experts()
    with pytest.raises(MessageError):
        world.handle(
            "birch", Lane.CONTROL, Message("declare", NOW.address(), {"contributes": True, "weight": weight})
        )


def test_the_tables_of_the_wire_are_current() -> None:
    script = Path(__file__).parents[3] / "docs" / "generate_reference.py"
    subprocess.run([sys.executable, str(script), "--check", "wire"], check=True)


# ---- replies, and the gate ----------------------------------------------------------------------------------------


class Answers:
    """A transport on which every request is answered with what was put there."""

    me, peers = "alder", ("birch",)

    def __init__(self) -> None:
        self.reply = Message("ack")

    def request_async(self, peer: str, lane: Lane, message: Message, deadline_s: float):  # type: ignore[no-untyped-def]
        from concurrent.futures import Future

        future: Future[Message] = Future()
        future.set_result(self.reply)
        return future


@pytest.mark.parametrize("row", [row for row in TABLE if row.topic in WORLDS], ids=lambda row: row.request.kind)
def test_a_reply_changed_in_any_field_is_an_error_with_its_senders_name_and_nothing_else(row) -> None:  # type: ignore[no-untyped-def]
    world = world_of(row.topic, row.request.kind)
    request = world.messages[row.request.kind]
    if row.request.kind == "push-chunk":
        world.handle("birch", Lane.CONTROL, world.messages["declare"])
        world.handle("birch", Lane.BACKWARD, world.messages["push-begin"])
    if row.request.kind == "push-end":
        world.push(world.blob)  # type: ignore[union-attr]
    if row.request.kind == "tokens":
        world.handle("birch", Lane.BACKWARD, world.messages["gradient"])
    honest = world.handle("birch", row.lane, request)
    assert honest is not None
    answers, said = Answers(), []
    gate = Gate(answers, 2, anew(), lambda peer, code: said.append((peer, code)))  # type: ignore[arg-type]
    answers.reply = honest
    assert gate.request("birch", row.lane, request, 1.0) is honest
    misfits = 0
    for words, reply in mutations(honest):
        answers.reply = reply
        error = refusal(lambda: gate.request("birch", row.lane, request, 1.0))
        assert error is None or (isinstance(error, MessageError) and error.peer == "birch"), (words, error)
        misfits += error is not None
    assert misfits > 20
    assert len(said) == misfits // 2
    assert set(said) == {("birch", "message-unfit")}


def anew() -> Callable[[Address | None], int]:
    """Every message is of a period of its own."""
    numbers = itertools.count()
    return lambda address: next(numbers)


def test_all_that_does_not_fit_in_one_attempt_counts_once() -> None:
    answers, said, attempt = Answers(), [], [1]
    gate = Gate(answers, 2, lambda address: attempt[0], lambda peer, code: said.append(peer))  # type: ignore[arg-type]
    for number in (1, 1, 1, 2, 2):
        attempt[0] = number
        with pytest.raises(MessageError):
            gate.request("birch", Lane.BACKWARD, Message("push-end", NOW.address()), 1.0)  # it is answered with `ack`
    assert said == ["birch"]


def test_what_is_looked_at_when_its_attempt_is_over_counts_with_that_attempt() -> None:
    """Late ones of the attempt before; but a member that names an old attempt for ever is counted in each new one."""
    attempts, now, said = RecentAttempts(), [0], []
    answers = Answers()
    gate = Gate(answers, 2, lambda address: attempts.seq(address, now[0]), lambda peer, code: said.append(peer))  # type: ignore[arg-type]

    def misfit(named: Attempt) -> None:
        with pytest.raises(MessageError):
            gate.request("birch", Lane.BACKWARD, Message("push-end", named.address()), 1.0)

    def begin(seq: int, attempt: int) -> None:
        now[0] = seq
        attempts.add(State(seq=seq, phase=Phase.COMPUTE, round=1, attempt=attempt))

    begin(5, 1)
    misfit(Attempt(1, 1))
    now[0] = 6  # aborted; the rest of what was sent comes out of its queue now, and in the next attempt
    misfit(Attempt(1, 1))
    begin(7, 2)
    misfit(Attempt(1, 1))
    assert not said
    begin(8, 3)
    misfit(Attempt(1, 1))
    assert said == ["birch"]


def test_an_exception_of_our_own_is_a_refusal_that_counts_against_nobody() -> None:
    hub, said = InProcessHub(["alder", "birch"]), []
    gate = Gate(hub.transport("alder"), 1, lambda address: 1, lambda peer, code: said.append(peer))
    birch = hub.transport("birch")

    def broken(peer: str, lane: Lane, message: Message) -> Message:
        raise ZeroDivisionError("a private value")

    gate.start(broken)
    birch.start(lambda peer, lane, message: message)
    with pytest.raises(CoterieError) as caught:
        birch.request("alder", Lane.FORWARD, Message("dispatch"), 5.0)
    assert caught.value.code == "remote-failure"
    assert "private" not in str(caught.value)
    assert not said
    gate.close()
    birch.close()


# ---- with a member's key over mutual TLS --------------------------------------------------------------------------


@pytest.mark.parametrize("part", WORLDS)
def test_a_member_with_its_key_cannot_end_or_change_an_honest_one(tmp_path: Path, part: str) -> None:
    """Every change that a frame can carry goes over a real channel; afterwards honest messages are answered."""
    world, said = WORLDS[part](), []
    kits = local_kits(tmp_path / "kits", ["alder", "birch"])
    settings = Settings(redial_s=0.05, close_s=1.0)
    ends = {name: GrpcTransport(name, load_roster(kit), kit, settings=settings) for name, kit in kits.items()}
    gate = Gate(
        ends["alder"],
        2,
        anew(),
        lambda peer, code: said.append(peer),
    )
    try:
        gate.start(world.handle)
        ends["birch"].start(lambda peer, lane, message: message)
        ends["birch"].connect(10.0)
        before, answered = world.state(), 0
        for kind, message in world.messages.items():
            lane = world.lanes.get(kind, Lane.BACKWARD)
            for words, changed in list(mutations(message))[::3]:
                error = refusal(lambda m=changed, on=lane: ends["birch"].request("alder", on, m, 10.0))  # type: ignore[misc]
                assert error is None or isinstance(error, CoterieError), (kind, words, error)
                code = getattr(error, "code", "")
                assert code not in ("connection-lost", "remote-failure", "message-failed"), (kind, words)
                answered += not code.startswith("frame-")  # which no frame can hold
        assert answered > 50
        assert len(said) > 20
        assert set(said) == {"birch"}
        assert all(torch.equal(value, before[name]) for name, value in world.state().items())
        for kind in {"tokens": ("gradient",), "experts": ("weights-offer", "weights-chunk")}[part]:
            ends["birch"].request("alder", world.lanes.get(kind, Lane.BACKWARD), world.messages[kind], 10.0)
    finally:
        for end in ends.values():
            end.close()
