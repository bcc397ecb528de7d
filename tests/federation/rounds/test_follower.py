"""The party's main loop at its edges: interrupts that come late, and an end that fails."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from coterie.errors import CheckpointError, CoterieError, RankError
from coterie.federation.cancel import CancelToken
from coterie.federation.rounds.directives import Directive
from coterie.federation.rounds.follower import Follower
from coterie.federation.rounds.state import Ending, Phase, Saved, State


class Actor:
    """Remembers what it was doing whenever it was interrupted."""

    def __init__(self) -> None:
        self.doing = ""
        self.interrupted: list[str] = []
        self.entered = threading.Event()
        self.leave = threading.Event()

    def held(self) -> tuple[Saved, ...]:
        return ()

    def load(self, source: Saved, state: State) -> None:
        self.doing = "load"
        self.entered.set()
        assert self.leave.wait(60)
        self.doing = ""

    def compute(self, state: State, cancel: CancelToken) -> None:
        self.doing = "compute"

    def drop(self, round_no: int, attempt: int) -> None: ...

    def step(self, round_no: int, attempt: int) -> None:
        raise CheckpointError("disk full", code="checkpoint-write")

    def evaluate(self, state: State, cancel: CancelToken) -> None: ...

    def save(self, state: State, cancel: CancelToken) -> str:
        return ""

    def cancel(self) -> None:
        self.interrupted.append(self.doing)


class Script:
    """A tie to a coordinator that says what is written here."""

    def __init__(self, *states: State) -> None:
        self.states = list(states)
        self.said: list[dict[str, Any]] = []
        self.newest = 0
        self.asked = threading.Event()
        self.answer = threading.Event()

    def start(self) -> None: ...

    def flush(self, timeout_s: float) -> None: ...

    def update(self, **changes: Any) -> None:
        self.said.append(changes)

    def wait(self, after: int) -> Directive:
        return Directive("run", next(state for state in self.states if state.seq > after))

    def is_newest(self, seq: int) -> bool:
        if threading.current_thread().name == "news":
            self.asked.set()
            self.answer.wait(1.0)
            return False
        return True


LOADING = State(seq=1, phase=Phase.RESTORE, sources={"alder": Saved(0, "")})
COMPUTING = State(seq=2, phase=Phase.COMPUTE, round=1, attempt=1)
OVER = State(seq=3, phase=Phase.END, ending=Ending.STOPPED)


def test_news_about_one_directive_does_not_interrupt_the_next() -> None:
    actor, script = Actor(), Script(LOADING, COMPUTING, OVER)
    participant = Follower("alder", actor)
    main = threading.Thread(target=participant.run, args=(script,), daemon=True)
    main.start()
    assert actor.entered.wait(60)
    news = threading.Thread(target=participant.on_change, name="news", daemon=True)
    news.start()
    assert script.asked.wait(60)  # it knows what is being done, and is about to learn that it does not count any more
    actor.leave.set()
    main.join(0.3)  # were nothing to stop it, it would be computing by now
    script.answer.set()
    news.join(60)
    main.join(60)
    assert actor.interrupted == [""]


def test_commit_that_cannot_be_applied_at_the_end_is_said_and_the_goodbye_still_sent() -> None:
    over = replace(OVER, committed=1, committed_attempt=1)
    actor, script = Actor(), Script(LOADING, COMPUTING, over)
    actor.leave.set()
    told: list[CoterieError] = []
    with pytest.raises(CheckpointError, match="disk full"):
        Follower("alder", actor, on_error=told.append).run(script)  # type: ignore[arg-type]
    assert script.said[-1] == {"done": 3, "live": None}


def test_a_party_whose_other_ranks_are_gone_ends_instead_of_trying_again() -> None:
    class Torn(Actor):
        def compute(self, state: State, cancel: CancelToken) -> None:
            raise RankError("rank 1 has been silent", code="ranks-silent")

    actor, script = Torn(), Script(LOADING, COMPUTING, OVER)
    actor.leave.set()
    with pytest.raises(RankError, match="rank 1 has been silent"):
        Follower("alder", actor).run(script)  # type: ignore[arg-type]
    assert script.said[-1] == {"failed": 2, "code": "ranks-silent", "culprit": None, "live": None}
