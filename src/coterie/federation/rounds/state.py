"""What a round is made of: phases, the durable state, reports and published checkpoints.

Plain values shared by the coordinator's rules, the party's, the journal and the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

# What a process says about itself is shown on everybody's terminal and kept in the coordinator's journal. So no field
# has room for text: the patterns are checked wherever these values are read from JSON.
Code = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{0,64}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Token = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{0,64}$")]
"""A random name or a hash."""
Digest = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
Note = Annotated[str, StringConstraints(pattern=r"^\P{C}*$", max_length=16384)]
"""Written by the coordinator from names, numbers and codes; printable."""
Count = Annotated[int, Field(ge=0, le=2**53)]


class Strict:
    """A value that is refused with a key it does not know."""

    __pydantic_config__ = ConfigDict(extra="forbid")


class Phase(StrEnum):
    """What the federation is doing; every party does the same thing at the same time."""

    GATHER = "gather"  # stop what you do, be idle, say what you hold
    RESTORE = "restore"  # load the named checkpoint
    COMPUTE = "compute"  # one attempt at a round: forward, backward, stage gradients
    STEP = "step"  # the attempt is committed: apply it
    EVALUATE = "evaluate"  # held-out text, everybody hosting
    CHECKPOINT = "checkpoint"  # write your state, sync, report its digest
    END = "end"  # leave


class Ending(StrEnum):
    """Why a run ended."""

    NONE = ""
    FINISHED = "finished"
    STOPPED = "stopped"
    PAUSED = "paused"  # until a person at the coordinator lets it go on
    FAILED = "failed"


@dataclass(frozen=True)
class RoundPlan:
    """What the parties agreed on before they began.

    Attributes:
        parties: names, in the order of the roster.
        rounds: optimiser steps in all.
        evaluate_every, checkpoint_every: rounds between; 0 means only after the last round.
        deadline_s: how long one phase may take.
        lease_s: silence after which a party counts as lost.
        quiet_s: the same for a party that has no connection either: its process or its line is gone, or frozen.
        join_s: how long to wait for a party before the run ends.
        max_refusals: messages that do not fit after which a party's process is dropped.
        max_attempts: failures after which the run ends, if it did not get further meanwhile than ever before; more
            interruptions than that end it as well.
        lost_party: wait for a lost party, or go on without its experts.
        questions: a finished run is taken up once more, so that parties can ask its model; nothing is trained.
        go_on: a paused run is taken up, too.
    """

    parties: tuple[str, ...]
    rounds: int
    evaluate_every: int = 0
    checkpoint_every: int = 0
    deadline_s: float = 1800.0
    lease_s: float = 30.0
    quiet_s: float = 4.0
    join_s: float = 300.0
    max_attempts: int = 3
    max_refusals: int = 2
    lost_party: Literal["pause", "continue"] = "pause"
    questions: bool = False
    go_on: bool = False


@dataclass(frozen=True)
class Saved(Strict):
    """One party's checkpoint: the rounds behind it and the digest of its manifest. Round 0 is the split model."""

    round: Count
    digest: Digest


FIRST = Saved(0, "")


@dataclass(frozen=True)
class PublishedCheckpoint(Strict):
    """A published checkpoint of the federation: what each party has to load to go on from ``round``."""

    round: Count
    files: dict[Name, Saved]


@dataclass(frozen=True)
class History:
    """What the coordinator remembers for ever.

    Attributes:
        published: checkpoints, oldest first.
        attempts: highest attempt ever handed out, per round; a number is never used twice, rollbacks included.
    """

    published: tuple[PublishedCheckpoint, ...] = ()
    attempts: Mapping[int, int] = field(default_factory=dict)

    def next_attempt(self, round_no: int) -> int:
        return self.attempts.get(round_no, 0) + 1

    @property
    def newest(self) -> int:
        """Rounds behind the newest published checkpoint."""
        return self.published[-1].round if self.published else 0


