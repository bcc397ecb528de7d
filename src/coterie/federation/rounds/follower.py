"""A party's main loop: take a directive, do what `party_rules.acts` says, report. How to do it is the `Actor`'s."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from coterie.errors import CoterieError, MessageError, RankError, RoundError
from coterie.federation.cancel import CancelToken
from coterie.federation.rounds.directives import Directive
from coterie.federation.rounds.failures import run_failure
from coterie.federation.rounds.heartbeat import Heartbeat
from coterie.federation.rounds.party_rules import Act, PartyMemory, acts, after_act
from coterie.federation.rounds.state import Ending, Saved, State

GOODBYE_S = 3.0


class Actor(Protocol):
    """One party's model, data and hosted experts. All methods but `cancel` are called from one thread.

    A token is cancelled once a newer directive came, and `cancel` is called after that: check the token once more
    when whatever `cancel` acts on is in place, since it may have come before.
    """

    def held(self) -> tuple[Saved, ...]:
        """Checkpoints on disk that could be loaded."""
        ...

    def load(self, source: Saved, state: State) -> None:
        """Put the named checkpoint into memory; round 0 is the split model. ``state.round`` rounds lie behind it."""
        ...

    def compute(self, state: State, cancel: CancelToken) -> None:
        """One attempt: forward, backward, gradients staged here and at the hosts. Changes no parameter."""
        ...

    def drop(self, round_no: int, attempt: int) -> None:
        """Forget whatever an attempt staged here; it may be unfinished, or never have begun."""
        ...

    def step(self, round_no: int, attempt: int) -> None:
        """Apply a prepared attempt to trunk and hosted experts."""
        ...

    def evaluate(self, state: State, cancel: CancelToken) -> None:
        """Held-out text, through everybody's experts."""
        ...

    def save(self, state: State, cancel: CancelToken) -> str:
        """Write a checkpoint of ``state.round`` rounds so that it survives a crash; its digest."""
        ...

    def cancel(self) -> None:
        """Called from another thread: what is being done no longer counts. Make it raise soon; returns at once."""
        ...


class Follower:
    """Follows the coordinator until the run ends.

    Args:
        party: this party's name.
        actor: what is done.
        on_directive: called with each directive before it is carried out.
        on_error: called with each error that was reported to the coordinator; only its code crosses.
    """

    def __init__(
        self,
        party: str,
        actor: Actor,
        on_directive: Callable[[Directive], None] = lambda directive: None,
        on_error: Callable[[CoterieError], None] = lambda error: None,
    ) -> None:
        self._party, self._actor, self._on_directive, self._on_error = party, actor, on_directive, on_error
        self._memory = PartyMemory()
        self._heartbeat: Heartbeat | None = None
        self._seq = 0
        # A cancel must not hit the next thing: `_seq` changes, and `cancel` is called, under it.
        self._guard = threading.Lock()

    def on_change(self) -> None:
        """For `Heartbeat`: cancels what a newer directive made pointless."""
        heartbeat = self._heartbeat
        with self._guard:
            if heartbeat is not None and self._seq and not heartbeat.is_newest(self._seq):
                self._actor.cancel()

    def _set_seq(self, seq: int) -> None:
        with self._guard:
            self._seq = seq

    def run(self, heartbeat: Heartbeat) -> State:
        """Take part from joining to the end.

        Returns:
            The last state: finished or stopped.

        Raises:
            CoterieError: the run failed, here or elsewhere, or paused (`run_failure`); or the coordinator is gone or
                refused us.
        """
        self._heartbeat = heartbeat
        heartbeat.update(held=self._actor.held())
        heartbeat.start()
        seq = 0
        while True:
            directive = heartbeat.wait(after=seq)
            state, seq = directive.state, directive.state.seq
            self._on_directive(directive)
            todo = acts(self._party, self._memory, state)
            if Act.LEAVE in todo:
                try:
                    self._leave(todo, state, heartbeat)
                finally:
                    heartbeat.update(done=seq, live=self._memory.live)
                    heartbeat.flush(GOODBYE_S)
                if state.ending in (Ending.FAILED, Ending.PAUSED):
                    raise run_failure(state)
                return state
            self._follow(heartbeat, todo, state)

    def _follow(self, heartbeat: Heartbeat, todo: tuple[Act, ...], state: State) -> None:
        saved = ""
        act: Act | None = None
        self._set_seq(state.seq)
        try:
            for act in todo:
                saved = self._do(act, state, heartbeat) or saved
                self._memory = after_act(act, self._memory, state)
        except RankError as error:  # without its other ranks this process can only be started anew
            heartbeat.update(failed=state.seq, code=error.code, culprit=None, live=None)
            heartbeat.flush(GOODBYE_S)
            raise
        except CoterieError as error:
            self._clean_up(act, state)
            if heartbeat.is_newest(state.seq):
                self._on_error(error)
                culprit = error.peer if isinstance(error, MessageError) else None
                heartbeat.update(
                    failed=state.seq,
                    code=error.code,
                    culprit=culprit,
                    live=self._memory.live,
                    held=self._actor.held(),
                )
            return
        except BaseException:
            heartbeat.update(failed=state.seq, code="internal", culprit=None, live=None)
            heartbeat.flush(GOODBYE_S)
            raise
        finally:
            self._set_seq(0)
        heartbeat.update(done=state.seq, live=self._memory.live, held=self._actor.held(), saved=saved)

    def _do(self, act: Act, state: State, heartbeat: Heartbeat) -> str:
        match act, self._memory.prepared:
            case Act.STEP, (round_no, attempt):
                self._actor.step(round_no, attempt)
            case Act.DROP, (round_no, attempt):
                self._actor.drop(round_no, attempt)
            case Act.LOAD, _:
                self._actor.load(state.sources[self._party], state)
            case Act.COMPUTE, _:
                self._actor.compute(state, _token(state, heartbeat))
            case Act.EVALUATE, _:
                self._actor.evaluate(state, _token(state, heartbeat))
            case Act.SAVE, _:
                return self._actor.save(state, _token(state, heartbeat))
            case _:
                raise RoundError(
                    f"asked for {state.phase} of round {state.round}, but memory holds round {self._memory.live}.",
                    code="round-out-of-step",
                )
        return ""

    def _clean_up(self, act: Act | None, state: State) -> None:
        """Leave nothing half done: a torn model counts as none, an unfinished attempt as never begun."""
        if act in (Act.STEP, Act.LOAD):
            self._memory = PartyMemory()
        elif act is Act.COMPUTE:
            self._actor.drop(state.round, state.attempt)

    def _leave(self, todo: tuple[Act, ...], state: State, heartbeat: Heartbeat) -> None:
        """At the end an attempt that was committed meanwhile is still applied, and any other dropped.

        Raises:
            CoterieError: it could not be applied. The run is over all the same.
        """
        for act in todo[:-1]:
            try:
                self._do(act, state, heartbeat)
            except BaseException:  # the checkpoints on disk are still whole: a later start goes on from there
                self._clean_up(act, state)
                raise
            self._memory = after_act(act, self._memory, state)


def _token(state: State, heartbeat: Heartbeat) -> CancelToken:
    """Cancelled once the directive being carried out is no longer the newest."""
    return CancelToken(lambda: not heartbeat.is_newest(state.seq))
