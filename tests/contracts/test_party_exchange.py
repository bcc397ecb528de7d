"""Every exchange that a `PartyActor` is given keeps the rules of `Exchange`; the phases are told by hand."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.config import PrivacySpec
from coterie.errors import CoterieError, DataError, RoundError
from coterie.federation.cancel import NEVER, CancelToken
from coterie.federation.rounds.state import FIRST, Phase, Saved, State
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.messages import TABLE, kinds
from coterie.federation.wire.transport import Address, Lane, Message
from coterie.models import seam
from coterie.models.seam import expert_layers
from coterie.models.split.shards import expert_key
from coterie.training.folders import private_folder
from coterie.training.party.actor import PartyActor
from coterie.training.party.inputs import PartyInputs, PrivacyInputs, trunk_tensors
from coterie.training.party.run import make_actor
from coterie.training.party.store import PartyStore
from helpers.by_hand import ByHand, Union
from helpers.comparing import relative
from helpers.federations import PARTIES, full_models, make_parts, settings
from helpers.private_federation import skip_comparison
from helpers.waiting import until

RULES = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.7, "lot_size": 5}
EXPERTS = {"exchange": "experts", "weights_dtype": "float32"}
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"exchange": "tokens"},
    "experts": {**EXPERTS, "privacy": "none"},
    "experts, shared trunk": {**EXPERTS, "privacy": "none", "trunk": "shared"},
    "experts, private": {**EXPERTS, "privacy": RULES, "trunk": "shared"},
}
MODELS = full_models(num_hidden_layers=2)
SIZES = {"train__batch_size": 4}
"""Two micro-batches a round."""
PATIENCE_S = 600.0
BOOKS = ("received-round:", "ledger:")
DECLARATIONS = {"tokens": "tokens", "experts": "declare"}


class Heard(NamedTuple):
    """A request that a party was asked."""

    phase: Phase
    sender: str
    receiver: str
    lane: Lane
    message: Message


Act = Callable[[PartyActor], object]


class Parties:
    """Three parties' actors over one hub, taken through the phases as a coordinator would."""

    def __init__(self, kind: Mapping[str, Any], folder: Path, stack: ExitStack, **changes: object) -> None:
        self.config = settings(**{**kind, "lost_party": "continue", **SIZES, **changes})
        self.shared, self.private = self.config.trunk == "shared", kind.get("privacy") is RULES
        self.models = {name: copy.deepcopy(MODELS[PARTIES[0] if self.shared else name]) for name in PARTIES}
        self._folder, self._stack = folder, stack
        self.heard: list[Heard] = []
        self.fault: Callable[[Heard], None] = lambda heard: None
        self.newest = State()
        self.up()

    def _make_parts(self) -> dict[str, PartyInputs]:
        parts = make_parts(self.config, self.models, self._folder)
        if self.private:
            for number, name in enumerate(PARTIES):
                spec = PrivacySpec(**{**RULES, "ledger": self._folder / f"ledger-{name}", "physical_batch": 2})
                privacy = PrivacyInputs(spec, self.config.train.rounds, seed=number, noise_multiplier=0.5)
                parts[name] = replace(parts[name], privacy=privacy)
        return parts

    # ---- processes ----

    def up(self) -> None:
        """All parties as new processes, with nothing but their folders."""
        hub = InProcessHub(PARTIES)
        self.transports = {name: hub.transport(name) for name in PARTIES}
        self.actors: dict[str, PartyActor] = {}
        self.parts = self._make_parts()
        for name, parts in self.parts.items():
            private_folder(parts.run_dir).mkdir(mode=0o700, exist_ok=True)
            store = PartyStore(parts.run_dir, name, "agreed", parts.train.digest())
            store.adopt("grove-1")
            self.actors[name] = make_actor(parts, self.transports[name], store)
            self._stack.callback(self.down, name, self.actors[name])
            self.transports[name].start(self._handler(name))

    def down(self, name: str, actor: PartyActor) -> None:
        """The end of one process; can be repeated."""
        actor.exchange.stop_serving()
        self.transports[name].close()
        actor.close()

    def again(self) -> None:
        """End all processes and start them again."""
        for name, actor in self.actors.items():
            self.down(name, actor)
        self.up()

    def _handler(self, name: str) -> Callable[[str, Lane, Message], Message]:
        def handle(peer: str, lane: Lane, message: Message) -> Message:
            heard = Heard(self.newest.phase, peer, name, lane, message)
            self.heard.append(heard)
            self.fault(heard)
            return self.actors[name].exchange.handle(peer, lane, message)

        return handle

    # ---- phases ----

    def tell(self, phase: Phase, round_no: int, attempt: int = 0, **more: Any) -> State:
        self.newest = State(phase=phase, round=round_no, attempt=attempt, **more)
        return self.newest

    def ends(self, act: Act, parties: tuple[str, ...]) -> dict[str, object]:
        """How each party ended an act that all do at once: a result or an error. The first error cancels the
        others, as the coordinator's next directive would."""
        with ThreadPoolExecutor(len(parties)) as threads:
            futures = {threads.submit(act, self.actors[name]): name for name in parties}
            others = wait(futures, PATIENCE_S, return_when=FIRST_EXCEPTION).not_done
            for future in others:
                self.actors[futures[future]].cancel()
            late = wait(others, PATIENCE_S).not_done
            for future in late:  # so that the test ends
                self.transports[futures[future]].close()
            assert not late, f"{futures[next(iter(late))]} does not end"
        return {name: future.exception() or future.result() for future, name in futures.items()}

    def all(self, act: Act, parties: tuple[str, ...] = PARTIES) -> dict[str, object]:
        """The same where nobody may fail."""
        ends = self.ends(act, parties)
        for name, end in ends.items():
            if isinstance(end, BaseException):
                raise AssertionError(f"{name} failed") from end
        return ends

    def load(self, sources: Mapping[str, Saved] | None = None, round_no: int = 0) -> None:
        state = self.tell(Phase.RESTORE, round_no)
        for name, actor in self.actors.items():
            actor.load(sources[name] if sources else FIRST, state)

    def compute(self, round_no: int, attempt: int = 1, active: tuple[str, ...] = PARTIES) -> None:
        absent = tuple(name for name in PARTIES if name not in active)
        state = self.tell(Phase.COMPUTE, round_no, attempt, absent=absent, epoch=len(absent))
        self.all(lambda actor: actor.compute(state, NEVER), active)

    def step(self, round_no: int, attempt: int = 1, active: tuple[str, ...] = PARTIES) -> None:
        self.tell(Phase.STEP, round_no, attempt)
        for name in active:
            self.actors[name].step(round_no, attempt)

    def drop(self, round_no: int, attempt: int) -> None:
        self.tell(Phase.GATHER, round_no - 1)
        for actor in self.actors.values():
            actor.drop(round_no, attempt)

    def round(self, round_no: int, attempt: int = 1, active: tuple[str, ...] = PARTIES) -> None:
        self.compute(round_no, attempt, active)
        self.step(round_no, attempt, active)

    def evaluate(self, round_no: int, active: tuple[str, ...] = PARTIES) -> None:
        absent = tuple(name for name in PARTIES if name not in active)
        state = self.tell(Phase.EVALUATE, round_no, absent=absent, epoch=len(absent))
        self.all(lambda actor: actor.evaluate(state, NEVER), active)

    def save(self, round_no: int) -> dict[str, Saved]:
        state = self.tell(Phase.CHECKPOINT, round_no)
        digests = self.all(lambda actor: actor.save(state, NEVER))
        return {name: Saved(round_no, str(digest)) for name, digest in digests.items()}

    def heard_in(self, phase: Phase) -> list[Heard]:
        return [heard for heard in self.heard if heard.phase is phase]

    # ---- what is stored ----

    def hosted(self, name: str) -> dict[str, Tensor]:
        """Parameters that a party stores for everybody, without their optimiser's state."""
        state = self.actors[name].exchange.hosted_state()
        named = {key.removeprefix("trunk:"): value for key, value in state.items() if "/" not in key}
        return {key: value.detach().clone() for key, value in named.items() if value.is_floating_point()}

    def trunk(self, name: str) -> dict[str, Tensor]:
        model = self.actors[name].inputs.model
        return {key: value.detach().clone() for key, value in trunk_tensors(model).items()}

    def stored(self) -> dict[str, Tensor]:
        """Parameters, buffers and optimiser states of every party; not what it knows of messages and its ledger."""
        found = {}
        for name, actor in self.actors.items():
            state = {**self.trunk(name), **actor.exchange.hosted_state()}
            kept = {key: value for key, value in state.items() if not key.startswith(BOOKS)}
            found |= {f"{name} {key}": value.detach().clone() for key, value in kept.items()}
        return found

    def assembled(self, name: str) -> nn.Module:
        """A whole model of a party's trunk and of what everybody stores, computed by the family's own code."""
        model = copy.deepcopy(self.models[name])
        seam.select(model)
        own, layers = dict(model.named_parameters()), expert_layers(model)
        with torch.no_grad():
            for host in PARTIES:
                for key, value in self.hosted(host).items():
                    if key in own:
                        own[key].copy_(value)
                    elif key.startswith("layer."):
                        _, layer, _, expert, parameter = key.split(".")
                        layers[int(layer)].parameters()[parameter][int(expert)].copy_(value)
            if not self.shared:
                for key, value in self.trunk(name).items():
                    if key in own:
                        own[key].copy_(value)
        return model.eval()

    # ---- the same by hand ----

    def by_hand(self) -> ByHand | Union:
        if self.shared:
            return Union(self.config, self.models[PARTIES[0]], self.parts)
        return ByHand(self.config, self.models, self.parts)

    def whole(self, name: str) -> nn.Module:
        """The whole model that `by_hand` trains in a party's place."""
        return self.models[PARTIES[0] if self.shared else name]

    def assert_as_by_hand(self, active: tuple[str, ...] = PARTIES) -> None:
        experts = {
            f"layer.{layer.index}.expert.{expert}.{name}": value[expert]
            for layer in expert_layers(self.models[PARTIES[0]])
            for name, value in layer.parameters().items()
            for expert in range(layer.num_experts)
        }
        for name in active:
            expected = {**dict(self.whole(name).named_parameters()), **experts}
            found = self.hosted(name) | ({} if self.shared else self.trunk(name))
            for key in found.keys() & expected.keys():
                assert relative(found[key], expected[key]) < 1e-5, (name, key)


