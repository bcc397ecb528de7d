"""Coordinator and parties over the in-process transport; the parties' model is a list of rounds."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.errors import CheckpointError, CoterieError, FrameError, RoundError
from coterie.federation.cancel import CancelToken
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.rounds.coordinator import Coordinator, CoordinatorStatus
from coterie.federation.rounds.directives import Call, Directive, Refusal, decode, encode
from coterie.federation.rounds.follower import Follower
from coterie.federation.rounds.heartbeat import Heartbeat
from coterie.federation.rounds.journal import Journal
from coterie.federation.rounds.state import (
    Ending,
    Move,
    PartyReport,
    Phase,
    PublishedCheckpoint,
    RoundPlan,
    Saved,
    State,
)
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.transport import Lane, Message
from helpers.waiting import until

PARTIES = ("alder", "birch", "cedar")
AGREEMENT = "a" * 64


def plan(**changes: object) -> RoundPlan:
    base = {"rounds": 4, "checkpoint_every": 2, "deadline_s": 20.0, "lease_s": 1.0, "join_s": 10.0}
    return RoundPlan(PARTIES, **{**base, **changes})  # type: ignore[arg-type]


class Killed(BaseException):
    """The end of a process that nobody expected."""


def digest_of(model: list[int]) -> str:
    return hashlib.sha256(str(model).encode()).hexdigest()


class ListActor:
    """An actor whose model is the list of rounds applied; ``on_compute`` lets a test interfere."""

    def __init__(self, disk: dict[int, list[int]], on_compute: Callable[[State], None] = lambda state: None) -> None:
        self.disk, self.on_compute = disk, on_compute
        self.model: list[int] = []
        self.staged: tuple[int, int] | None = None
        self.computed: list[tuple[int, int]] = []
        self.evaluated: list[int] = []
        self.interrupted = threading.Event()

    def held(self) -> tuple[Saved, ...]:
        return tuple(Saved(round_no, digest_of(model)) for round_no, model in self.disk.items())

    def load(self, source: Saved, state: State) -> None:
        self.model = list(self.disk[source.round]) if source.round else []

    def compute(self, state: State, cancel: CancelToken) -> None:
        self.interrupted.clear()
        self.on_compute(state)
        if self.interrupted.is_set() or cancel.cancelled:
            raise RoundError("interrupted")
        self.staged = (state.round, state.attempt)
        self.computed.append(self.staged)

    def drop(self, round_no: int, attempt: int) -> None:
        self.staged = None

    def step(self, round_no: int, attempt: int) -> None:
        assert self.staged == (round_no, attempt)
        self.model.append(round_no)
        self.staged = None

    def evaluate(self, state: State, cancel: CancelToken) -> None:
        self.evaluated.append(state.round)

    def save(self, state: State, cancel: CancelToken) -> str:
        self.disk[state.round] = list(self.model)
        return digest_of(self.model)

    def cancel(self) -> None:
        self.interrupted.set()


class Federation:
    """One coordinator and parties as threads, each of which can be killed and started again."""

    def __init__(self, folder: Path, the_plan: RoundPlan) -> None:
        self.folder, self.plan = folder, the_plan
        self.hub = InProcessHub(PARTIES, coordinator=COORDINATOR)
        self.disks: dict[str, dict[int, list[int]]] = {name: {} for name in PARTIES}
        self.actors: dict[str, ListActor] = {}
        self.ends: dict[str, State | CoterieError] = {}
        self.statuses: list[CoordinatorStatus] = []
        self.threads: dict[str, threading.Thread] = {}
        self.transports: dict[str, object] = {}
        self.members: dict[str, Heartbeat] = {}
        self.agreements = dict.fromkeys(PARTIES, AGREEMENT)

    def coordinate(self) -> None:
        transport = self.hub.transport(COORDINATOR)
        journal = Journal(self.folder, "grove", AGREEMENT)
        self.journal = journal
        self.coordinator = Coordinator(self.plan, transport, journal, AGREEMENT, self.statuses.append, 0.3)
        self.transports[COORDINATOR] = transport

        def serve() -> None:
            try:
                self.ends[COORDINATOR] = self.coordinator.run()
            except CoterieError as error:
                self.ends[COORDINATOR] = error
            except sqlite3.ProgrammingError:
                pass  # killed: see `kill_coordinator`
            finally:
                transport.close()
                journal.close()

        self._thread(COORDINATOR, serve)

    def up(self, name: str, on_compute: Callable[[State], None] = lambda state: None, **changes: object) -> None:
        actor = self.actors[name] = ListActor(self.disks[name], on_compute)
        transport = self.transports[name] = self.hub.transport(name)
        participant = Follower(name, actor)
        member = self.members[name] = Heartbeat(
            transport,
            self.agreements[name],
            heartbeat_s=0.1,
            on_change=participant.on_change,
            **{"patience_s": 5.0, **changes},  # type: ignore[arg-type]
        )

        def handle(peer: str, lane: Lane, message: Message) -> None:
            if peer == COORDINATOR:
                member.handle(message)

        def take_part() -> None:
            transport.start(handle)
            try:
                self.ends[name] = participant.run(member)
            except CoterieError as error:
                self.ends[name] = error
            except Killed:
                pass
            finally:
                member.close()
                transport.close()

        self._thread(name, take_part)

    def _thread(self, name: str, target: Callable[[], None]) -> None:
        self.ends.pop(name, None)
        self.threads[name] = threading.Thread(target=target, daemon=True)
        self.threads[name].start()

    def kill(self, name: str) -> None:
        """The wire of a process ends at once; what it still does reaches nobody."""
        self.members[name].close()
        self.transports[name].close()  # type: ignore[attr-defined]

    def kill_coordinator(self) -> None:
        """Its wire ends and it can write nothing more; the file is all that remains of it."""
        self.transports[COORDINATOR].close()  # type: ignore[attr-defined]
        self.journal.close()
        self.threads[COORDINATOR].join(60)

    def join(self, timeout: float = 20.0) -> None:
        deadline = time.monotonic() + timeout
        for name, thread in self.threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"{name} did not end"


@pytest.fixture
def grove(tmp_path: Path) -> Federation:
    return Federation(tmp_path / "coordinator", plan())


def everyone_finished(grove: Federation) -> None:
    grove.join()
    for name in PARTIES:
        end = grove.ends[name]
        assert isinstance(end, State), end
        assert end.ending is Ending.FINISHED
        assert grove.actors[name].model == [1, 2, 3, 4]
        assert sorted(grove.disks[name]) == [2, 4]


def test_federation_trains_every_round_once_and_evaluates_at_the_end(grove: Federation):
    grove.coordinate()
    for name in PARTIES:
        grove.up(name)
    everyone_finished(grove)
    for actor in grove.actors.values():
        assert actor.computed == [(1, 1), (2, 1), (3, 1), (4, 1)]
        assert actor.evaluated == [4]


def test_failure_at_one_party_aborts_the_attempt_everywhere_and_it_is_tried_again(grove: Federation):
    def fail_once(state: State) -> None:
        if (state.round, state.attempt) == (3, 1):
            raise CoterieError("disk on fire", code="on-fire")

    def slow(state: State) -> None:
        if (state.round, state.attempt) == (3, 1):
            assert grove.actors["birch"].interrupted.wait(60)

    grove.coordinate()
    grove.up("alder", fail_once)
    grove.up("birch", slow)
    grove.up("cedar")
    everyone_finished(grove)
    assert (3, 2) in grove.actors["birch"].computed
    assert (3, 1) not in grove.actors["birch"].computed
    assert any("alder failed" in status.state.note and "on-fire" in status.state.note for status in grove.statuses)


def test_killed_party_comes_back_and_all_go_on_from_the_newest_common_checkpoint(grove: Federation):
    def die(state: State) -> None:
        if state.round == 4 and "cedar" not in grove.ends:
            grove.kill("cedar")
            raise Killed

    grove.coordinate()
    grove.up("alder")
    grove.up("birch")
    grove.up("cedar", die)
    until(lambda: any(status.missing == ("cedar",) for status in grove.statuses if status.state.begun))
    grove.up("cedar")
    everyone_finished(grove)
    # Round 3 was rolled back and computed again, under a number of its own.
    assert [tag for tag in grove.actors["alder"].computed if tag[0] == 3] == [(3, 1), (3, 2)]


def test_coordinator_killed_in_a_round_takes_it_up_where_it_was(grove: Federation):
    gate, reached = threading.Event(), threading.Event()

    def wait(state: State) -> None:
        if state.round == 3:
            reached.set()
            assert gate.wait(60)

    grove.coordinate()
    for name in PARTIES:
        grove.up(name, wait)
    assert reached.wait(60)
    grove.kill_coordinator()
    gate.set()
    grove.coordinate()
    for name in PARTIES:
        grove.threads[name].join(60)
    for name in PARTIES:
        assert grove.actors[name].model == [1, 2, 3, 4]
        assert (3, 1) in grove.actors[name].computed
        assert (3, 2) not in grove.actors[name].computed


def test_a_run_that_is_taken_up_again_forgets_earlier_trouble(tmp_path: Path):
    """People have looked meanwhile: a wild sum, say, is the first one again. Where two of them paused the run, a
    start by itself, as after a crash, is no sign that anybody has."""
    journal = Journal(tmp_path, "grove", AGREEMENT)
    trouble = {"failures": 2, "interruptions": 3, "wild_sums": 2}
    ended = State(seq=9, phase=Phase.END, ending=Ending.PAUSED, code="sum-wild", note="wild twice", **trouble)
    journal.write(Move(ended))
    hub = InProcessHub(PARTIES, coordinator=COORDINATOR)
    with pytest.raises(RoundError, match="paused at round 0: wild twice") as refused:
        Coordinator(plan(), hub.transport(COORDINATOR), journal, AGREEMENT)._begin()
    assert (refused.value.code, journal.state) == ("run-paused", ended)
    Coordinator(plan(go_on=True), hub.transport(COORDINATOR), journal, AGREEMENT)._begin()
    state = journal.state
    assert (state.phase, state.seq) == (Phase.GATHER, 10)
    assert {name: getattr(state, name) for name in trouble} == dict.fromkeys(trouble, 0)
    journal.close()


def test_second_wild_sum_pauses_the_run_everywhere_and_people_take_it_up_where_it_stood(tmp_path: Path):
    """What was committed is kept, though no checkpoint was due; nobody is named, and a start alone is refused."""
    grove = Federation(tmp_path, plan(max_attempts=5))
    tries: list[tuple[int, int]] = []

    def wild(state: State) -> None:
        if state.round == 2:
            tries.append((state.round, state.attempt))
            raise RoundError("nothing honest", code="sum-wild")

    grove.coordinate()
    for name in PARTIES:
        grove.up(name, wild)
    grove.join()
    for name in (*PARTIES, COORDINATOR):
        error = grove.ends[name]
        assert isinstance(error, RoundError)
        assert (error.code, "paused at round 1" in error.message) == ("sum-wild", True)
        assert not any(party in error.message for party in PARTIES)
        assert error.fix is not None
        assert "--go-on" in error.fix
    assert {attempt for _, attempt in tries} == {1, 2}
    assert {name: sorted(disk) for name, disk in grove.disks.items()} == {name: [1] for name in PARTIES}
    assert grove.statuses[-1].state.ending is Ending.PAUSED
    grove.coordinate()
    grove.threads[COORDINATOR].join(60)
    refused = grove.ends[COORDINATOR]
    assert isinstance(refused, RoundError)
    assert refused.code == "run-paused"
    grove.plan = plan(max_attempts=5, go_on=True)
    grove.coordinate()
    for name in PARTIES:
        grove.up(name)
    grove.join()
    for name in PARTIES:
        assert grove.actors[name].model == [1, 2, 3, 4]
        assert grove.actors[name].computed[0][0] == 2


def test_party_that_never_arrives_is_named_with_the_deadline(tmp_path: Path):
    grove = Federation(tmp_path, plan(join_s=0.8, lease_s=0.2))
    grove.coordinate()
    grove.up("alder")
    grove.up("birch")
    grove.join()
    for name in ("alder", "birch", COORDINATOR):
        error = grove.ends[name]
        assert isinstance(error, RoundError)
        assert error.code == "round-party-missing"
        assert "cedar did not arrive within 0.8 s" in error.message
    assert "cedar" in grove.statuses[0].missing  # and whoever else had not arrived by then
    assert grove.statuses[-2].missing == ("cedar",)


def test_party_with_another_config_is_turned_away_with_both_hashes(tmp_path: Path):
    grove = Federation(tmp_path, plan(join_s=1.0))
    grove.agreements["birch"] = "b" * 64
    grove.coordinate()
    for name in PARTIES:
        grove.up(name)
    grove.join()
    error = grove.ends["birch"]
    assert isinstance(error, CoterieError)
    assert error.code == "config-mismatch"
    assert "bbbbbbbb" in error.message
    assert "aaaaaaaa" in error.message
    failure = grove.ends[COORDINATOR]
    assert isinstance(failure, RoundError)
    assert failure.where == "birch was turned away with `config-mismatch`"


def test_stop_ends_everyone_after_the_round_with_a_checkpoint_and_a_later_start_goes_on(grove: Federation):
    def stop(state: State) -> None:
        if state.round == 3:
            grove.members["birch"].ask_to_stop()
            time.sleep(0.3)

    grove.coordinate()
    for name in PARTIES:
        grove.up(name, stop)
    grove.join()
    for name in PARTIES:
        end = grove.ends[name]
        assert isinstance(end, State)
        assert (end.ending, end.note) == (Ending.STOPPED, "birch asked to stop")
        assert 3 in grove.disks[name]
    grove.coordinate()
    for name in PARTIES:
        grove.up(name)
    grove.join()
    for name in PARTIES:
        assert grove.actors[name].model == [1, 2, 3, 4]
        assert grove.actors[name].computed == [(4, 1)]


def test_coordinator_that_stays_away_ends_the_party_with_a_reason(grove: Federation):
    grove.up("alder", patience_s=0.5)
    grove.join()
    error = grove.ends["alder"]
    assert isinstance(error, CoterieError)
    assert error.code == "coordinator-gone"


def test_every_heartbeat_tells_how_long_the_coordinator_has_been_silent(grove: Federation):
    beats: list[float] = []
    grove.up("alder", patience_s=0.5, on_beat=beats.append)
    grove.join()
    assert len(beats) >= 3
    assert beats == sorted(beats)
    assert beats[-1] > 0.3


def test_newer_process_of_a_party_takes_over_and_the_older_one_is_told(grove: Federation):
    grove.coordinate()
    coordinator_handle = grove.coordinator._handle
    old, new = PartyReport("old", 1), PartyReport("new", 1)
    for report in (old, new):
        reply = coordinator_handle("alder", Lane.CONTROL, encode(Call(report, AGREEMENT)))
        assert decode(reply, Directive, COORDINATOR).state.phase is Phase.GATHER
    reply = coordinator_handle("alder", Lane.CONTROL, encode(Call(old, AGREEMENT)))
    assert reply.kind == "refused"
    assert reply.body["code"] == "round-superseded"
    grove.coordinator.stop()
    grove.join()


def test_stranger_and_malformed_report_are_refused(grove: Federation):
    grove.coordinate()
    reply = grove.coordinator._handle("dogwood", Lane.CONTROL, encode(Call(PartyReport("x"), AGREEMENT)))
    assert reply.body["code"] == "roster-stranger"
    with pytest.raises(CoterieError) as caught:
        grove.coordinator._handle("alder", Lane.CONTROL, Message("report", body={"report": {"instance": 3}}))
    assert caught.value.code == "control-body"
    grove.coordinator.stop()
    grove.join()


# ---- the journal ----------------------------------------------------------------------------------------------


def test_journal_remembers_moves_and_undoes_what_was_rolled_back(tmp_path: Path):
    journal = Journal(tmp_path, "grove", AGREEMENT)
    run = journal.run
    journal.write(Move(State(seq=2, phase=Phase.COMPUTE, round=1, attempt=1)))
    journal.write(Move(State(seq=3, phase=Phase.STEP, round=1, committed=1, committed_attempt=1), committed=True))
    record = PublishedCheckpoint(1, {"alder": Saved(1, "e" * 64)})
    journal.write(Move(State(seq=4, phase=Phase.COMPUTE, round=2, attempt=1, committed=1), published=record))
    journal.close()
    journal = Journal(tmp_path, "grove", AGREEMENT)
    assert journal.run == run
    assert journal.state.seq == 4
    assert journal.history.published == (record,)
    assert journal.history.attempts == {1: 1, 2: 1}
    journal.write(Move(State(seq=5, phase=Phase.RESTORE, sources={"alder": Saved(0, "")}), back_to=0))
    assert journal.history.published == ()
    assert journal.history.next_attempt(1) == 2
    journal.close()
    assert Journal(tmp_path, "grove", AGREEMENT).state.sources == {"alder": Saved(0, "")}


def test_journal_of_another_agreement_is_refused(tmp_path: Path):
    Journal(tmp_path, "grove", AGREEMENT).close()
    with pytest.raises(CheckpointError) as caught:
        Journal(tmp_path, "grove", "b" * 64)
    assert caught.value.code == "checkpoint-other-run"


def test_move_that_cannot_be_written_changes_nothing(tmp_path: Path):
    journal = Journal(tmp_path, "grove", AGREEMENT)
    step = State(seq=2, phase=Phase.STEP, round=1, committed=1, committed_attempt=1)
    journal.write(Move(step, committed=True))
    with pytest.raises(Exception, match="UNIQUE"):
        journal.write(Move(State(seq=3, phase=Phase.STEP, committed=1, committed_attempt=1), committed=True))
    assert journal.state == step
    journal.close()
    assert Journal(tmp_path, "grove", AGREEMENT).state == step


TEXT = "Dear Anna, the results of your test\x1b[2J"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("code", {"code": TEXT}),
        ("code", {"code": "a" * 65}),
        ("instance", {"instance": TEXT}),
        ("saved", {"saved": TEXT}),
        ("saved", {"saved": "e" * 63}),
        ("digest", {"held": [{"round": 2, "digest": TEXT}]}),
        ("round", {"held": [{"round": -2, "digest": ""}]}),
        ("held", {"held": [{"round": n, "digest": ""} for n in range(65)]}),
        ("live", {"live": 10**30}),
        ("count", {"count": -1}),
        ("failed", {"failed": TEXT}),
    ],
)
def test_no_field_of_a_report_has_room_for_text(grove: Federation, field: str, changes: dict[str, object]):
    """What a party says goes to everybody's terminal and into the journal."""
    grove.coordinate()
    report = {"instance": "abc", **changes}
    with pytest.raises(FrameError) as caught:
        grove.coordinator._handle(
            "alder", Lane.CONTROL, Message("report", body={"report": report, "agreement": AGREEMENT})
        )
    assert caught.value.code == "control-body"
    assert caught.value.field in (field, "report", "held")
    assert "Anna" not in str(caught.value)
    assert "alder" not in grove.coordinator._views
    grove.coordinator.stop()
    grove.join()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Refusal, {"code": TEXT}),
        (Refusal, {"code": "config-mismatch", "here": TEXT}),
        (Directive, {"run": TEXT, "state": {}}),
        (Directive, {"run": "abc", "state": {"note": TEXT}}),
        (Directive, {"run": "abc", "state": {"note": "a" * 20000}}),
        (Directive, {"run": "abc", "state": {"absent": [TEXT]}}),
        (Directive, {"run": "abc", "state": {}, "missing": [TEXT]}),
    ],
)
def test_coordinator_cannot_write_what_it_likes_on_a_terminal(kind: type, body: dict[str, object]):
    name = {Refusal: "refused", Directive: "directive"}[kind]
    with pytest.raises(FrameError) as caught:
        decode(Message(name, body=body), kind, "alder")
    assert caught.value.code == "control-body"
    assert "Anna" not in str(caught.value)


def test_everything_that_is_really_said_passes_the_checks():
    held = (Saved(0, ""), Saved(40, "0123456789abcdef" * 4))
    call = Call(PartyReport("0011aabb", 3, 4, 5, "exchange-deadline", 7, held, "f" * 64, True), AGREEMENT, "00ff")
    assert decode(encode(call), Call, "alder") == call
    note = "alder, birch-2 and cedar_3 failed in compute of round 7 (deadline, data-unreadable), 3 times in a row"
    state = State(9, Phase.RESTORE, 7, absent=("birch-2",), sources={"cedar_3": held[1]}, code="deadline", note=note)
    directive = Directive("00ff", state, 40, ("alder",))
    assert decode(encode(directive), Directive, COORDINATOR) == directive
