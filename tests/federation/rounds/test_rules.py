"""The round transaction, tried without network, clock or disk."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coterie.federation.rounds.coordinator_rules import advance, wanting
from coterie.federation.rounds.party_rules import Act, PartyMemory, acts, after_act
from coterie.federation.rounds.state import (
    Clock,
    Ending,
    History,
    Move,
    PartyReport,
    Phase,
    PublishedCheckpoint,
    RoundPlan,
    Saved,
    State,
    View,
)

PARTIES = ("alder", "birch", "cedar")
PLAN = RoundPlan(
    PARTIES,
    rounds=6,
    evaluate_every=2,
    checkpoint_every=2,
    deadline_s=100,
    lease_s=10,
    join_s=300,
    max_attempts=3,
)


def views(now: float = 0.0, **reports: PartyReport) -> dict[str, View]:
    return {name: View(report, now) for name, report in reports.items()}


def everyone(now: float = 0.0, **fields: object) -> dict[str, View]:
    return views(now, **{name: PartyReport(f"{name}-1", **fields) for name in PARTIES})  # type: ignore[arg-type]


AT_START = Clock(now=1.0, entered=0.0)


# ---- one decision at a time -----------------------------------------------------------------------------------


QUESTIONS = replace(PLAN, questions=True)
FINISHED = State(seq=9, round=6, committed=6, evaluated=6, furthest=(6, 3), begun=True)
KEPT = History((PublishedCheckpoint(4, {n: Saved(4, "4" * 64) for n in PARTIES}),
                PublishedCheckpoint(6, {n: Saved(6, "6" * 64) for n in PARTIES})))  # fmt: skip


def test_a_finished_run_is_loaded_and_evaluated_once_more_for_questions_and_trains_nothing():
    held = (Saved(4, "4" * 64), Saved(6, "6" * 64))
    move = advance(QUESTIONS, FINISHED, KEPT, everyone(done=9, held=held), AT_START)
    assert move is not None
    assert (move.state.phase, move.state.round, move.back_to) == (Phase.RESTORE, 6, 6)
    move = advance(QUESTIONS, move.state, KEPT, everyone(done=10, live=6, held=held), AT_START)
    assert move is not None
    assert (move.state.phase, move.state.round, move.state.for_questions) == (Phase.EVALUATE, 6, True)
    move = advance(QUESTIONS, move.state, KEPT, everyone(done=11, live=6, held=held), AT_START)
    assert move is not None
    assert (move.state.phase, move.state.ending, move.state.committed) == (Phase.END, Ending.FINISHED, 6)


def test_questions_are_never_for_an_earlier_round_and_no_party_is_left_out():
    """Going back would train the rounds again, and forget the checkpoint that somebody mislaid."""
    held = (Saved(4, "4" * 64),)
    move = advance(QUESTIONS, FINISHED, KEPT, everyone(done=9, held=held), AT_START)
    assert move is not None
    assert (move.state.ending, move.state.code, move.back_to) == (Ending.FAILED, "checkpoint-none-common", None)
    going_on = replace(QUESTIONS, lost_party="continue")
    two = {name: view for name, view in everyone(now=200.0, done=9, live=6).items() if name != "cedar"}
    assert advance(going_on, FINISHED, KEPT, two, Clock(now=200.0, entered=0.0)) is None
    assert advance(replace(going_on, questions=False), FINISHED, KEPT, two, Clock(now=200.0, entered=0.0)) is not None


def test_a_lost_party_has_the_questions_asked_again():
    asking = replace(FINISHED, seq=11, phase=Phase.EVALUATE)
    reports = everyone(now=50.0, done=10, live=6)
    reports["cedar"] = View(PartyReport("cedar-1", done=10, live=6), 1.0)
    move = advance(QUESTIONS, asking, KEPT, reports, Clock(now=50.0, entered=0.0))
    assert move is not None
    assert move.state.phase is Phase.GATHER
    back = everyone(now=60.0, done=12, live=6)
    move = advance(QUESTIONS, move.state, KEPT, back, Clock(now=60.0, entered=55.0))
    assert move is not None
    assert move.state.for_questions


def test_nothing_happens_before_everyone_is_there():
    state = State()
    assert advance(PLAN, state, History(), {}, AT_START) is None
    two = views(alder=PartyReport("a", done=1, live=0), birch=PartyReport("b", done=1, live=0))
    assert advance(PLAN, state, History(), two, AT_START) is None
    assert wanting(PLAN, state, two, AT_START).missing == ("cedar",)


def computing(now: float, **views_: View) -> Move | None:
    """What is decided in compute of round 1 with these views, the others heard just now."""
    state = State(seq=5, phase=Phase.COMPUTE, round=1, attempt=1)
    here = {name: View(PartyReport(name, live=0), now) for name in PARTIES}
    return advance(PLAN, state, History(), {**here, **views_}, Clock(now, 0.0))


def test_silent_party_without_a_connection_is_lost_long_before_one_that_is_only_busy():
    """gRPC answers pings without Python: who is busy keeps its connection, who is frozen or cut off does not."""
    quiet, now = PLAN.quiet_s, 100.0
    assert quiet < PLAN.lease_s
    heard = {"just in time": now - quiet + 0.1, "late": now - quiet - 0.1, "very late": now - PLAN.lease_s - 0.1}
    report = PartyReport("cedar", live=0)
    for connected, lost in ((False, ("late", "very late")), (True, ("very late",))):
        for name, at in heard.items():
            move = computing(now, cedar=View(report, at, connected))
            assert (move is not None) == (name in lost), (connected, name)
            if move is not None:
                assert (move.state.phase, move.state.note) == (Phase.GATHER, "lost cedar in compute of round 1")


def test_line_between_two_parties_that_are_here_is_named_and_waited_for():
    now = 100.0
    cut = View(PartyReport("birch", live=0, unreachable=("cedar",)), now)
    move = computing(now, birch=cut)
    assert move is not None
    assert move.state.note == "no connection between birch and cedar in compute of round 1"
    gathered = {name: View(PartyReport(name, done=6, live=0), now) for name in PARTIES}
    gathered["birch"] = View(PartyReport("birch", done=6, live=0, unreachable=("cedar",)), now)
    at = Clock(now, now - 1.0)
    assert advance(PLAN, move.state, History(), gathered, at) is None
    assert wanting(PLAN, move.state, gathered, at).cut == (("birch", "cedar"),)
    ended = advance(PLAN, move.state, History(), gathered, Clock(now, now - PLAN.join_s - 1.0))
    assert ended is not None
    assert (ended.state.code, ended.state.ending) == ("round-link-cut", Ending.FAILED)
    gathered["birch"] = View(PartyReport("birch", done=6, live=0), now)
    assert advance(PLAN, move.state, History(), gathered, at) is not None


def test_party_that_is_gone_is_not_taken_for_a_line_that_is_cut():
    """Both others say that they cannot reach it; nobody has heard of it either."""
    now = 100.0
    reports = {name: View(PartyReport(name, live=0, unreachable=("cedar",)), now) for name in ("alder", "birch")}
    gone = View(PartyReport("cedar", live=0), now - PLAN.quiet_s + 0.5, connected=False)
    assert computing(now, cedar=gone, **reports) is None
    gone = View(PartyReport("cedar", live=0), now - PLAN.quiet_s - 0.5, connected=False)
    move = computing(now, cedar=gone, **reports)
    assert move is not None
    assert move.state.note == "lost cedar in compute of round 1"


def test_party_that_never_arrives_ends_the_run_and_is_named_with_the_deadline():
    two = views(300.5, alder=PartyReport("a", done=1, live=0), birch=PartyReport("b", done=1, live=0))
    move = advance(PLAN, State(), History(), two, Clock(now=301.0, entered=0.0))
    assert move is not None
    assert (move.state.phase, move.state.ending) == (Phase.END, Ending.FAILED)
    assert move.state.code == "round-party-missing"
    assert move.state.note == "cedar did not arrive within 300 s"


def test_new_processes_load_the_split_model_first():
    move = advance(PLAN, State(), History(), everyone(done=1), AT_START)
    assert move is not None
    assert (move.state.phase, move.state.round) == (Phase.RESTORE, 0)
    assert move.state.sources == dict.fromkeys(PARTIES, Saved(0, ""))


def test_commit_needs_every_party():
    state = State(seq=5, phase=Phase.COMPUTE, round=3, attempt=2, committed=2)
    two = everyone(done=5, live=2)
    two["cedar"] = View(PartyReport("cedar-1", done=4, live=2), 0.0)
    assert advance(PLAN, state, History(), two, AT_START) is None
    move = advance(PLAN, state, History(), everyone(done=5, live=2), AT_START)
    assert move is not None
    assert move.committed
    assert (move.state.phase, move.state.committed, move.state.committed_attempt) == (Phase.STEP, 3, 2)


@pytest.mark.parametrize("phase", [Phase.COMPUTE, Phase.EVALUATE, Phase.CHECKPOINT, Phase.RESTORE, Phase.STEP])
def test_failure_in_any_phase_gathers_everyone_and_counts(phase: Phase):
    state = State(seq=9, phase=phase, round=2, attempt=1, committed=2 if phase is not Phase.COMPUTE else 1)
    live = 1 if phase is Phase.COMPUTE else 2
    reports = everyone(done=8, live=live)
    reports["birch"] = View(PartyReport("birch-1", done=8, failed=9, code="deadline", live=live), 0.0)
    move = advance(PLAN, state, History(), reports, AT_START)
    assert move is not None
    assert (move.state.phase, move.state.failures, move.committed) == (Phase.GATHER, 1, False)
    assert "birch failed" in move.state.note
    assert "deadline" in move.state.note


def test_party_that_fails_to_step_while_all_gather_is_asked_again_at_once():
    # Killed between commit and step: birch learns of the commit here, and its step fails.
    state = State(seq=12, phase=Phase.GATHER, round=3, committed=3, committed_attempt=1, begun=True, evaluated=2)
    reports = everyone(done=12, live=3)
    reports["birch"] = View(PartyReport("birch-1", done=11, failed=12, code="disk", live=None), 0.0)
    move = advance(PLAN, state, History(), reports, AT_START)
    assert move is not None
    assert (move.state.phase, move.state.seq, move.state.failures) == (Phase.GATHER, 13, 1)
    assert "birch failed in gather of round 3 (disk)" in move.state.note
    reports = everyone(done=13, live=3)
    reports["birch"] = View(PartyReport("birch-1", done=13, failed=12, code="disk", live=None), 0.0)
    move = advance(PLAN, move.state, History(), reports, AT_START)
    assert move is not None
    assert move.state.phase is Phase.RESTORE


def test_too_many_failures_in_a_row_end_the_run_with_the_last_reason():
    state = State(seq=9, phase=Phase.COMPUTE, round=2, attempt=3, committed=1, failures=2)
    reports = everyone(done=8, live=1)
    reports["birch"] = View(PartyReport("birch-1", done=8, failed=9, code="data", live=1), 0.0)
    move = advance(PLAN, state, History(), reports, AT_START)
    assert move is not None
    assert (move.state.ending, move.state.code) == (Ending.FAILED, "data")
    assert "3 times in a row" in move.state.note


@pytest.mark.parametrize("phase", [Phase.COMPUTE, Phase.EVALUATE, Phase.CHECKPOINT, Phase.RESTORE, Phase.STEP])
def test_missed_lease_in_any_phase_gathers_and_names_who_is_lost(phase: Phase):
    state = State(seq=9, phase=phase, round=2, committed=1 if phase is Phase.COMPUTE else 2)
    reports = everyone(now=50.0, done=8, live=1 if phase is Phase.COMPUTE else 2)
    reports["cedar"] = replace(reports["cedar"], heard_at=30.0)
    move = advance(PLAN, state, History(), reports, Clock(now=50.0, entered=20.0))
    assert move is not None
    assert move.state.phase is Phase.GATHER
    assert "lost cedar" in move.state.note
    assert move.state.committed == state.committed


def test_lost_party_does_not_undo_a_commit():
    state = State(seq=9, phase=Phase.STEP, round=2, attempt=1, committed=2, committed_attempt=1)
    reports = everyone(now=50.0, done=9, live=2)
    reports["cedar"] = View(PartyReport("cedar-1", done=8, live=1), 30.0)
    move = advance(PLAN, state, History(), reports, Clock(now=50.0, entered=20.0))
    assert move is not None
    assert (move.state.phase, move.state.committed, move.back_to) == (Phase.GATHER, 2, None)
    # It comes back with its memory: told of the commit it steps, and nobody goes back.
    state = move.state
    assert acts("cedar", PartyMemory(1, (2, 1)), state) == (Act.STEP,)
    move = advance(PLAN, state, History(), everyone(now=60.0, done=state.seq, live=2), Clock(60.0, 50.0))
    assert move is not None
    assert (move.state.phase, move.state.round) == (Phase.EVALUATE, 2)


def test_party_that_lost_its_memory_takes_everyone_back_to_the_newest_common_checkpoint():
    records = tuple(PublishedCheckpoint(r, {name: Saved(r, f"{name}{r}") for name in PARTIES}) for r in (2, 4))
    history = History(records, {5: 3})
    state = State(seq=12, phase=Phase.GATHER, round=5, committed=5, committed_attempt=1, begun=True, evaluated=4)
    reports = {}
    for name in PARTIES:
        held = (Saved(2, f"{name}2"), Saved(4, f"{name}4" if name != "birch" else "torn"))
        reports[name] = View(PartyReport(name, done=12, live=None if name == "cedar" else 5, held=held), 0.0)
    move = advance(PLAN, state, history, reports, AT_START)
    assert move is not None
    assert (move.state.phase, move.state.round, move.back_to) == (Phase.RESTORE, 2, 2)
    assert move.state.sources["cedar"] == Saved(2, "cedar2")
    assert (move.state.committed, move.state.evaluated) == (2, 2)


def test_no_common_checkpoint_is_an_error_and_never_a_silent_restart():
    history = History((PublishedCheckpoint(4, {name: Saved(4, name) for name in PARTIES}),))
    state = State(seq=12, phase=Phase.GATHER, round=5, committed=5, begun=True)
    reports = everyone(done=12, held=(Saved(4, "alder"),))
    move = advance(PLAN, state, history, reports, AT_START)
    assert move is not None
    assert move.state.code == "checkpoint-none-common"
    assert "birch and cedar lack round 4" in move.state.note


def test_attempt_numbers_are_never_used_twice_even_after_going_back():
    history = History((), {1: 2})
    state = State(seq=4, phase=Phase.RESTORE, round=0, committed=0, begun=True, evaluated=0)
    move = advance(PLAN, state, history, everyone(done=4, live=0), AT_START)
    assert move is not None
    assert (move.state.phase, move.state.round, move.state.attempt) == (Phase.COMPUTE, 1, 3)


def test_stop_finishes_the_round_writes_a_checkpoint_and_ends():
    state = State(seq=7, phase=Phase.STEP, round=3, attempt=1, committed=3, evaluated=2)
    move = advance(PLAN, state, History(), everyone(done=7, live=3), AT_START, stop="birch")
    assert move is not None
    assert (move.state.phase, move.state.round) == (Phase.CHECKPOINT, 3)
    move = advance(PLAN, move.state, History(), everyone(done=8, live=3, saved="x"), AT_START, stop="birch")
    assert move is not None
    assert move.published is not None
    assert (move.state.ending, move.state.note) == (Ending.STOPPED, "birch asked to stop")


def wild(state: State, live: int) -> State:
    """What follows once birch found what all pushed under masks to be nothing honest."""
    reports = everyone(done=state.seq - 1, live=live)
    failed = PartyReport("birch-1", done=state.seq - 1, failed=state.seq, code="sum-wild", live=live)
    move = advance(PLAN, state, History(), reports | {"birch": View(failed, 0.0)}, AT_START)
    assert move is not None
    return move.state


@pytest.mark.parametrize(("committed", "lost"), [(3, False), (3, True), (0, False)])
def test_second_wild_sum_pauses_the_run_after_what_is_committed_was_kept(committed: int, lost: bool):
    state = State(seq=7, phase=Phase.COMPUTE, round=committed + 1, attempt=1, committed=committed, evaluated=0)
    state = replace(state, begun=True, furthest=(committed, 1))
    once = wild(state, committed)
    assert (once.phase, once.failures, once.wild_sums) == (Phase.GATHER, 1, 1)
    again = wild(replace(once, phase=Phase.COMPUTE, round=committed + 1, attempt=2), committed)
    assert (again.phase, again.wild_sums) == (Phase.GATHER, 2)
    history = History()
    if lost:  # a party that goes now, and comes back, undoes nothing of it
        move = advance(PLAN, again, history, everyone(done=again.seq, live=None), AT_START)
        assert move is not None
        assert move.state.phase is Phase.RESTORE
        again, committed = move.state, move.state.committed
    move = advance(PLAN, again, history, everyone(done=again.seq, live=committed), AT_START)
    assert move is not None
    if committed:  # no evaluation, though one is due
        assert (move.state.phase, move.state.round) == (Phase.CHECKPOINT, committed)
        move = advance(PLAN, move.state, history, everyone(done=move.state.seq, live=committed, saved="x"), AT_START)
        assert move is not None
        assert move.published is not None
    ended = move.state
    assert (ended.phase, ended.ending, ended.code, ended.round) == (Phase.END, Ending.PAUSED, "sum-wild", committed)
    assert "2nd time since round" in ended.note
    assert not any(name in ended.note for name in PARTIES)


def test_stop_while_somebody_is_missing_does_not_wait_for_it():
    state = State(seq=7, phase=Phase.GATHER, round=3, committed=3, begun=True)
    move = advance(PLAN, state, History(), views(alder=PartyReport("a", done=7, live=3)), AT_START, stop="alder")
    assert move is not None
    assert (move.state.ending, move.published) == (Ending.STOPPED, None)


def test_slow_phase_is_given_up_after_its_deadline_and_the_late_are_named():
    state = State(seq=7, phase=Phase.COMPUTE, round=3, attempt=1, committed=2)
    reports = everyone(now=200.0, done=7, live=2)
    reports["alder"] = View(PartyReport("alder-1", done=6, live=2), 200.0)
    move = advance(PLAN, state, History(), reports, Clock(now=200.0, entered=99.0))
    assert move is not None
    assert move.state.phase is Phase.GATHER
    assert move.state.note.startswith("alder not done with compute of round 3")


def test_restarted_coordinator_grants_a_lease_before_it_misses_anyone():
    state = State(seq=7, phase=Phase.COMPUTE, round=3, attempt=1, committed=2)
    assert advance(PLAN, state, History(), {}, Clock(now=9.0, entered=0.0)) is None
    move = advance(PLAN, state, History(), {}, Clock(now=11.0, entered=0.0))
    assert move is not None
    assert move.state.phase is Phase.GATHER


def test_step_that_fails_every_time_ends_the_run_though_the_round_commits_each_time():
    """Only what got further than ever before makes earlier failures forgotten."""
    two = PublishedCheckpoint(2, {name: Saved(2, name) for name in PARTIES})
    held = (Saved(2, "alder"), Saved(2, "birch"), Saved(2, "cedar"))
    state, history = State(seq=1, phase=Phase.RESTORE, round=2, committed=2, begun=True, evaluated=2), History((two,))
    committed = 0
    for _ in range(100):
        seq, live = state.seq, state.committed
        reports = everyone(done=seq, live=live, held=held)
        if state.phase is Phase.GATHER:
            reports["birch"] = View(PartyReport("birch-1", done=seq, live=None, held=held), 0.0)
        elif state.phase is Phase.STEP and state.round == 4:  # a round after one that went well
            reports["birch"] = View(PartyReport("birch-1", done=seq - 1, failed=seq, code="disk", held=held), 0.0)
        move = advance(PLAN, state, history, reports, AT_START)
        assert move is not None
        committed += move.committed
        state = move.state
        if state.phase is Phase.COMPUTE:
            history = replace(history, attempts={**history.attempts, state.round: state.attempt})
        if state.phase is Phase.END:
            break
    assert (state.ending, state.code) == (Ending.FAILED, "disk")
    assert state.note == "birch failed in step of round 4 (disk), 3 times in a row"
    assert committed == 6


def test_party_that_is_killed_in_every_round_ends_the_run_and_is_named():
    two = PublishedCheckpoint(2, {name: Saved(2, name) for name in PARTIES})
    state = State(seq=1, phase=Phase.RESTORE, round=2, committed=2, begun=True, evaluated=2, furthest=(2, 3))
    history, lives = History((two,)), 1
    for _ in range(100):
        held = tuple(Saved(2, name) for name in PARTIES)
        reports = everyone(done=state.seq, live=state.committed, held=held)
        if state.phase is Phase.COMPUTE and state.round == 4:
            lives += 1
            reports["birch"] = View(PartyReport(f"birch-{lives}", held=held), 0.0)
        elif state.phase is Phase.GATHER:
            reports["birch"] = View(PartyReport(f"birch-{lives}", done=state.seq, held=held), 0.0)
        move = advance(PLAN, state, history, reports, AT_START)
        assert move is not None
        state = move.state
        if state.phase is Phase.COMPUTE:
            history = replace(history, attempts={**history.attempts, state.round: state.attempt})
        if state.phase is Phase.END:
            break
    assert (state.ending, state.code) == (Ending.FAILED, "round-no-progress")
    assert "birch came back as a new process in compute of round 4, for the 4th time since round 3" in state.note


def test_trouble_is_forgotten_once_the_run_gets_further():
    state = State(seq=7, phase=Phase.STEP, round=3, attempt=1, committed=3, failures=2, interruptions=3)
    for furthest, left in (((2, 3), (0, 0)), ((3, 1), (2, 3)), ((5, 1), (2, 3))):
        move = advance(PLAN, replace(state, furthest=furthest), History(), everyone(done=7, live=3), AT_START)
        assert move is not None
        assert (move.state.failures, move.state.interruptions) == left
        assert move.state.furthest == max(furthest, (3, 1))


CONTINUE = replace(PLAN, lost_party="continue")


def test_party_whose_checkpoint_is_the_split_model_can_go_back_with_the_others():
    """Cedar was absent when round 4 was published and has no checkpoint: its part of the record is round 0."""
    files = {"alder": Saved(4, "a"), "birch": Saved(4, "b"), "cedar": Saved(0, "")}
    state = State(seq=12, phase=Phase.GATHER, round=5, committed=5, begun=True, evaluated=4)
    reports = {
        "alder": View(PartyReport("alder-2", done=12, held=(Saved(4, "a"),)), 0.0),
        "birch": View(PartyReport("birch-1", done=12, live=5, held=(Saved(4, "b"),)), 0.0),
        "cedar": View(PartyReport("cedar-2", done=12, held=()), 0.0),
    }
    move = advance(CONTINUE, state, History((PublishedCheckpoint(4, files),)), reports, AT_START)
    assert move is not None
    assert (move.state.phase, move.state.round, move.state.sources) == (Phase.RESTORE, 4, files)


def test_continue_goes_on_without_a_lost_party_under_a_new_epoch_and_keeps_its_checkpoint():
    state = State(seq=7, phase=Phase.GATHER, round=2, committed=2, begun=True, evaluated=2)
    two = everyone(now=20.0, done=7, live=2)
    two["cedar"] = replace(two["cedar"], heard_at=1.0)
    move = advance(CONTINUE, state, History(), two, Clock(now=20.0, entered=5.0))
    assert move is not None
    assert (move.state.absent, move.state.epoch) == (("cedar",), 1)
    assert acts("cedar", PartyMemory(2, (3, 1)), move.state) == (Act.DROP,)
    before = PublishedCheckpoint(2, {name: Saved(2, name) for name in PARTIES})
    saving = State(seq=30, phase=Phase.CHECKPOINT, round=4, committed=4, absent=("cedar",), evaluated=4)
    two = everyone(now=20.0, done=30, live=4, saved="four")
    two["cedar"] = replace(two["cedar"], heard_at=1.0)
    move = advance(CONTINUE, saving, History((before,)), two, Clock(now=20.0, entered=19.0))
    assert move is not None
    assert move.published == PublishedCheckpoint(
        4, {"alder": Saved(4, "four"), "birch": Saved(4, "four"), "cedar": Saved(2, "cedar")}
    )


def test_party_that_comes_back_under_continue_loads_its_own_checkpoint_and_nobody_else_goes_back():
    before = PublishedCheckpoint(2, {name: Saved(2, name) for name in PARTIES})
    state = State(seq=40, phase=Phase.STEP, round=5, attempt=1, committed=5, absent=("cedar",), evaluated=4, epoch=1)
    reports = everyone(done=40, live=5)
    reports["cedar"] = View(PartyReport("cedar-2", done=0, held=(Saved(2, "cedar"),)), 0.0)
    move = advance(CONTINUE, state, History((before,)), reports, AT_START)
    assert move is not None
    state = move.state
    assert (state.phase, state.absent, state.rejoining, state.epoch) == (Phase.GATHER, (), ("cedar",), 2)
    reports = everyone(done=41, live=5)
    reports["cedar"] = View(PartyReport("cedar-2", done=41, held=(Saved(2, "cedar"),)), 0.0)
    move = advance(CONTINUE, state, History((before,)), reports, AT_START)
    assert move is not None
    assert (move.state.phase, move.state.round, move.back_to) == (Phase.RESTORE, 5, None)
    assert move.state.sources == {"cedar": Saved(2, "cedar")}
    assert acts("alder", PartyMemory(5), move.state) == ()
    assert acts("cedar", PartyMemory(None), move.state) == (Act.LOAD,)


# ---- everything at once ---------------------------------------------------------------------------------------


class SimulatedParty:
    """One party that follows `party_rules.acts`; its model is the list of rounds applied to it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.disk: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.lives = 0
        self.broken = False  # its steps fail from now on
        self.restart()

    def restart(self) -> None:
        self.lives += 1
        self.memory, self.model = PartyMemory(), ()
        self.state: State | None = None
        self.todo: list[Act] = []
        self.report = PartyReport(f"{self.name}-{self.lives}", held=self._held())

    def _held(self) -> tuple[Saved, ...]:
        return tuple(Saved(round_no, digest) for round_no, (digest, _) in sorted(self.disk.items()))

    def hear(self, state: State) -> None:
        if self.state is None or state.seq > self.state.seq:
            self.state = state
            self.todo = list(acts(self.name, self.memory, state))
            if not self.todo:
                self._answer()

    def act(self, committed: set[tuple[int, int]], fails: bool) -> None:
        act, state = self.todo.pop(0), self.state
        assert state is not None
        fails = fails or (self.broken and act is Act.STEP)
        if act is Act.REFUSE or fails:
            self.todo = []
            if fails and act is Act.STEP:  # a torn model is no model
                self.memory = PartyMemory()
            self.report = replace(self.report, failed=state.seq, code="boom", live=self.memory.live)
            self.report = replace(self.report, count=self.report.count + 1)
            return
        saved = ""
        if act is Act.STEP:
            assert self.memory.prepared in committed, "stepped what was not committed"
            self.model = (*self.model, self.memory.prepared[0])
        elif act is Act.LOAD:
            source = state.sources[self.name]
            if source.round:
                digest, self.model = self.disk[source.round]
                assert digest == source.digest
            else:
                self.model = ()
        elif act is Act.SAVE:
            saved = f"{self.name}:{state.round}:{self.model}"
            self.disk[state.round] = (saved, self.model)
        elif act in (Act.COMPUTE, Act.EVALUATE):
            assert self.memory.live == (state.round - 1 if act is Act.COMPUTE else state.round)
        self.memory = after_act(act, self.memory, state)
        if not self.todo:
            self._answer(saved)

    def _answer(self, saved: str = "") -> None:
        assert self.state is not None
        self.report = replace(
            self.report,
            count=self.report.count + 1,
            done=self.state.seq,
            live=self.memory.live,
            held=self._held(),
            saved=saved,
        )