@pytest.fixture(scope="module", autouse=True)
def already_compared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        skip_comparison(patch)
        yield


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys(), scope="module")
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


@pytest.fixture
def build(kind: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Parties]]:
    """Makes the world of a kind; a deadline so long that no test passes by it."""
    with ExitStack() as stack:
        yield lambda **changes: Parties(kind, tmp_path, stack, **{"deadline_s": 3600.0, **changes})


@pytest.fixture
def world(build: Callable[..., Parties]) -> Parties:
    made = build()
    made.load()
    return made


class FirstRound(NamedTuple):
    """The first round of a kind, for tests that only look at it."""

    world: Parties
    hosted: dict[str, dict[str, Tensor]]
    before: dict[str, Tensor]
    computed: dict[str, Tensor]


@pytest.fixture(scope="module")
def first_round(kind: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FirstRound]:
    with ExitStack() as stack:
        world = Parties(kind, tmp_path_factory.mktemp("first"), stack, deadline_s=3600.0)
        world.load()
        hosted, before = {name: world.hosted(name) for name in PARTIES}, world.stored()
        world.compute(1)
        computed = world.stored()
        world.step(1)
        yield FirstRound(world, hosted, before, computed)


def differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


def test_a_round_changes_nothing_before_its_commit_and_everything_hosted_at_it(first_round: FirstRound) -> None:
    assert differing(first_round.before, first_round.computed) == set()
    for name in PARTIES:
        assert differing(first_round.hosted[name], first_round.world.hosted(name)) == first_round.hosted[name].keys()


