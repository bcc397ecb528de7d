"""The party's half of the round transaction: what one party does about a directive.

Like `rounds.advance` it is a plain function of what the party holds and what the coordinator says, so that crashes
can be tried at every point.
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
        prepared: (round, attempt) computed and staged, waiting to hear whether it was committed.
    """

    live: int | None = None
    prepared: tuple[int, int] | None = None


def acts(party: str, standing: PartyMemory, told: State) -> tuple[Act, ...]:
    """What ``party`` has to do to follow ``told``.

    A prepared attempt survives any number of lost messages and changes of phase until the coordinator names the
    newest commit: it is applied if that is the one, and dropped otherwise.
    """
    first: tuple[Act, ...] = ()
    live = standing.live
    if standing.prepared is not None and standing.prepared != _asked(told):
        if standing.prepared == (told.committed, told.committed_attempt):
            first, live = (Act.STEP,), told.committed
        else:
            first = (Act.DROP,)
    if told.phase is Phase.END:
        return (*first, Act.LEAVE)
    if party in told.absent:
        return first
    match told.phase:
        case Phase.GATHER:
            then: tuple[Act, ...] = ()
        case Phase.RESTORE:
            then = (Act.LOAD,) if party in told.sources else ()
        case Phase.COMPUTE:
            ready = live == told.round - 1
            then = (() if standing.prepared == _asked(told) else (Act.COMPUTE,)) if ready else (Act.REFUSE,)
        case Phase.STEP:
            then = () if live == told.round else (Act.REFUSE,)
        case Phase.EVALUATE:
            then = (Act.EVALUATE,) if live == told.round else (Act.REFUSE,)
        case Phase.CHECKPOINT:
            then = (Act.SAVE,) if live == told.round else (Act.REFUSE,)
    return (*first, *then)


def _asked(told: State) -> tuple[int, int] | None:
    """The attempt that the directive is still asking for."""
    return (told.round, told.attempt) if told.phase is Phase.COMPUTE else None


def after_act(act: Act, standing: PartyMemory, told: State) -> PartyMemory:
    """The standing once ``act`` has been carried out."""
    match act:
        case Act.STEP:
            return PartyMemory(live=told.committed)
        case Act.DROP:
            return PartyMemory(live=standing.live)
        case Act.LOAD:
            return PartyMemory(live=told.round)
        case Act.COMPUTE:
            return PartyMemory(live=standing.live, prepared=(told.round, told.attempt))
        case _:
            return standing