@dataclass(frozen=True)
class State(Strict):
    """Where the federation is. Written to disk before it is sent to anybody.

    Attributes:
        seq: grows by one with every change; parties answer to it.
        phase, round, attempt: what is being done. ``round`` is the round being made (compute, step) or the number of
            rounds behind the model (everything else).
        committed, committed_attempt: newest durable commit on the current history.
        epoch: grows when a party leaves or comes back under ``lost_party: continue``.
        furthest: the round and phase of it that all got done, over the whole run, going back included.
        failures, interruptions: since then, what a party or a deadline failed at, and how often one was lost or came
            back as a new process.
        wild_sums: of those failures, how often masked sums of all were nothing that honest parties add up to.
        begun: everybody was there once.
        evaluated: rounds behind the newest evaluation.
        absent: parties the others go on without. rejoining: absent ones on their way back.
        sources: what to load, in restore.
        ending, code, note: how it ended; why the last change happened, in words without data.
    """

    seq: Count = 1
    phase: Phase = Phase.GATHER
    round: Count = 0
    attempt: Count = 0
    committed: Count = 0
    committed_attempt: Count = 0
    epoch: Count = 0
    furthest: tuple[Count, Count] = (0, 0)
    failures: Count = 0
    interruptions: Count = 0
    wild_sums: Count = 0
    begun: bool = False
    evaluated: Count = 0
    absent: tuple[Name, ...] = ()
    rejoining: tuple[Name, ...] = ()
    sources: dict[Name, Saved] = field(default_factory=dict)
    ending: Ending = Ending.NONE
    code: Code = ""
    note: Note = ""

    @property
    def pauses(self) -> bool:
        """Whether no further round is begun until people have looked."""
        return self.wild_sums > 1

    @property
    def for_questions(self) -> bool:
        """Whether `evaluate` was called once more, after this round's own: so that parties can ask the model."""
        return self.phase is Phase.EVALUATE and self.evaluated >= self.round


@dataclass(frozen=True)
class Complaint(Strict):
    """A party says that another one's messages do not fit what was agreed.

    Attributes:
        about: that other party.
        seq: of the newest directive when it said so; one about an earlier process of that party counts no more.
        code: of the last message's refusal.
    """

    about: Name
    seq: Count
    code: Code


@dataclass(frozen=True)
class PartyReport(Strict):
    """What a party says in every heartbeat.

    Attributes:
        instance: random name of the process; a new one means that memory was lost.
        count: grows with every report of a process; an older one that arrives late is ignored.
        done: newest ``seq`` carried out. failed: ``seq`` that failed, or 0. code: of the error.
        live: rounds behind the state in memory; None when there is none.
        held: checkpoints on disk that can be loaded.
        saved: digest of the checkpoint written in this phase.
        stop: somebody asked this party to stop.
        unreachable: parties it has had no connection to for a while.
        culprit: whose message was at fault in ``failed``.
        complaints: the newest one about each party.
    """

    instance: Token
    count: Count = 0
    done: Count = 0
    failed: Count = 0
    code: Code = ""
    live: Count | None = None
    held: Annotated[tuple[Saved, ...], Field(max_length=64)] = ()
    saved: Digest = ""
    stop: bool = False
    unreachable: Annotated[tuple[Name, ...], Field(max_length=256)] = ()
    culprit: Name | None = None
    complaints: Annotated[tuple[Complaint, ...], Field(max_length=64)] = ()


@dataclass(frozen=True)
class View:
    """The newest report of a party and when it came.

    Attributes:
        connected: whether it has a connection now.
        dropped: why this process of the party counts no more, in names and codes; empty while it does.
    """

    report: PartyReport
    heard_at: float
    connected: bool = True
    dropped: str = ""


@dataclass(frozen=True)
class Clock:
    """Now, and when the present state was entered (or the coordinator restarted); seconds of one clock."""

    now: float
    entered: float


@dataclass(frozen=True)
class Move:
    """A decision, to be made durable as a whole before it is sent to anybody.

    Attributes:
        state: the next state.
        committed: a round was committed by this move.
        published: the checkpoint that this move publishes.
        back_to: rounds and checkpoints after this one no longer count; None when nothing is undone.
    """

    state: State
    committed: bool = False
    published: PublishedCheckpoint | None = None
    back_to: int | None = None