def test_committed_rounds_are_those_of_one_loop_by_hand_also_after_a_dropped_attempt(
    world: Parties,
) -> None:
    if world.private:
        pytest.skip("against clipping one record at a time in tests/training/experts/test_private_exchange.py")
    world.round(1)
    world.compute(2)
    world.drop(2, 1)
    world.round(2, 2)
    world.by_hand().train(range(1, 3))
    world.assert_as_by_hand()


def test_an_attempt_that_was_dropped_can_not_be_committed(world: Parties) -> None:
    world.compute(1)
    world.drop(1, 1)
    before = world.stored()
    for actor in world.actors.values():
        with pytest.raises(KeyError):
            actor.exchange.commit(1, 1, 0.1)
    assert differing(before, world.stored()) == set()


def test_nothing_is_asked_but_what_a_phase_needs(world: Parties) -> None:
    """Computing asks for its own attempt; what looks at the model between rounds asks for no attempt, and sends no
    gradient."""
    topic = world.config.exchange
    world.round(1)
    world.evaluate(1)
    world.save(1)
    world.compute(2)
    world.drop(2, 1)
    world.load()
    assert {heard.phase for heard in world.heard} <= {Phase.COMPUTE, Phase.EVALUATE, Phase.CHECKPOINT}
    for heard in world.heard:
        assert heard.message.kind in kinds(topic)
        assert heard.sender != heard.receiver
    asked = {(h.message.address.round, h.message.address.attempt) for h in world.heard_in(Phase.COMPUTE)}
    assert asked == {(1, 1), (2, 1)}
    for phase in (Phase.EVALUATE, Phase.CHECKPOINT):
        between = world.heard_in(phase)
        assert {(h.message.address.round, h.message.address.attempt) for h in between} <= {(1, 0)}
        assert {h.lane for h in between} <= {Lane.FORWARD}
    assert bool(world.heard_in(Phase.CHECKPOINT)) == world.actors["alder"].exchange.shares_trunk
    assert not any(h.message.body.get("keep") for h in world.heard_in(Phase.EVALUATE))