class Transaction(RuleBasedStateMachine):
    """Messages late, doubled and lost; parties and coordinator killed anywhere; disks that lose a checkpoint."""

    agreed = PLAN

    @initialize(max_attempts=st.integers(2, 50))
    def begin(self, max_attempts: int) -> None:
        self.plan = replace(self.agreed, max_attempts=max_attempts)
        self.parties = {name: SimulatedParty(name) for name in PARTIES}
        self.state, self.history = State(), History()
        self.commits: set[tuple[int, int]] = set()
        self.handed_out: set[tuple[int, int]] = set()
        self.now = self.entered = 0.0
        self.views: dict[str, View] = {}
        self.delayed: list[tuple[str, PartyReport]] = []

    def _take(self, name: str, report: PartyReport) -> None:
        old = self.views.get(name)
        if old is not None and old.report.instance == report.instance and old.report.count > report.count:
            return
        self.views[name] = View(report, self.now)

    def _decide(self) -> None:
        while True:
            clock = Clock(self.now, self.entered)
            move = advance(self.plan, self.state, self.history, self.views, clock)
            if move is None:
                return
            assert move.state.seq == self.state.seq + 1
            self._check(move.state, move.committed)
            if move.back_to is not None:
                kept = tuple(record for record in self.history.published if record.round <= move.back_to)
                self.history = replace(self.history, published=kept)
            if move.published is not None:
                for name, saved in move.published.files.items():
                    if name not in self.state.absent:
                        assert self.parties[name].disk[saved.round][0] == saved.digest, "published what nobody holds"
                self.history = replace(self.history, published=(*self.history.published, move.published))
            if move.state.phase is Phase.COMPUTE:
                used = {**self.history.attempts, move.state.round: move.state.attempt}
                self.history = replace(self.history, attempts=used)
            self.state, self.entered = move.state, self.now

    def _check(self, state: State, committed: bool) -> None:
        if state.phase is Phase.COMPUTE:
            tag = (state.round, state.attempt)
            assert tag not in self.handed_out, "an attempt number was used twice"
            self.handed_out.add(tag)
        if committed:
            tag = (state.round, state.attempt)
            self.commits.add(tag)
            for name in set(PARTIES) - set(state.absent):
                party = self.parties[name]
                lives_on = self.views[name].report.instance == party.report.instance
                assert not lives_on or party.memory.prepared == tag, "committed what somebody had not prepared"

    def _talk(self, name: str) -> None:
        party = self.parties[name]
        self._take(name, party.report)
        self._decide()
        party.hear(self.state)

    @rule(name=st.sampled_from(PARTIES))
    def heartbeat(self, name: str) -> None:
        self._talk(name)

    @rule(name=st.sampled_from(PARTIES))
    def report_is_delayed(self, name: str) -> None:
        self.delayed.append((name, self.parties[name].report))

    @precondition(lambda self: self.delayed)
    @rule(data=st.data())
    def delayed_report_arrives(self, data: st.DataObject) -> None:
        name, report = self.delayed.pop(data.draw(st.integers(0, len(self.delayed) - 1)))
        if report.instance == self.parties[name].report.instance:  # a dead process' connection is gone
            self._take(name, report)
            self._decide()

    @rule(name=st.sampled_from(PARTIES), fails=st.integers(0, 9))
    def work(self, name: str, fails: int) -> None:
        party = self.parties[name]
        if party.todo:
            party.act(self.commits, fails == 9)

    @rule()
    def everyone_works(self) -> None:
        for name, party in self.parties.items():
            while party.todo:
                party.act(self.commits, False)
            self._talk(name)

    @rule(name=st.sampled_from(PARTIES))
    def party_is_killed(self, name: str) -> None:
        self.parties[name].restart()

    @rule()
    def coordinator_is_killed(self) -> None:
        self.views, self.entered = {}, self.now

    @rule(seconds=st.sampled_from([1.0, 11.0, 101.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._decide()

    @rule(name=st.sampled_from(PARTIES))
    def disk_loses_the_newest_checkpoint(self, name: str) -> None:
        party = self.parties[name]
        if len(party.disk) > 1 and len(self.history.published) > 1:
            del party.disk[max(party.disk)]
            party.restart()

    @rule(name=st.sampled_from(PARTIES))
    def steps_fail_from_now_on(self, name: str) -> None:
        self.parties[name].broken = True

    @invariant()
    def models_only_hold_whole_rounds_in_order(self) -> None:
        for party in getattr(self, "parties", {}).values():
            assert party.model == tuple(range(1, len(party.model) + 1))
            assert party.memory.live is None or party.memory.live == len(party.model)

    def teardown(self) -> None:
        if not hasattr(self, "parties"):
            return
        for _ in range(1000):
            self.now += 1.0
            self.everyone_works()
            if self.state.phase is Phase.END:
                break
        assert self.state.phase is Phase.END
        if self.state.ending is Ending.FINISHED:
            self.check_finished()
        else:
            assert self.state.code in {
                "boom",
                "round-deadline",
                "round-party-missing",
                "round-no-progress",
                "checkpoint-none-common",
            }

    def check_finished(self) -> None:
        for party in self.parties.values():
            assert party.model == tuple(range(1, PLAN.rounds + 1))


class TransactionThatGoesOn(Transaction):
    """The same with ``lost_party: continue``: who was away lacks rounds, and has every one from its return on."""

    agreed = CONTINUE

    @invariant()
    def models_only_hold_whole_rounds_in_order(self) -> None:
        for party in getattr(self, "parties", {}).values():
            assert party.model == tuple(sorted(set(party.model)))
            assert not party.model or party.memory.live is None or party.model[-1] <= party.memory.live

    def check_finished(self) -> None:
        for name in set(PARTIES) - set(self.state.absent):
            party = self.parties[name]
            assert party.memory.live == PLAN.rounds
            if self.state.epoch == 0:  # nobody was ever away
                assert party.model == tuple(range(1, PLAN.rounds + 1))


_EXAMPLES = int(os.environ.get("COTERIE_EXAMPLES", "150"))
for machine in (Transaction, TransactionThatGoesOn):
    machine.TestCase.settings = settings(
        max_examples=_EXAMPLES, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
TestTransaction = Transaction.TestCase
TestTransactionThatGoesOn = TransactionThatGoesOn.TestCase
