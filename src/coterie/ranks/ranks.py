"""What the ranks of a run do together. A process by itself is one rank, and does the same.

Everything here is done by all ranks in the same order; each step has a name, and ranks whose names differ are refused
instead of waiting for each other. An error of one rank is raised by all.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from coterie import errors
from coterie.errors import CoterieError, RankError
from coterie.ranks.world import check_alone

if TYPE_CHECKING:
    from torch import Tensor


_HEARD = "coterie_heard"
"""On an error: another rank raised it."""


class Ranks(ABC):
    """The ranks of a run, as one of them sees them. Use it as a context manager, or call `close`.

    Attributes:
        rank: this process's number, from 0. Rank 0 draws lots, keeps the ledger and writes checkpoints.
        world: how many ranks there are.
    """

    rank: int
    world: int

    @abstractmethod
    def together(self, step: str, make: Callable[[], Any], *, patient: bool = False) -> list[Any]:
        """Let every rank make a JSON value, and give all of them to every rank, in rank order.

        Args:
            step: its name.
            make: the value.
            patient: a rank that lives is waited for however long it takes, because it waits for somebody else.

        Raises:
            RankError: a rank is gone, silent, or at another step.
            CoterieError: what a rank raised, at every rank; see `read_outcomes`.
        """

    @abstractmethod
    def add_up(self, pieces: Sequence[Tensor], owner: int) -> None:
        """Add the pieces of all ranks, same shapes and types everywhere, into those of ``owner``, in place.

        The other ranks' pieces stay as they are.

        Raises:
            RankError: a rank is gone or silent.
        """

    @abstractmethod
    def hand_out(self, pieces: Sequence[Tensor], owner: int) -> None:
        """Write the pieces of ``owner`` over those of every rank.

        Raises:
            RankError: a rank is gone or silent.
        """

    @abstractmethod
    def gather(self, own: Tensor) -> list[Tensor]:
        """The tensor of every rank, in rank order; same shapes and types everywhere.

        Raises:
            RankError: a rank is gone or silent.
            CoterieError: what another rank failed with meanwhile.
        """

    @abstractmethod
    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send rows to all ranks and take theirs, the rows from rank 0 first.

        Args:
            rows: [sum of ``send``, ...], those for rank 0 first.
            send: how many rows go to each rank.
            receive: how many come from each.

        Returns:
            [sum of ``receive``, ...].

        Raises:
            RankError: a rank is gone or silent.
            CoterieError: what another rank failed with meanwhile.
        """

    @abstractmethod
    def check_others(self) -> None:
        """Look, without waiting, whether another rank has failed at this step: nobody needs this one's part then.

        For whoever computes long, and for what ends where a connection was cut.

        Raises:
            CoterieError: what it failed with.
        """

    @abstractmethod
    def split(self, size: int) -> tuple[Ranks, Ranks]:
        """Groups of ``size`` neighbours; every rank calls this, in the same order as whatever else they do together.

        Returns:
            The ranks of this one's group, and those at its place in every group; both count from 0, in rank order.

        Raises:
            RankError: ``size`` does not divide the number of ranks.
        """

    @abstractmethod
    def close(self, failure: BaseException | None = None) -> None:
        """Leave the other ranks; they raise what this one failed with."""

    def tell(self, step: str, make: Callable[[], Any], *, patient: bool = False) -> Any:
        """What rank 0 makes, a JSON value, at every rank; the others make nothing. See `together`."""
        return self.together(step, make if self.rank == 0 else _nothing, patient=patient)[0]

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, other ranks wait for this one to begin what they exchange: where it fails none can go on.

        Raises:
            RankError: in place of any other error of coterie's, with its words and its code.
        """
        try:
            yield
        except RankError:
            raise
        except CoterieError as error:
            raise _for_good(error) from error

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Inside, ranks wait for each other's tensors: where one fails no rank can go on with another attempt.

        Raises:
            RankError: in place of any other error of coterie's; if another rank raised it, with its words and code.
        """
        try:
            yield
        except RankError:
            raise
        except CoterieError as error:
            if _HEARD in error.__dict__:
                raise _for_good(error) from error
            raise RankError(
                f"rank {self.rank} failed while other ranks waited for its rows: {error.message}",
                code="ranks-failed",
                where=error.where,
                why=error.why,
                fix=f"{error.fix or 'mend that'} ({error.code}), and resume the run",
            ) from error

    @contextmanager
    def all_well(self, step: str) -> Iterator[None]:
        """Go on after the block only where every rank got through it; inside, ranks exchange nothing."""
        try:
            yield
        except Exception as error:
            failure = error
            self.together(step, lambda: _raise(failure))
            raise
        self.together(step, _nothing)

    def agree(self, step: str, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Hold all ranks to the same facts, JSON values by name.

        Raises:
            RankError: one differs; the message names it.
        """
        check_same(step, self.together(step, lambda: dict(facts())))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failure)


class Alone(Ranks):
    """One process: rank 0 of 1."""

    rank, world = 0, 1

    def together(self, step: str, make: Callable[[], Any], *, patient: bool = False) -> list[Any]:
        return [make()]

    def agree(self, step: str, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Nobody differs from oneself; facts like a digest of all weights take their time and are not made."""

    def add_up(self, pieces: Sequence[Tensor], owner: int) -> None: ...

    def hand_out(self, pieces: Sequence[Tensor], owner: int) -> None: ...

    def gather(self, own: Tensor) -> list[Tensor]:
        return [own]

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return rows

    def check_others(self) -> None: ...

    def split(self, size: int) -> tuple[Ranks, Ranks]:
        check_groups(self.world, size)
        return self, self

    def close(self, failure: BaseException | None = None) -> None: ...


def check_groups(world: int, size: int) -> None:
    """Make sure that ranks can be split into groups of a size.

    Raises:
        RankError: they cannot.
    """
    if size < 1 or world % size:
        raise RankError(
            f"{world} ranks cannot be split into groups of {size}.",
            code="ranks-groups",
            why="every group holds all experts once, and has a rank for each part of them",
            fix=f"use a number of ranks that is a multiple of {size}" if size > 0 else "use groups of at least 1",
        )


def check_same(step: str, by_rank: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that all ranks have the same facts.

    Args:
        step: at which they were compared.
        by_rank: JSON values by name, of each rank.

    Raises:
        RankError: one differs; the message names it.
    """
    first, *others = by_rank
    for rank, other in enumerate(others, 1):
        differing = sorted(name for name in {**first, **other} if first.get(name) != other.get(name))
        if differing:
            name = differing[0]
            raise RankError(
                f"the ranks differ in {name}: rank 0 has {first.get(name)}, rank {rank} {other.get(name)}.",
                code="ranks-differ",
                where=step,
                why="their sums would be added up although they are not of the same run",
                fix="start all ranks with the same code, versions, settings and files",
            )


def ranks_or_alone(ranks: Ranks | None) -> Ranks:
    """The ranks that were given, or this process by itself.

    Every start of a private or federated run passes here.

    Raises:
        PrivacyError: none were given, and a launcher started several processes.
    """
    if ranks is None:
        check_alone()
        return Alone()
    return ranks


def outcome(step: str, make: Callable[[], Any]) -> tuple[str, Exception | None]:
    """What a rank sends at a step: the value that it made, or the error that it raised; and that error."""
    try:
        return _packed(step, value=make()), None
    except Exception as failure:
        return _packed(step, error=_words(failure)), failure


def last_words(step: str, failure: BaseException) -> str:
    """What a rank sends that takes no further part."""
    return _packed(step, error=_words(failure))


def read_outcomes(step: str, packed: Sequence[bytes], own: int, failure: Exception | None) -> list[Any]:
    """The values of all ranks.

    Args:
        step: that this rank is at.
        packed: by rank, see `outcome`.
        own: this rank.
        failure: that this rank raised.

    Raises:
        RankError: a rank is at another step.
        Exception: what the first rank that failed raised; of several, the first after which ranks do not go on
            together, since it may have left an exchange half done.
    """
    outcomes = [json.loads(each) for each in packed]
    # At whatever step: a rank that failed in the middle of one does not get to its end.
    failed = [(rank, words["error"]) for rank, words in enumerate(outcomes) if "error" in words]
    if failed:
        rank, said = next((each for each in failed if _ends_all(each[1])), failed[0])
        error = failure if failure is not None and rank == own else _error(rank, said)
        if isinstance(error, CoterieError):
            error.known_to_all = True
        raise error
    for rank, words in enumerate(outcomes):
        if words["step"] != step:
            raise RankError(
                f"rank {rank} is at `{words['step']}`, rank {own} at `{step}`.",
                code="ranks-out-of-step",
                why="each would wait for the other, or take its values for something else",
                fix="call the session's methods at every rank, in the same order",
            )
    return [words["value"] for words in outcomes]


def check_failed(rank: int, packed: bytes) -> None:
    """Raise what another rank failed with, if that is what it has put down.

    Raises:
        CoterieError: it did.
    """
    words = json.loads(packed)
    if "error" in words:
        raise _error(rank, words["error"])


def _packed(step: str, **content: Any) -> str:
    return json.dumps({"step": step, **content})


def _words(failure: BaseException) -> dict[str, Any]:
    if isinstance(failure, CoterieError):
        words = {name: getattr(failure, name) for name in ("message", "code", "where", "why", "fix", "field")}
        return {"kind": type(failure).__name__, **words}
    return {"kind": None, "message": f"{type(failure).__name__}: {failure}"}


def _ends_all(words: Mapping[str, Any]) -> bool:
    """Whether ranks do not go on together after what one raised."""
    return words["kind"] in (None, RankError.__name__)


def _error(rank: int, words: Mapping[str, Any]) -> CoterieError:
    if words["kind"] is None:
        return RankError(
            f"rank {rank} ended: {words['message']}",
            code="ranks-failed",
            why="a round needs every rank's part of the lot",
            fix="look at that rank's own messages, then resume the run",
        )
    kind = vars(errors).get(words["kind"], CoterieError)
    error: CoterieError = kind(
        words["message"],
        **{name: words[name] for name in ("code", "where", "why", "fix", "field")},
    )
    error.add_note(f"Rank {rank} raised this.")
    error.__dict__[_HEARD] = True
    return error


def _for_good(error: CoterieError) -> RankError:
    """An error after which ranks do not go on together."""
    return RankError(
        error.message, code=error.code, where=error.where, why=error.why, fix=error.fix, field=error.field
    )


def _raise(failure: Exception) -> None:
    raise failure


def _nothing() -> None: ...