def test_every_host_is_told_once_by_everybody_what_sums_are_divided_by(first_round: FirstRound) -> None:
    world = first_round.world
    told = [(h.sender, h.receiver) for h in world.heard if h.message.kind == DECLARATIONS[world.config.exchange]]
    assert sorted(told) == sorted((one, other) for one in PARTIES for other in PARTIES if one != other)


def test_a_second_attempt_releases_and_moves_nothing_that_the_first_one_did(world: Parties) -> None:
    """Hidden vectors have to cross again, under the new attempt's number."""
    world.compute(1)
    first = [heard.message for heard in world.heard]
    world.heard.clear()
    world.drop(1, 1)
    world.compute(1, 2)
    second = [heard.message for heard in world.heard]
    assert {message.address.attempt for message in second} == {2}
    assert not [message for message in second if message.kind == "weights-chunk"]
    if world.private:
        begun = [
            sorted((m.address.part, m.body["digest"]) for m in messages if m.kind == "push-begin")
            for messages in (first, second)
        ]
        assert begun[0] == begun[1] != []
        assert not [message for message in second if message.kind == "push-chunk"]
        for actor in world.actors.values():
            privacy = actor.exchange.privacy()
            assert privacy is not None
            assert privacy["rounds"] == 1


def test_what_is_given_up_while_a_party_is_waited_for_ends_before_the_deadline(world: Parties) -> None:
    state = world.tell(Phase.COMPUTE, 1, 1)
    given_up = threading.Event()
    waiting = PARTIES[:2]

    def give_up() -> None:
        until(lambda: {h.sender for h in world.heard if h.receiver == "cedar"} == set(waiting), PATIENCE_S)
        given_up.set()
        for name in waiting:
            world.actors[name].cancel()

    other = threading.Thread(target=give_up)
    other.start()
    ends = world.ends(lambda actor: actor.compute(state, CancelToken(given_up.is_set)), waiting)
    other.join()
    for end in ends.values():
        assert isinstance(end, RoundError)
        assert end.code in ("round-interrupted", "round-cancelled")
    world.drop(1, 1)
    world.round(1, 2)
    if not world.private:
        world.by_hand().train(range(1, 2))
        world.assert_as_by_hand()


