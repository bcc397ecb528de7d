"""Ranks over torch.distributed: small JSON values through the store that all see, tensors by `coterie.ranks.ways`.

The store is that of the launcher; where there is none, rank 0 keeps it. Every start of the processes has keys of its
own, because a launcher's store outlives a restart and keeps the addresses of dead ranks. Nothing is pickled: torch's
collectives for objects are not used.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from coterie.errors import ConfigError, RankError
from coterie.ranks.pulse import Pulse
from coterie.ranks.ranks import (
    Alone,
    Ranks,
    check_failed,
    check_groups,
    last_words,
    outcome,
    ranks_or_alone,
    read_outcomes,
)
from coterie.ranks.ways import LONGEST, Ways, Work, between_gpus, own_gpu

_JOINED = count()
_RAISED_BY_ALL = "coterie_raised_by_all"
"""On an error: the ranks that have all raised it, at one step."""


class ProcessRanks(Ranks):
    """Ranks that are processes; `join_ranks` makes it.

    Args:
        rank, world: see `Ranks`.
        connect: makes a connection to the store; every call a new one.
        keeps_store: the store is this process's own.
        patience_s: a rank is silent whose pulse stood still for so long.

    Attributes:
        between_gpus: how tensors of GPUs travel; see `coterie.ranks.ways.between_gpus`.
    """

    def __init__(
        self, rank: int, world: int, connect: Callable[[], Store], keeps_store: bool, patience_s: float
    ) -> None:
        self.rank, self.world = rank, world
        self._store, self._keeps_store = connect(), keeps_store
        self._pulse_store = self._store
        self._pulse = Pulse(connect(), rank, patience_s)
        self._step = 0
        self._left = False
        own_group = not distributed.is_initialized()
        if own_group:
            distributed.init_process_group(
                "gloo", store=PrefixStore("gloo", self._store), rank=rank, world_size=world, timeout=LONGEST
            )
        self._own_group = own_group
        self._members: Sequence[int] = range(world)
        self._splits = count()
        host = distributed.group.WORLD if own_group else _new_group(range(world), "gloo")
        self.between_gpus = between_gpus(self.together("which GPU each rank has", own_gpu))
        self._ways = self._ways_of(range(world), host)
        self._all_ways = [self._ways]

    def together(self, step: str, make: Callable[[], Any], *, patient: bool = False) -> list[Any]:
        packed, failure = outcome(step, make)
        if failure is not None and failure.__dict__.get(_RAISED_BY_ALL) is self:
            raise failure  # at a step inside this one, and all ranks have left both
        found = self._swapped(step, packed, patient)
        try:
            return read_outcomes(step, found, self.rank, failure)
        except Exception as error:
            error.__dict__[_RAISED_BY_ALL] = self
            raise

    def add_up(self, pieces: Sequence[Tensor], owner: int) -> None:
        for some in _at_once(pieces):
            flat = torch.cat([piece.reshape(-1) for piece in some])
            self._wait_for_work("adding up", partial(self._ways.add_up, flat, owner))
            if self.rank == owner:
                _put_back(flat, some)

    def hand_out(self, pieces: Sequence[Tensor], owner: int) -> None:
        for some in _at_once(pieces):
            flat = torch.cat([piece.reshape(-1) for piece in some])
            self._wait_for_work("handing out", partial(self._ways.hand_out, flat, owner))
            if self.rank != owner:
                _put_back(flat, some)

    def gather(self, own: Tensor) -> list[Tensor]:
        own = own.contiguous()
        found = [torch.empty_like(own) for _ in range(self.world)]
        self._wait_for_work("gathering", lambda: self._ways.gather(found, own), joint=True)
        return found

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        arrived = rows.new_empty(sum(receive), *rows.shape[1:])
        rows = rows.contiguous()
        self._wait_for_work("exchanging rows", lambda: self._ways.exchange(arrived, rows, send, receive), joint=True)
        return arrived

    def check_others(self) -> None:
        with _store_stays("looking at the others"):
            self._ahead()

    def split(self, size: int) -> tuple[Ranks, Ranks]:
        check_groups(self.world, size)
        number = next(self._splits)
        neighbours = [range(first, first + size) for first in range(0, self.world, size)]
        alike = [range(place, self.world, size) for place in range(size)]
        found: list[Ranks] = []
        for kind, groups in (("group", neighbours), ("replica", alike)):
            for each, members in enumerate(groups):
                ways = self._ways_of(members, _new_group(members, "gloo"))  # every rank makes all, in this order
                if self.rank in members:
                    self._all_ways.append(ways)
                    store = PrefixStore(f"{kind}/{number}/{each}", self._store)
                    found.append(self._some(members, ways, store) if len(members) > 1 else Alone())
        return found[0], found[1]

    def _ways_of(self, members: Sequence[int], host: Any) -> Ways:
        return Ways(host, _new_group(members, "nccl") if self.between_gpus == "nccl" else None)

    def _some(self, members: range, ways: Ways, store: Store) -> Ranks:
        ahead = partial(self._ahead, members)
        return SomeRanks(members.index(self.rank), members, ways, store, (self._store, self._pulse), ahead)

    def close(self, failure: BaseException | None = None) -> None:
        if self._left:
            return
        self._left = True
        try:
            if failure is not None:
                self._store.set(self._key(self.rank), last_words("the end", failure))
            else:
                self._swapped("the end", outcome("the end", lambda: None)[0])
                self._store.set(f"left/{self.rank}", "1")
                if self._keeps_store:
                    left = [f"left/{rank}" for rank in range(self.world)]
                    self._wait("the end", lambda: self._store.check(left))
        except RuntimeError:  # the store went with the rank that kept it
            pass
        finally:
            self._pulse.close()
            for ways in self._all_ways:
                ways.leave(failed=failure is not None)
            if self._own_group:
                distributed.destroy_process_group()

    # -- small values ------------------------------------------------------------------------------------------------

    def _swapped(self, step: str, own: str, patient: bool = False) -> list[bytes]:
        """What every rank put down at this step."""
        keys = [self._key(rank) for rank in range(self.world)]
        with _store_stays(step):
            self._store.set(keys[self.rank], own)
            self._wait(
                step,
                lambda: self._store.check(keys),
                self._looking_beside(step),
                here=lambda rank: self._store.check([keys[rank]]),
                longest_s=math.inf if patient else LONGEST.total_seconds(),
            )
            found = [self._store.get(key) for key in keys]
            if self._step:  # every rank has put down this step, so none reads the one before it any more
                self._store.delete_key(f"step/{self._step - 1}/{self.rank}")
        self._step += 1
        return found

    def _looking_beside(self, step: str) -> Callable[[], None]:
        """To be called now and then while others have not put down a step: whoever fails puts that down here, too."""
        return lambda: None

    def _key(self, rank: int) -> str:
        return f"step/{self._step}/{rank}"

    # -- tensors -----------------------------------------------------------------------------------------------------

    def _wait_for_work(self, step: str, begin: Callable[[], Work], joint: bool = False) -> None:
        """Begin a collective and wait for it; a ``joint`` one ends at no rank before all have begun it."""
        try:
            work = begin()
            self._wait(step, work.is_completed, self._looking_ahead(step, joint, self._ahead))
            work.wait()
        except RuntimeError as error:
            self._ahead()
            raise RankError(
                f"tensors could not be exchanged with another rank: {str(error).splitlines()[0]}",
                code="ranks-exchange",
                where=step,
                why="a rank ended, or the connection between two was cut",
                fix="look at the other ranks' messages, then resume the run",
            ) from error

    def _ahead(self, among: Iterable[int] | None = None) -> list[int]:
        """Ranks, of all or among some, that are at the next step already; raises what one failed with, if one did."""
        others = (rank for rank in (range(self.world) if among is None else among) if rank != self.rank)
        ahead = [rank for rank in others if self._store.check([self._key(rank)])]
        for rank in ahead:
            check_failed(self._members[rank], self._store.get(self._key(rank)))
        return ahead

    def _looking_ahead(self, step: str, joint: bool, find: Callable[[], list[int]]) -> Callable[[], None]:
        """To be called now and then while a collective lasts; ``find`` gives the ranks that are ahead.

        A rank that has failed takes no part in it. Neither does one that has long been behind a joint one: it ran
        the model less often.
        """
        since: float | None = None

        def look() -> None:
            nonlocal since
            ahead = find()
            since = (since or time.monotonic()) if ahead else None
            if joint and since is not None and time.monotonic() - since > self._pulse.patience_s:
                raise RankError(
                    f"rank {self._members[ahead[0]]} has gone on, and rank {self._members[self.rank]} waits for it.",
                    code="ranks-out-of-step",
                    where=step,
                    why="where experts are spread over ranks, all have to run the model equally often",
                    fix="call the model and the session's methods at every rank, in the same order",
                )

        return look

    def _wait(
        self,
        step: str,
        arrived: Callable[[], bool],
        look: Callable[[], None] = lambda: None,
        here: Callable[[int], bool] = lambda rank: False,
        longest_s: float = LONGEST.total_seconds(),
    ) -> None:
        """Wait until something has arrived, while those who are not ``here`` are alive; ``look`` now and then."""
        pause, until = 0.0002, time.monotonic() + longest_s
        self._pulse.looked_away()
        while not arrived():
            time.sleep(pause)
            pause = min(1.5 * pause, 0.02)
            others = (self._members[rank] for rank in range(self.world) if rank != self.rank and not here(rank))
            if self._pulse.check(self._pulse_store, others, step):
                look()
            if time.monotonic() > until:
                raise RankError(
                    f"another rank did not get to `{step}` within {LONGEST}.",
                    code="ranks-late",
                    why="it lives, but does something else",
                    fix="look at the other ranks' messages, then resume the run",
                )


class SomeRanks(ProcessRanks):
    """Some of the ranks, which do things together between two steps of all; `ProcessRanks.split` makes it.

    Args:
        rank: this one's place among them.
        members: their numbers among all, ascending.
        ways: of these, for tensors.
        store: of their own, for small values.
        signs: the store of all ranks and this one's pulse.
        ahead: those of them that are at the next step of all ranks; raises what one of them failed with. What ranks
            of other groups failed with is heard at that step: here all have begun what they exchange.
    """

    def __init__(
        self,
        rank: int,
        members: Sequence[int],
        ways: Ways,
        store: Store,
        signs: tuple[Store, Pulse],
        ahead: Callable[[], list[int]],
    ) -> None:
        self.rank, self.world = rank, len(members)
        self._members, self._ways, self._store = members, ways, store
        self._pulse_store, self._pulse = signs
        self._all_ahead = ahead
        self._step = 0

    def split(self, size: int) -> tuple[Ranks, Ranks]:
        raise RankError(
            "a group of ranks is not split again.",
            code="ranks-groups",
            why="all ranks have to take part in making groups",
            fix="split the ranks that join_ranks gave",
        )

    def close(self, failure: BaseException | None = None) -> None:
        """All ranks leave together."""

    def _ahead(self, among: Iterable[int] | None = None) -> list[int]:
        return [*super()._ahead(among), *self._beside()]

    def _beside(self) -> list[int]:
        """Those of the group that are at the next step of all ranks; raises what one of them failed with."""
        return [self._members.index(rank) for rank in self._all_ahead()]

    def _looking_beside(self, step: str) -> Callable[[], None]:
        return self._looking_ahead(step, True, self._beside)


def join_ranks(*, patience_s: float = 15.0) -> Ranks:
    """Join the processes that `torchrun` (or `devices` in train.yaml) started beside this one.

    Give the result to `make_private`: the ranks then train one model within one budget, each on its part of every
    lot. A process that nothing started beside others is `Alone`.

    Args:
        patience_s: a rank that is frozen or dead is named after so long.

    Raises:
        ConfigError: the launcher's variables are missing or no numbers.
        PrivacyError: another launcher than torchrun started several, and did not say which is which.
        RankError: the other ranks cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1").strip() in ("", "1"):
        return ranks_or_alone(None)
    rank, world, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address, attempt = os.environ.get("MASTER_ADDR", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not launchers and not distributed.is_initialized()
    prefix = f"coterie/{attempt}/{next(_JOINED)}"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        for name, value in on_loopback().items():
            os.environ.setdefault(name, value)
    kept: list[Store] = []

    def connect() -> Store:
        own = keeps and not kept
        store = TCPStore(address, port, is_master=own, timeout=timedelta(seconds=max(60.0, patience_s)),
                         wait_for_workers=False)  # fmt: skip
        kept.append(store)
        return PrefixStore(prefix, store)

    with _store_stays("joining"):
        return ProcessRanks(rank, world, connect, keeps, patience_s)


def _new_group(members: Sequence[int], backend: str) -> Any:
    if backend == "nccl":
        # A work's `wait` then raises what went wrong; else a thread of torch's would end the process unsaid.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    return distributed.new_group(list(members), backend=backend, timeout=LONGEST)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ConfigError(
            f"{name} is {os.environ.get(name)!r}, and no number.",
            code="ranks-launcher",
            why="a rank has to know which it is, of how many, and where they meet",
            fix="start the ranks with torchrun, or set `devices` in train.yaml",
        ) from None


