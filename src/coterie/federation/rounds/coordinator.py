"""The coordinator: takes every report, decides with `coordinator_rules.advance`, writes it down, directs everybody.

It holds no model, sees no tensor and no loss, and can be killed at any time: what it needs is in its journal, the
rest comes with the next heartbeats.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from coterie.errors import CoterieError, RoundError, TransportError
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.rounds.coordinator_rules import advance, wanting
from coterie.federation.rounds.directives import Call, Directive, Refusal, decode, encode
from coterie.federation.rounds.failures import run_failure
from coterie.federation.rounds.journal import Journal
from coterie.federation.rounds.state import Clock, Ending, Move, PartyReport, Phase, RoundPlan, State, View
from coterie.federation.wire.gate import Gate
from coterie.federation.wire.messages import check_request
from coterie.federation.wire.own_time import OwnTime
from coterie.federation.wire.transport import Lane, Message, Transport

_TICK_S = 0.2


def refusals_allowed(plan: RoundPlan) -> int:
    """Misfits of one member after which it is dropped: before the attempts that they cost would end the run."""
    return max(1, min(plan.max_refusals, plan.max_attempts - 1))


@dataclass(frozen=True)
class CoordinatorStatus:
    """What the coordinator shows of itself after each change.

    Attributes:
        state: the newest durable state.
        missing: parties that are waited for.
        cut: pairs of parties that are here and have no connection to each other.
        busy: parties that are here and have not done what was asked.
        refused: parties that were turned away, with the code.
        left_s: seconds until the run ends for want of a party; None while nobody is missing.
    """

    state: State
    missing: tuple[str, ...]
    refused: dict[str, str]
    left_s: float | None = None
    cut: tuple[tuple[str, str], ...] = ()
    busy: tuple[str, ...] = ()


class Coordinator:
    """Runs one federation from the first arrival to the end.

    Args:
        plan: what was agreed.
        transport: not started yet; the coordinator's own end.
        journal: its memory.
        agreement: hash every party has to name.
        on_change: called after every change, never while a lock is held.
        repeat_s: how often `on_change` is called while somebody is missing.
    """

    def __init__(
        self,
        plan: RoundPlan,
        transport: Transport,
        journal: Journal,
        agreement: str,
        on_change: Callable[[CoordinatorStatus], None] = lambda status: None,
        repeat_s: float = 10.0,
    ) -> None:
        self._plan, self._journal, self._agreement = plan, journal, agreement
        self._transport = Gate(
            transport, refusals_allowed(plan), lambda address: journal.state.seq, self._refused_too_often
        )
        self._on_change, self._repeat_s = on_change, repeat_s
        self._views: dict[str, View] = {}
        self._retired: dict[str, str] = {}  # instance to why it may not come back
        self._since: dict[str, int] = {}  # number of the state in which each party's present process came
        self._refused: dict[str, str] = {}
        self._stop = ""
        self._changed = threading.Condition()
        self._time = OwnTime()
        self._entered = self._time.now()

    def stop(self, who: str = "the coordinator") -> None:
        """End the run after the round in progress, with a checkpoint."""
        # No lock: this is called from a signal handler, which may interrupt a holder of the lock.
        self._stop = self._stop or who

    def run(self) -> State:
        """Serve until the run has ended and everybody who is there knows it.

        Returns:
            The last state: finished or stopped.

        Raises:
            CoterieError: the run failed or paused; see `run_failure`. A later start takes it up again.
            RoundError: ``run-paused``: it had paused before, and nobody said that it may go on.
        """
        self._begin()
        self._transport.start(self._handle)
        sent = 0
        shown: tuple[object, ...] = ()
        shown_at = time.monotonic()
        while True:
            with self._changed:
                self._decide()
                status = self._status()
                ended = self._ended(status)
            state = status.state
            if state.seq != sent:
                self._broadcast()
            waiting = status.missing or status.cut or status.busy
            due = bool(waiting) and time.monotonic() - shown_at > self._repeat_s
            change = (state.seq, status.missing, status.cut, status.refused)
            if due or shown != change:
                self._on_change(status)
                shown, shown_at = change, time.monotonic()
            sent = state.seq
            if ended:
                break
            with self._changed:
                if self._journal.state.seq == sent:
                    self._changed.wait(_TICK_S)
        if state.ending in (Ending.FAILED, Ending.PAUSED):
            raise self._failure(state)
        return state

    def _begin(self) -> None:
        """Take up a run that was stopped or failed, or a finished one for questions; one that was cut off goes on."""
        state, history = self._journal.state, self._journal.history
        if self._plan.questions and min(state.committed, state.evaluated, history.newest) < self._plan.rounds:
            raise RoundError(
                f"{state.committed} of {self._plan.rounds} rounds are done, so there is no finished model to ask.",
                code="questions-unfinished",
                why="questions are for the model that all parties ended with; nothing is trained meanwhile",
                fix="let the rounds be done first: start the coordinator without --questions",
            )
        if state.phase is Phase.END and state.pauses and not self._plan.go_on:
            raise RoundError(
                f"the run is paused at round {state.committed}: {state.note}.",
                code="run-paused",
                why="masks hide who spoilt the sums, so people have to look before anybody pushes again",
                fix="when all parties have looked at their machines, versions and logs, start the coordinator with "
                "--go-on and every party with `coterie resume`",
            )
        if state.phase is Phase.END and (self._plan.questions or state.ending is not Ending.FINISHED):
            again = replace(
                state,
                seq=state.seq + 1,
                phase=Phase.GATHER,
                failures=0,
                interruptions=0,
                wild_sums=0,
                begun=False,
                absent=(),
                rejoining=(),
                ending=Ending.NONE,
                code="",
                note="taken up for questions" if self._plan.questions else "taken up again",
            )
            self._journal.write(Move(again))
        self._entered = self._time.now()

    def _handle(self, peer: str, lane: Lane, message: Message) -> Message:
        check_request("rounds", COORDINATOR, peer, lane, message)
        call = decode(message, Call, peer)
        with self._changed:
            refusal = self._refuse(peer, call)
            if refusal is not None:
                self._refused[peer] = refusal.code
                return encode(refusal)
            self._refused.pop(peer, None)
            self._take_report(peer, call.report)
            self._decide()
            self._changed.notify_all()
            return self._directive()

    def _refuse(self, peer: str, call: Call) -> Refusal | None:
        if peer not in self._plan.parties:
            return Refusal("roster-stranger")
        if call.agreement != self._agreement:
            return Refusal("config-mismatch", self._agreement)
        if call.run not in ("", self._journal.run):
            return Refusal("checkpoint-other-run", self._journal.run)
        if call.report.instance in self._retired:
            return Refusal(self._retired[call.report.instance])
        return None

    def _take_report(self, peer: str, report: PartyReport) -> None:
        old = self._views.get(peer)
        if old is None or old.report.instance != report.instance:
            self._since[peer] = self._journal.state.seq
        if old is not None and old.report.instance != report.instance:
            self._retired.setdefault(old.report.instance, "round-superseded")
        elif old is not None and old.report.count > report.count:
            report = old.report  # it arrived late, but it still says that the party is alive
        self._views[peer] = View(report, self._time.now())
        self._act_on_complaints(peer)
        if report.stop:
            self.stop(peer)

    def _act_on_complaints(self, peer: str) -> None:
        """Drop whoever a party complains of; it is one's word against the other's, so whoever complains of several,
        and of more than half of the others, is itself the one that does not fit."""
        valid = [
            each
            for each in self._views[peer].report.complaints
            if each.about != peer
            and each.about in self._views
            and not self._views[each.about].dropped
            and each.seq >= self._since[each.about]
        ]
        if len(valid) > 1 and 2 * len(valid) > len(self._plan.parties) - 1:
            self._drop(peer, f"it refuses what {', '.join(each.about for each in valid)} sent")
            return
        for each in valid:
            self._drop(each.about, f"{peer} refuses what it sent ({each.code})")

    def _refused_too_often(self, peer: str, code: str) -> None:
        with self._changed:
            self._drop(peer, f"the coordinator refuses what it sent ({code})")

    def _drop(self, party: str, reason: str) -> None:
        """From now on this process of a party counts as lost; a new one may come."""
        view = self._views.get(party)
        if view is not None and not view.dropped:
            self._retired[view.report.instance] = "member-dropped"
            self._views[party] = replace(view, dropped=reason)
            self._changed.notify_all()

    def _decide(self) -> None:
        """Write down and take up every decision that is due. Called with the lock held."""
        while True:
            state, history = self._journal.state, self._journal.history
            move = advance(self._plan, state, history, self._current_views(), self._clock(), self._stop)
            if move is None:
                return
            self._journal.write(move)
            self._entered = self._time.now()

    def _clock(self) -> Clock:
        return Clock(self._time.now(), self._entered)

    def _current_views(self) -> dict[str, View]:
        connected = self._transport.connected()
        return {name: replace(view, connected=name in connected) for name, view in self._views.items()}

    def _status(self) -> CoordinatorStatus:
        state, clock = self._journal.state, self._clock()
        wants = wanting(self._plan, state, self._current_views(), clock)
        left = max(0.0, self._plan.join_s - (clock.now - clock.entered)) if wants.missing or wants.cut else None
        busy = wants.busy if clock.now - clock.entered > _TICK_S else ()
        return CoordinatorStatus(state, wants.missing, dict(self._refused), left, wants.cut, busy)

    def _directive(self) -> Message:
        journal = self._journal
        status = self._status()
        return encode(Directive(journal.run, journal.state, journal.history.newest, status.missing, status.cut))

    def _broadcast(self) -> None:
        """Send the directive to everybody connected; who misses it gets it in the answer to its next heartbeat."""
        with self._changed:
            message = self._directive()
        for party in self._plan.parties:
            if party in self._transport.connected():
                try:
                    self._transport.send(party, Lane.CONTROL, message)
                except TransportError:
                    continue

    def _ended(self, status: CoordinatorStatus) -> bool:
        state, now = status.state, self._time.now()
        if state.phase is not Phase.END:
            return False
        # The last directive of a finished run goes to everybody, also to those that were started again afterwards.
        wanted = [p for p in self._plan.parties if state.ending is Ending.FINISHED or self._here(p, now)]
        know = [p in self._views and self._views[p].report.done >= state.seq for p in wanted]
        return all(know) or now - self._entered > self._plan.lease_s

    def _here(self, party: str, now: float) -> bool:
        view = self._views.get(party)
        return view is not None and now - view.heard_at <= self._plan.lease_s

    def _failure(self, state: State) -> CoterieError:
        refused = [f"{name} was turned away with `{code}`" for name, code in sorted(self._refused.items())]
        return run_failure(state, "; ".join(refused) or None)