def test_what_was_given_up_before_it_began_asks_nobody(build: Callable[..., Parties]) -> None:
    """The cancel came before there was anything to end: asking whether it still counts is all that is left."""
    world = build(deadline_s=2.0)
    world.load()
    exchange, gone = world.actors["alder"].exchange, CancelToken(lambda: True)

    def evaluate(state: State, cancel: CancelToken) -> None:
        with exchange.inference(state, cancel):
            pass

    for phase, attempt, begin in ((Phase.COMPUTE, 1, exchange.compute), (Phase.EVALUATE, 0, evaluate)):
        exchange.cancel()
        with pytest.raises(RoundError) as caught:
            begin(world.tell(phase, 1, attempt), gone)
        assert caught.value.code == "round-interrupted", phase
        assert world.heard == [], phase


def test_an_error_at_a_host_reaches_who_asked_by_its_code_alone_and_the_next_attempt_is_whole(
    world: Parties,
) -> None:
    failed: list[str] = []

    def fails(heard: Heard) -> None:
        if heard.receiver == "cedar" and heard.lane is Lane.BACKWARD and not failed:
            failed.append(heard.sender)
            raise DataError("a text of cedar's", code="disk-broken", where="a path of cedar's")

    world.fault = fails
    state = world.tell(Phase.COMPUTE, 1, 1)
    before = world.stored()
    ends = world.ends(lambda actor: actor.compute(state, NEVER), PARTIES)
    error = ends[failed[0]]
    assert isinstance(error, DataError)
    assert error.code == "disk-broken"
    assert "of cedar's" not in str(error)
    assert differing(before, world.stored()) == set()
    world.drop(1, 1)
    world.round(1, 2)
    if not world.private:
        world.by_hand().train(range(1, 2))
        world.assert_as_by_hand()


def test_requests_that_belong_to_nothing_are_refused_by_code(world: Parties) -> None:
    exchange, topic = world.actors["cedar"].exchange, world.config.exchange
    for row in TABLE:
        if row.topic != topic:
            with pytest.raises(CoterieError) as foreign:
                exchange.handle("alder", row.lane, Message(row.request.kind, Address(round=1, attempt=1)))
            assert foreign.value.code == "message-unfit"
    world.compute(1)
    declared = next(h for h in world.heard if h.message.kind == DECLARATIONS[topic] and h.receiver == "cedar")
    world.drop(1, 1)
    world.compute(1, 2)
    with pytest.raises(RoundError):
        exchange.handle(declared.sender, declared.lane, declared.message)
    world.step(1, 2)
    ahead = replace(declared.message, address=replace(declared.message.address, round=2))
    exchange.stop_serving()
    with pytest.raises(RoundError) as closed:
        exchange.handle(declared.sender, declared.lane, ahead)
    assert closed.value.code == "host-closed"


