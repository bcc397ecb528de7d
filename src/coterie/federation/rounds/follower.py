"""A party's main loop: hear a directive, do what `standing.acts` says, report. What "do" means is the `Actor`'s."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from coterie.errors import CoterieError, MessageError, RoundError
from coterie.federation.rounds.directives import Directive
from coterie.federation.rounds.failures import run_failure
from coterie.federation.rounds.heartbeat import Heartbeat
from coterie.federation.rounds.party_rules import Act, PartyMemory, acts, after_act
from coterie.federation.rounds.state import Ending, Saved, State

GOODBYE_S = 3.0

Alive = Callable[[], bool]
"""Whether the directive being carried out is still the newest. `Actor.interrupt` follows when it stops being so; ask
once after whatever `interrupt` acts on is in place, since it may have come before."""


def superseded() -> RoundError:
    """What ends an attempt that no longer counts."""
    return RoundError("The round was interrupted.", code="round-interrupted")


class Actor(Protocol):
    """One party's model, data and hosted experts. All methods but `interrupt` are called from one thread."""

    def held(self) -> tuple[Saved, ...]:
        """Checkpoints on disk that could be loaded."""
        ...

    def load(self, source: Saved, told: State) -> None:
        """Put the named checkpoint into memory; round 0 is the split model. ``told.round`` rounds lie behind it."""
        ...

    def compute(self, told: State, alive: Alive) -> None:
        """One attempt: forward, backward, gradients staged here and at the hosts. Changes no parameter."""
        ...

    def drop(self, round_no: int, attempt: int) -> None:
        """Forget whatever an attempt staged here; it may be unfinished, or never have begun."""
        ...

    def step(self, round_no: int, attempt: int) -> None:
        """Apply a prepared attempt to trunk and hosted experts."""
        ...

    def evaluate(self, told: State, alive: Alive) -> None:
        """Held-out text, through everybody's experts."""
        ...

    def save(self, told: State, alive: Alive) -> str:
        """Write a checkpoint of ``told.round`` rounds so that it survives a crash; its digest."""
        ...

    def interrupt(self) -> None:
        """Called from another thread: what is being done no longer counts. Make it raise soon; returns at once."""
        ...


class Follower:
    """Follows the coordinator until the run ends.

    Args:
        party: this party's name.
        actor: what is done.
        notify: called with each directive before it is carried out.
        failed: called with each error that was reported to the coordinator; only its code crosses.
    """

    def __init__(
        self,
        party: str,
        actor: Actor,
        notify: Callable[[Directive], None] = lambda directive: None,
        failed: Callable[[CoterieError], None] = lambda error: None,
    ) -> None:
        self._party, self._actor, self._notify, self._failed = party, actor, notify, failed
        self._standing = PartyMemory()
        self._membership: Heartbeat | None = None
        self._working = 0
        # An interrupt must not hit the next thing: `_working` changes, and `interrupt` is called, under it.
        self._guard = threading.Lock()

    def on_news(self) -> None:
        """For `Heartbeat`: interrupts work that a newer directive made pointless."""
        membership = self._membership
        with self._guard:
            if membership is not None and self._working and not membership.current(self._working):
                self._actor.interrupt()

    def _work_on(self, seq: int) -> None:
        with self._guard:
            self._working = seq

    def run(self, membership: Heartbeat) -> State:
        """Take part from joining to the end.

        Returns:
            The last state: finished or stopped.

        Raises:
            CoterieError: the run failed, here or elsewhere (`run_failure`), or the coordinator is gone or refused us.
        """
        self._membership = membership
        membership.say(held=self._actor.held())
        membership.start()
        seq = 0
        while True:
            directive = membership.wait(after=seq)
            state, seq = directive.state, directive.state.seq
            self._notify(directive)
            todo = acts(self._party, self._standing, state)
            if Act.LEAVE in todo:
                try:
                    self._leave(todo, state)
                finally:
                    membership.say(done=seq, live=self._standing.live)
                    membership.flush(GOODBYE_S)
                if state.ending is Ending.FAILED:
                    raise run_failure(state)
                return state
            self._follow(membership, todo, state)

    def _follow(self, membership: Heartbeat, todo: tuple[Act, ...], state: State) -> None:
        saved = ""
        act: Act | None = None
        self._work_on(state.seq)
        try:
            for act in todo:
                saved = self._do(act, state) or saved
                self._standing = after_act(act, self._standing, state)
        except CoterieError as error:
            self._clean_up(act, state)
            if membership.current(state.seq):
                self._failed(error)
                culprit = error.peer if isinstance(error, MessageError) else None
                membership.say(
                    failed=state.seq,
                    code=error.code,
                    culprit=culprit,
                    live=self._standing.live,
                    held=self._actor.held(),
                )
            return
        except BaseException:
            membership.say(failed=state.seq, code="internal", culprit=None, live=None)
            membership.flush(GOODBYE_S)
            raise
        finally:
            self._work_on(0)
        membership.say(done=state.seq, live=self._standing.live, held=self._actor.held(), saved=saved)

    def _do(self, act: Act, state: State) -> str:
        match act:
            case Act.STEP | Act.DROP:
                assert self._standing.prepared is not None
                (self._actor.step if act is Act.STEP else self._actor.drop)(*self._standing.prepared)
            case Act.LOAD:
                self._actor.load(state.sources[self._party], state)
            case Act.COMPUTE:
                self._actor.compute(state, self._alive(state))
            case Act.EVALUATE:
                self._actor.evaluate(state, self._alive(state))
            case Act.SAVE:
                return self._actor.save(state, self._alive(state))
            case Act.REFUSE:
                raise RoundError(
                    f"asked for {state.phase} of round {state.round}, but memory holds round {self._standing.live}.",
                    code="round-out-of-step",
                )
        return ""

    def _alive(self, state: State) -> Alive:
        membership = self._membership
        assert membership is not None
        return lambda: membership.current(state.seq)

    def _clean_up(self, act: Act | None, state: State) -> None:
        """Leave nothing half done: a torn model counts as none, an unfinished attempt as never begun."""
        if act in (Act.STEP, Act.LOAD):
            self._standing = PartyMemory()
        elif act is Act.COMPUTE:
            self._actor.drop(state.round, state.attempt)

    def _leave(self, todo: tuple[Act, ...], state: State) -> None:
        """At the end an attempt that was committed meanwhile is still applied, and any other dropped.

        Raises:
            CoterieError: it could not be applied. The run is over all the same.
        """
        for act in todo[:-1]:
            try:
                self._do(act, state)
            except BaseException:  # the checkpoints on disk are still whole: a later start goes on from there
                self._clean_up(act, state)
                raise
            self._standing = after_act(act, self._standing, state)
