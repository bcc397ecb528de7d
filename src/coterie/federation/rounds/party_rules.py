"""The party's half of the round transaction: what one party does about a directive.

Like `coordinator_rules.advance` it is a plain function of what the party holds and what the coordinator wants, so
that crashes can be tried at every point.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from coterie.federation.rounds.state import Phase, State


class Act(StrEnum):
    """One thing to do, in the order given."""

    STEP = "step"  # apply the prepared attempt
    DROP = "drop"  # forget the prepared attempt
    LOAD = "load"
    COMPUTE = "compute"
    EVALUATE = "evaluate"
    SAVE = "save"
    LEAVE = "leave"
    REFUSE = "refuse"  # memory does not fit what is asked: report a failure


@dataclass(frozen=True)
class PartyMemory:
    """What one party's memory holds.

    Attributes:
        live: rounds behind the parameters and optimiser state; None before anything was loaded.
        prepared: (round, attempt) computed and staged, waiting to know whether it was committed.
    """

    live: int | None = None
    prepared: tuple[int, int] | None = None


def acts(party: str, memory: PartyMemory, state: State) -> tuple[Act, ...]:
    """What ``party`` has to do to follow ``state``.

    A prepared attempt survives any number of lost messages and changes of phase until the coordinator names the
    newest commit: it is applied if that is the one, and dropped otherwise.
    """
    first: tuple[Act, ...] = ()
    live = memory.live
    if memory.prepared is not None and memory.prepared != _asked(state):
        if memory.prepared == (state.committed, state.committed_attempt):
            first, live = (Act.STEP,), state.committed
        else:
            first = (Act.DROP,)
    if state.phase is Phase.END:
        return (*first, Act.LEAVE)
    if party in state.absent:
        return first
    match state.phase:
        case Phase.GATHER:
            then: tuple[Act, ...] = ()
        case Phase.RESTORE:
            then = (Act.LOAD,) if party in state.sources else ()
        case Phase.COMPUTE:
            ready = live == state.round - 1
            then = (() if memory.prepared == _asked(state) else (Act.COMPUTE,)) if ready else (Act.REFUSE,)
        case Phase.STEP:
            then = () if live == state.round else (Act.REFUSE,)
        case Phase.EVALUATE:
            then = (Act.EVALUATE,) if live == state.round else (Act.REFUSE,)
        case Phase.CHECKPOINT:
            then = (Act.SAVE,) if live == state.round else (Act.REFUSE,)
    return (*first, *then)


def _asked(state: State) -> tuple[int, int] | None:
    """The attempt that the directive is still asking for."""
    return (state.round, state.attempt) if state.phase is Phase.COMPUTE else None


def after_act(act: Act, memory: PartyMemory, state: State) -> PartyMemory:
    """The memory once ``act`` has been carried out."""
    match act:
        case Act.STEP:
            return PartyMemory(live=state.committed)
        case Act.DROP:
            return PartyMemory(live=memory.live)
        case Act.LOAD:
            return PartyMemory(live=state.round)
        case Act.COMPUTE:
            return PartyMemory(live=memory.live, prepared=(state.round, state.attempt))
        case _:
            return memory
