"""Which weights a message of the `experts` exchange is about, and which attempts are recent enough to be late for."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.federation.rounds.state import Phase, State
from coterie.federation.wire.transport import Address, Message


@dataclass(frozen=True)
class Attempt:
    """One try at a round; with number 0 its end, when the round's model is evaluated and saved.

    Attributes:
        round: from 1.
        number: from 1 and never used again for this round; the coordinator hands it out.
    """

    round: int
    number: int = 0

    @classmethod
    def of(cls, message: Message) -> Attempt:
        """The one that a message is about."""
        return cls(message.address.round, message.address.attempt)

    def address(self, *, part: int = 0, chunk: int = 0) -> Address:
        """Where messages about it go."""
        return Address(round=self.round, attempt=self.number, part=part, chunk=chunk)

    def is_before(self, other: Attempt) -> bool:
        """Whether all parties are done with this one when the other begins."""
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, bool, int]:
        return self.round, self.number == 0, self.number

    def __str__(self) -> str:
        return f"round {self.round}, attempt {self.number}" if self.number else f"the end of round {self.round}"


class RecentAttempts:
    """The last two attempts that this process knows, each by the directive that began it.

    What a member sent in one attempt may be looked at when the next has begun; it still belongs to the one it names.
    What names any other belongs to what is being done, so that nobody can stay in an attempt for ever.
    """

    def __init__(self) -> None:
        self._begun: dict[tuple[int, int], int] = {}

    def add(self, state: State) -> None:
        key = state.round, state.attempt
        if state.phase is Phase.COMPUTE and key not in self._begun:
            self._begun = dict([*self._begun.items(), (key, state.seq)][-2:])

    def seq(self, address: Address | None, now: int) -> int:
        """The number of the directive that began the attempt which ``address`` names, or else ``now``."""
        return now if address is None else self._begun.get((address.round, address.attempt), now)