def test_an_evaluation_is_that_of_the_whole_model_and_leaves_no_trace(world: Parties) -> None:
    """One party has no held-out text; it serves the others all the same."""
    birch = world.actors["birch"]
    birch.inputs = replace(birch.inputs, test=None)
    world.round(1)
    world.save(1)  # brings a shared trunk up to date
    torch.manual_seed(0)
    before, generator = world.stored(), torch.get_rng_state()
    world.evaluate(1)
    assert differing(before, world.stored()) == set()
    assert torch.equal(torch.get_rng_state(), generator)
    assert birch.evaluation is None
    for name in ("alder", "cedar"):
        found, test = world.actors[name].evaluation, world.parts[name].test
        assert found is not None
        assert test is not None
        model, loss, tokens = world.assembled(name), 0.0, 0
        for row in range(len(test)):
            ids = test[row]["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
            tokens += len(ids) - 1
        assert found.tokens == tokens
        assert found.loss == pytest.approx(loss / tokens, rel=1e-5)


def test_a_checkpoint_brings_back_in_a_new_process_and_in_the_same_one_what_it_held(world: Parties) -> None:
    world.round(1)
    saved = world.save(1)
    held = world.stored()
    world.round(2)
    later = {name: world.hosted(name) | world.trunk(name) for name in PARTIES}
    for restart in (False, True):
        if restart:
            world.again()
        world.load(saved, 1)
        assert differing(held, world.stored()) == set(), restart
        world.round(2, 2 + restart)
        for name in PARTIES:
            for key, value in (world.hosted(name) | world.trunk(name)).items():
                assert relative(value, later[name][key]) < 1e-5, (restart, name, key)


def test_hosted_state_names_parameters_by_global_key_and_the_optimisers_with_a_slash(
    first_round: FirstRound,
) -> None:
    for name, actor in first_round.world.actors.items():
        hosted = first_round.world.parts[name].placement.hosted(name)
        keys = actor.exchange.hosted_state().keys()
        assert {key for key in keys if key.startswith("layer.") and "/" not in key} == {
            expert_key(layer.index, expert, parameter)
            for layer in expert_layers(actor.inputs.model)
            for expert in hosted.get(layer.index, ())
            for parameter in layer.parameters()
        }
        assert any("/" in key for key in keys)


def test_the_split_model_comes_back_as_it_was(world: Parties) -> None:
    before = world.stored()
    world.round(1)
    world.load()
    after = world.stored()
    assert differing(before, {key: after[key] for key in before}) == set()


def test_without_a_lost_party_the_others_ask_it_nothing_and_its_experts_add_nothing(world: Parties) -> None:
    left = PARTIES[:2]
    world.round(1)
    by_hand = world.by_hand()
    by_hand.train(range(1, 2))
    world.save(1)  # alder has the share of a shared trunk that is lost next
    lost, share = world.hosted("cedar"), frozenset(world.hosted("cedar")) & world.trunk("alder").keys()
    world.down("cedar", world.actors["cedar"])
    world.heard.clear()
    world.round(2, active=left)
    world.evaluate(2, active=left)
    assert {heard.receiver for heard in world.heard} == set(left)
    assert differing(lost, world.hosted("cedar")) == set()
    if not world.private:
        masked = world.parts["cedar"].placement.hosted("cedar")
        if isinstance(by_hand, Union):
            by_hand.train(range(2, 3), left, share, masked)
        else:
            by_hand.train(range(2, 3), left, masked)
        world.assert_as_by_hand(left)


def test_a_party_lost_on_the_way_ends_the_attempt_by_a_code_and_nothing_has_changed(world: Parties) -> None:
    def dies(heard: Heard) -> None:
        if heard.receiver == "cedar" and heard.lane is Lane.BACKWARD:
            threading.Thread(target=world.transports["cedar"].close).start()

    world.fault = dies
    state = world.tell(Phase.COMPUTE, 1, 1)
    before = world.stored()
    ends = world.ends(lambda actor: actor.compute(state, NEVER), PARTIES)
    failed = [end for end in ends.values() if end is not None]
    assert failed  # one that had brought everything before has nothing left that could fail
    for end in failed:
        assert isinstance(end, CoterieError)
        assert end.code in ("connection-lost", "not-connected", "closed", "round-interrupted", "round-cancelled")
    assert differing(before, world.stored()) == set()


def test_ledger_and_privacy_come_together_and_without_them_a_statement_says_what_can_be_read(
    first_round: FirstRound,
) -> None:
    private = first_round.world.private
    for actor in first_round.world.actors.values():
        assert actor.exchange.open_ledger() == private
        assert (actor.exchange.privacy() is not None) == private
    statement = first_round.world.actors["alder"].exchange.statement()
    assert ("can read" in statement or "can be read" in statement) == (not private)
    assert ("PRIVACY STATEMENT" in statement) == private
