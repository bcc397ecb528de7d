"""How long a round of a federation takes, from what computing costs here and what crosses each party's line.

Plain arithmetic; `coterie.training.party.planned_time` measures. A round has parts that follow each other, and ends
when the slowest party is done:

- `experts`: the first layer comes; the others come while records are computed, so the longer of the two counts; noise
  and step; masks; the push. A line carries both directions at once, and a host's line serves all other parties.
- `tokens`: hidden vectors travel while others are computed where `train.in_flight` is two or more; a host answers for
  its own experts as much as its own tokens ask of others.

Not counted: evaluations, checkpoints, and what messages wait for on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PartyLoad:
    """One party's work and traffic in a round.

    Attributes:
        party: its name.
        units: records, or micro-batches where there is no budget.
        unit_seconds: of one of them, on this party's machine.
        fixed_seconds: of noise and optimiser step, whatever the lot.
        mask_seconds: of masks; 0 where pushes are plain.
        first: bytes that have to be here before anything is computed.
        fetched, served: bytes of weights that come here, and that go from here to others.
        pushed, taken: bytes of sums that go from here, and that come here from others.
    """

    party: str
    units: float
    unit_seconds: float
    fixed_seconds: float = 0.0
    mask_seconds: float = 0.0
    first: int = 0
    fetched: int = 0
    served: int = 0
    pushed: int = 0
    taken: int = 0


@dataclass(frozen=True)
class PartyTime:
    """Seconds of one party in a round.

    Attributes:
        computing: records, forward and backward.
        fixed: noise and optimiser step.
        masks: made and added.
        line: that the line adds: what computing does not hide, and the push.
        waiting: for the slowest party.
    """

    party: str
    computing: float
    fixed: float
    masks: float
    line: float
    waiting: float = 0.0

    @property
    def own(self) -> float:
        """Without waiting for others."""
        return self.computing + self.fixed + self.masks + self.line


@dataclass(frozen=True)
class RoundTime:
    """A round, and the whole run.

    Attributes:
        parties: what each does.
        rounds: of the run.
        slowest: for whom the others wait.
        seconds: of a round.
        run_seconds: of all rounds.
    """

    parties: tuple[PartyTime, ...]
    rounds: int

    @property
    def slowest(self) -> str:
        return max(self.parties, key=lambda each: each.own).party

    @property
    def seconds(self) -> float:
        return max(each.own for each in self.parties)

    @property
    def run_seconds(self) -> float:
        return self.seconds * self.rounds

    def as_json(self) -> dict[str, Any]:
        """Plain figures."""
        return {**asdict(self), "slowest": self.slowest, "seconds": self.seconds, "run_seconds": self.run_seconds}


def experts_round(
    loads: Sequence[PartyLoad], bytes_per_second: float, rounds: int, push_after_s: float | None = None
) -> RoundTime:
    """A round of `experts`.

    Args:
        loads: of all parties.
        bytes_per_second: of every party's line, in each direction.
        rounds: of the run.
        push_after_s: constant-work mode: no sum leaves earlier after the round began.
    """

    def seconds(amount: float) -> float:
        return amount / bytes_per_second

    def of(load: PartyLoad) -> PartyTime:
        first = seconds(load.first)
        # Whoever has least to fetch still waits where a host's line has to serve everybody.
        slowest_host = max(each.served for each in loads)
        later = max(0.0, seconds(max(load.fetched, slowest_host)) - first)
        computing = load.units * load.unit_seconds
        before = first + max(computing, later) + load.fixed_seconds + load.mask_seconds
        held = max(0.0, (push_after_s or 0.0) - before)
        push = seconds(max(load.pushed, max(each.taken for each in loads)))
        line = first + max(0.0, later - computing) + held + push
        return PartyTime(load.party, computing, load.fixed_seconds, load.mask_seconds, line)

    return _waiting([of(load) for load in loads], rounds)


def tokens_round(loads: Sequence[PartyLoad], bytes_per_second: float, rounds: int, *, in_flight: int) -> RoundTime:
    """A round of `tokens`; ``fetched`` is what crosses a party's line in each direction.

    Args:
        loads: of all parties.
        bytes_per_second: of every party's line, in each direction.
        rounds: of the run.
        in_flight: micro-batches on the way at once.
    """

    def of(load: PartyLoad) -> PartyTime:
        wire, computing = load.fetched / bytes_per_second, load.units * load.unit_seconds
        hidden = min(computing, wire * (1 - 1 / max(load.units, 1))) if in_flight > 1 else 0.0
        return PartyTime(load.party, computing, load.fixed_seconds, 0.0, wire - hidden)

    return _waiting([of(load) for load in loads], rounds)


def _waiting(times: Sequence[PartyTime], rounds: int) -> RoundTime:
    most = max(each.own for each in times)
    return RoundTime(
        tuple(
            PartyTime(each.party, each.computing, each.fixed, each.masks, each.line, most - each.own)
            for each in times
        ),
        rounds,
    )
