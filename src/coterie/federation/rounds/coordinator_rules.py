"""The round as a transaction: what the coordinator decides, with no input or output of its own.

`advance` looks at what is durable (`State`, `History`) and at the newest report of every party (`View`) and says what
comes next, or nothing. It is a plain function, so every case can be tested without a network, a clock or a disk.

Reports carry a party's state, not events: whoever lost messages, or restarted, catches up with the next one.

::

    gather -> restore -> compute -> step -> [evaluate] -> [checkpoint] -> compute ... -> end
                            |         |          |              |
                            +---------+----------+--------------+--> gather   (error, deadline, missed lease)

Between compute and step the commit is made durable: before it an attempt can be dropped by everybody, after it by
nobody. docs/concepts/rounds.md tells the same in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.config import due
from coterie.federation.rounds.state import (
    FIRST,
    Clock,
    Ending,
    History,
    Move,
    Phase,
    PublishedCheckpoint,
    RoundPlan,
    Saved,
    State,
    View,
)


def advance(
    plan: RoundPlan, state: State, history: History, views: Mapping[str, View], clock: Clock, stop: str = ""
) -> Move | None:
    """What comes next, or None while there is something to wait for.

    Args:
        plan: what was agreed.
        state: what the coordinator says now.
        history: what the journal holds.
        views: what each party answered last, by name.
        clock: seconds; now, and when ``state`` was entered.
        stop: who asked the run to stop; empty while nobody did.
    """
    if state.phase is Phase.END:
        return None
    return _RULES[state.phase](_Scene(plan, state, history, views, clock, stop))


@dataclass(frozen=True)
class Wanting:
    """What a phase waits for.

    Attributes:
        missing: parties that should be here and were not heard within the lease.
        cut: pairs of parties that are here and have no connection to each other.
        busy: parties that are here and have not done what was asked.
    """

    missing: tuple[str, ...] = ()
    cut: tuple[tuple[str, str], ...] = ()
    busy: tuple[str, ...] = ()


def wanting(plan: RoundPlan, state: State, views: Mapping[str, View], clock: Clock) -> Wanting:
    """Who and what keeps the phase from ending."""
    if state.phase is Phase.END:
        return Wanting()
    scene = _Scene(plan, state, History(), views, clock, "")
    lost = scene.lost
    busy = tuple(name for name in scene.active if name not in lost and not scene.done(name))
    return Wanting(lost if state.phase is Phase.GATHER else (), scene.cut, busy)


@dataclass(frozen=True)
class _Scene:
    plan: RoundPlan
    state: State
    history: History
    views: Mapping[str, View]
    clock: Clock
    stop: str

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(name for name in self.plan.parties if name not in self.state.absent)

    def fresh(self, party: str) -> bool:
        """Whether a party counts as being here.

        A process that is only busy still answers pings, so it keeps its connection and has the whole lease; whoever
        is silent and has no connection is gone.
        """
        view = self.views.get(party)
        if view is None or view.dropped:
            return False
        patience = self.plan.lease_s if view.connected else min(self.plan.lease_s, self.plan.quiet_s)
        return self.clock.now - view.heard_at <= patience

    @property
    def cut(self) -> tuple[tuple[str, str], ...]:
        """Pairs of parties without a connection, both heard just now: so it is the connection between them."""
        soon = min(self.plan.lease_s, self.plan.quiet_s) / 2
        here = [
            name
            for name in self.active
            if name in self.views
            and self.views[name].connected
            and self.clock.now - self.views[name].heard_at <= soon
        ]
        return tuple(
            (one, other)
            for index, one in enumerate(here)
            for other in here[index + 1 :]
            if other in self.views[one].report.unreachable or one in self.views[other].report.unreachable
        )

    @property
    def dropped(self) -> tuple[str, ...]:
        """Parties whose process was told to leave, for what it sent."""
        return tuple(name for name in self.active if name in self.views and self.views[name].dropped)

    @property
    def reasons(self) -> str:
        """Why parties were dropped, for the end of a note; empty where none is."""
        return "".join(f": {self.views[name].dropped}" for name in self.dropped)

    @property
    def lost(self) -> tuple[str, ...]:
        """Silent for longer than the lease; one lease is granted after a change and after a restart."""
        if self.state.phase is Phase.GATHER or self.clock.now - self.clock.entered > self.plan.lease_s:
            return tuple(name for name in self.active if not self.fresh(name))
        return tuple(name for name in self.active if name in self.views and not self.fresh(name))

    def done(self, party: str) -> bool:
        view = self.views.get(party)
        return view is not None and view.report.done == self.state.seq

    @property
    def all_done(self) -> bool:
        return all(self.done(name) for name in self.active)

    def live(self, party: str) -> int | None:
        return self.views[party].report.live

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(
            name for name in self.active if name in self.views and self.views[name].report.failed == self.state.seq
        )

    def restarted(self, *allowed: int | None) -> tuple[str, ...]:
        """Parties whose memory does not fit the phase: they came back as a new process."""
        return tuple(name for name in self.active if name in self.views and self.live(name) not in allowed)

    @property
    def overdue(self) -> bool:
        return self.clock.now - self.clock.entered > self.plan.deadline_s

    def to(self, phase: Phase, **changes: object) -> State:
        base = {"attempt": 0, "sources": {}, "note": "", "code": ""}
        return replace(self.state, seq=self.state.seq + 1, phase=phase, **{**base, **changes})  # type: ignore[arg-type]

    def gather(self, note: str, **changes: object) -> Move:
        return Move(self.to(Phase.GATHER, round=self.state.committed, note=note, **changes))

    def fail(self, code: str, note: str) -> Move:
        return Move(self.to(Phase.END, round=self.state.committed, ending=Ending.FAILED, code=code, note=note))

    def again(self, code: str, note: str) -> Move:
        """Everybody drops the attempt; the run ends after too many in a row."""
        failures = self.state.failures + 1
        if failures >= self.plan.max_attempts:
            return self.fail(code, f"{note}, {failures} times in a row")
        return self.gather(note, failures=failures)

    def interrupted(self, note: str) -> Move:
        """Somebody went or lost its memory: no failure, but a run that only ever repeats itself has to end, too."""
        times = self.state.interruptions + 1
        if times > self.plan.max_attempts:
            furthest = self.state.furthest[0]
            return self.fail("round-no-progress", f"{note}, for the {_ordinal(times)} time since round {furthest}")
        return self.gather(note, interruptions=times)

    def accomplished(self) -> State:
        """The state once this phase is done by all.

        Earlier trouble is forgotten only where the run got further than ever before. After going back, rounds are
        repeated that went well before; if they counted, trouble that comes every time would be repeated for ever.
        """
        state = self.state
        here = (state.round, _ORDER[state.phase])
        if here <= state.furthest:
            return state
        wild_sums = state.wild_sums if state.pauses else 0  # what pauses a run is forgotten by people alone
        return replace(state, furthest=here, failures=0, interruptions=0, wild_sums=wild_sums)

    @property
    def activity(self) -> str:
        return f"{self.state.phase} of round {self.state.round}"

    def after_failure(self) -> Move:
        """What follows once a party reported that it could not carry out the directive."""
        reports = [self.views[name].report for name in self.failed]
        codes = sorted({report.code for report in reports})
        note = f"{_names(self.failed)} failed in {self.activity} ({', '.join(codes)})"
        if culprits := sorted({report.culprit for report in reports if report.culprit is not None}):
            note += f" by what {_names(culprits)} sent"
        return self.wild_sum(note) if WILD_SUM in codes else self.again(codes[0], note)

    def wild_sum(self, note: str) -> Move:
        """Masks hide who spoilt a sum, so nobody can be dropped for it: the second time, people have to look."""
        times = self.state.wild_sums + 1
        move = self.again(WILD_SUM, note) if times == 1 else self.gather(f"{note} again: the run pauses")
        return replace(move, state=replace(move.state, wild_sums=times))

    def trouble(self, *allowed: int | None) -> Move | None:
        """The way back to gather, when something is wrong with the present phase."""
        what = self.activity
        if self.dropped:
            # Failures before it are put down to it: they say nothing about those that go on.
            move = self.interrupted(f"{_names(self.dropped)} dropped in {what}{self.reasons}")
            return move if move.state.phase is Phase.END else replace(move, state=replace(move.state, failures=0))
        if self.failed:
            return self.after_failure()
        if self.lost:
            return self.interrupted(f"lost {_names(self.lost)} in {what}")
        if self.cut and self.state.phase in _TALKING:
            return self.interrupted(f"no connection between {_pairs(self.cut)} in {what}")
        if self.restarted(*allowed):
            return self.interrupted(f"{_names(self.restarted(*allowed))} came back as a new process in {what}")
        if self.overdue:
            late = tuple(name for name in self.active if not self.done(name))
            return self.again("round-deadline", f"{_names(late)} not done with {what} in {self.plan.deadline_s:g} s")
        return None

    def after(self, state: State, history: History, **carry: object) -> Move:
        """The next activity once the model of ``state.committed`` rounds is live at everybody."""
        here = replace(self, state=state, history=history)
        round_no, last = state.committed, state.committed >= self.plan.rounds
        halts = bool(self.stop) or state.pauses
        if self.plan.questions:
            nxt = here.to(Phase.EVALUATE, round=round_no, attempt=state.failures + 1)
            return Move(replace(nxt, seq=self.state.seq + 1), **carry)  # type: ignore[arg-type]
        measured = due(round_no, self.plan.evaluate_every) or last
        if measured and round_no > state.evaluated and not (halts and not last):
            nxt = here.to(Phase.EVALUATE, round=round_no, attempt=state.failures + 1)
        elif round_no > history.newest and (due(round_no, self.plan.checkpoint_every) or last or halts):
            nxt = here.to(Phase.CHECKPOINT, round=round_no)
        elif last:
            nxt = here.to(Phase.END, round=round_no, ending=Ending.FINISHED)
        elif state.pauses:
            times = f"for the {_ordinal(state.wild_sums)} time since round {state.furthest[0]}"
            note = f"what all pushed under masks added up to nothing honest, {times}"
            nxt = here.to(Phase.END, round=round_no, ending=Ending.PAUSED, code=WILD_SUM, note=note)
        elif self.stop:
            nxt = here.to(Phase.END, round=round_no, ending=Ending.STOPPED, note=f"{self.stop} asked to stop")
        elif back := tuple(name for name in state.absent if self.fresh(name)):
            left = tuple(name for name in state.absent if name not in back)
            note = f"{_names(back)} came back"
            nxt = here.to(Phase.GATHER, round=round_no, absent=left, rejoining=back, epoch=state.epoch + 1, note=note)
        else:
            nxt = here.to(Phase.COMPUTE, round=round_no + 1, attempt=history.next_attempt(round_no + 1))
        # One move, one number: what led here and what follows are made durable together.
        return Move(replace(nxt, seq=self.state.seq + 1), **carry)  # type: ignore[arg-type]


def _gather(scene: _Scene) -> Move | None:
    state, plan = scene.state, scene.plan
    if (
        scene.failed and not scene.dropped
    ):  # it failed to apply the commit it learned of here; it answers to the next number only
        return scene.after_failure()
    lost, cut = scene.lost, scene.cut
    if not lost and not cut and scene.all_done:
        begun = replace(state, begun=True)
        behind = [name for name in scene.active if scene.live(name) != state.committed]
        if not behind:
            return scene.after(replace(begun, rejoining=()), scene.history)
        scene = replace(scene, state=begun)
        return _rejoin(scene) if set(behind) <= set(state.rejoining) else _roll_back(scene)
    if scene.stop and lost:
        note = f"{scene.stop} asked to stop while {_names(lost)} was missing"
        return Move(scene.to(Phase.END, round=state.committed, ending=Ending.STOPPED, note=note))
    waited = scene.clock.now - scene.clock.entered
    can_go_on = plan.lost_party == "continue" and not plan.questions and state.begun and len(lost) < len(scene.active)
    if lost and can_go_on and waited > plan.lease_s:
        absent = tuple(name for name in plan.parties if name in state.absent or name in lost)
        rejoining = tuple(name for name in state.rejoining if name not in lost)
        note = f"going on without {_names(lost)}{scene.reasons}"
        failures = 0 if scene.dropped else state.failures
        return scene.gather(note, absent=absent, rejoining=rejoining, epoch=state.epoch + 1, failures=failures)
    if waited > plan.join_s and cut and not lost:
        return scene.fail("round-link-cut", f"no connection between {_pairs(cut)} within {plan.join_s:g} s")
    if waited > plan.join_s:
        late = lost or tuple(name for name in scene.active if not scene.done(name))
        note = f"{_names(late)} did not arrive within {plan.join_s:g} s{scene.reasons}"
        return scene.fail("round-party-missing", note)
    return None


def _rejoin(scene: _Scene) -> Move:
    """Who comes back under ``lost_party: continue`` loads its own newest checkpoint; nobody else goes back."""
    published = [checkpoint.files for checkpoint in scene.history.published]
    sources = {}
    for name in scene.state.rejoining:
        held = scene.views[name].report.held
        known = [files[name] for files in published if name in files and files[name] in held]
        sources[name] = max(known, key=lambda saved: saved.round, default=FIRST)
    note = f"{_names(scene.state.rejoining)} takes up its experts again"
    return Move(scene.to(Phase.RESTORE, round=scene.state.committed, sources=sources, note=note))


def _roll_back(scene: _Scene) -> Move:
    """Everybody loads the newest published checkpoint that all hold. The split model is held by all."""
    held = {name: scene.views[name].report.held for name in scene.active}
    lacking: tuple[str, ...] = ()
    for checkpoint in reversed(scene.history.published):
        without = tuple(name for name in scene.active if checkpoint.files[name] not in (FIRST, *held[name]))
        if not without:
            return _load(scene, checkpoint)
        lacking = lacking or without
        if scene.plan.questions:  # asked of the finished model, and of no earlier one
            break
    if lacking:
        return scene.fail(
            "checkpoint-none-common",
            f"no published checkpoint is whole at every party; {_names(lacking)} "
            f"{'lacks' if len(lacking) == 1 else 'lack'} round {scene.history.newest}",
        )
    return _load(scene, PublishedCheckpoint(0, dict.fromkeys(scene.active, FIRST)))


def _load(scene: _Scene, checkpoint: PublishedCheckpoint) -> Move:
    state = scene.to(
        Phase.RESTORE,
        round=checkpoint.round,
        sources=dict(checkpoint.files),
        committed=checkpoint.round,
        committed_attempt=0,
        evaluated=min(scene.state.evaluated, checkpoint.round),
        rejoining=(),
        note=f"from round {checkpoint.round}" if checkpoint.round else "from the split model",
    )
    return Move(state, back_to=checkpoint.round)


def _restore(scene: _Scene) -> Move | None:
    if scene.all_done:
        return scene.after(replace(scene.state, rejoining=()), scene.history)
    return scene.trouble(*_any_live(scene))


def _any_live(scene: _Scene) -> tuple[int | None, ...]:
    """In restore any memory is acceptable: it is about to be replaced."""
    return tuple({scene.live(name) for name in scene.active if name in scene.views})


def _compute(scene: _Scene) -> Move | None:
    state = scene.state
    if scene.all_done:
        step = scene.to(
            Phase.STEP,
            round=state.round,
            attempt=state.attempt,
            committed=state.round,
            committed_attempt=state.attempt,
        )
        return Move(step, committed=True)
    return scene.trouble(state.round - 1)


def _step(scene: _Scene) -> Move | None:
    if scene.all_done:
        return scene.after(scene.accomplished(), scene.history)
    return scene.trouble(scene.state.round - 1, scene.state.round)


def _evaluate(scene: _Scene) -> Move | None:
    if scene.all_done and scene.plan.questions:
        return Move(scene.to(Phase.END, round=scene.state.round, ending=Ending.FINISHED))
    if scene.all_done:
        return scene.after(replace(scene.accomplished(), evaluated=scene.state.round), scene.history)
    return scene.trouble(scene.state.round)


def _checkpoint(scene: _Scene) -> Move | None:
    round_no = scene.state.round
    if not scene.all_done:
        return scene.trouble(round_no)
    before = scene.history.published[-1].files if scene.history.published else {}
    files = {name: before.get(name, FIRST) for name in scene.state.absent}
    files |= {name: Saved(round_no, scene.views[name].report.saved) for name in scene.active}
    checkpoint = PublishedCheckpoint(round_no, {name: files[name] for name in scene.plan.parties})
    history = replace(scene.history, published=(*scene.history.published, checkpoint))
    return scene.after(scene.accomplished(), history, published=checkpoint)


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"


def _names(parties: Sequence[str]) -> str:
    return ", ".join(parties) if len(parties) < 2 else f"{', '.join(parties[:-1])} and {parties[-1]}"


def _pairs(cut: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{one} and {other}" for one, other in cut)


_TALKING = (Phase.COMPUTE, Phase.EVALUATE, Phase.CHECKPOINT)
"""Phases in which parties need each other."""

WILD_SUM = "sum-wild"

_ORDER = {Phase.STEP: 1, Phase.EVALUATE: 2, Phase.CHECKPOINT: 3}
"""In which order a round's lasting phases are done."""

_RULES: dict[Phase, Callable[[_Scene], Move | None]] = {
    Phase.GATHER: _gather,
    Phase.RESTORE: _restore,
    Phase.COMPUTE: _compute,
    Phase.STEP: _step,
    Phase.EVALUATE: _evaluate,
    Phase.CHECKPOINT: _checkpoint,
}