def on_loopback() -> dict[str, str]:
    """Environment variables with which ranks of one machine listen to no other.

    Else Gloo listens on the address of the host's name, and NCCL on that of the first interface to elsewhere.
    """
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in names if name in ("lo", "lo0")), names[0])
    return {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}


@contextmanager
def _store_stays(step: str) -> Iterator[None]:
    """Turn what torch raises without a store into one sentence."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"the place where the ranks meet cannot be reached: {str(error).splitlines()[0]}",
            code="ranks-store",
            where=step,
            why="the launcher or rank 0 is gone",
            fix="look at rank 0's messages, then resume the run",
        ) from error


_AT_ONCE = 1 << 24
"""Values of one message: 64 MiB of float32."""


def _at_once(pieces: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Pieces in messages of one type and device; large ones in several, as views."""
    found: list[Tensor] = []
    for piece in (each for each in pieces if each.numel()):
        for part in torch.split(piece.view(-1), _AT_ONCE) if piece.is_contiguous() else (piece,):
            other = found and (part.dtype, part.device) != (found[0].dtype, found[0].device)
            if other or sum(each.numel() for each in found) >= _AT_ONCE:
                yield found
                found = []
            found.append(part)
    if found:
        yield found


def _put_back(flat: Tensor, pieces: Sequence[Tensor]) -> None:
    for piece, values in zip(pieces, torch.split(flat, [piece.numel() for piece in pieces]), strict=True):
        piece.copy_(values.view(piece.shape))
