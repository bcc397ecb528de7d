"""Ranks in processes of their own, as a launcher starts them; one server imports torch for all of them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

import helpers.rank_tasks as rank_tasks
from coterie import dp
from coterie.ranks.ranks import Ranks

Task = Callable[..., Any]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["helpers.rank_server"])


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        value: what its task gave.
        error: what it raised, as text with the code in front.
        exit: of its process; negative where a signal ended it.
    """

    value: Any
    error: str | None
    exit: int | None


def run_ranks(
    world: int,
    task: Task,
    *arguments: Any,
    attempt: int = 0,
    patience_s: float = 30.0,
    kill_s: float = 60.0,
    join: bool = True,
    frozen: int | None = None,
) -> list[Ended]:
    """Run a task of `rank_tasks` as so many ranks, and wait for all of them.

    Args:
        world: number of ranks; 1: a process that is alone.
        task: called with the ranks and the arguments.
        arguments: picklable.
        attempt: how often the launcher has started them before.
        patience_s: see `join_ranks`.
        kill_s: a rank that has not ended so long after the one before it is killed.
        join: join the ranks for the task; else it is called with the arguments alone.
        frozen: a rank that will never end by itself: the others are heard for `kill_s`, and then it is killed.
    """
    _start_server()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    variables = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RESTART_COUNT": str(attempt), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    started = []
    for rank in range(world):
        here, there = SERVER.Pipe()
        process = SERVER.Process(
            target=_be_rank,
            args=(
                variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                patience_s if join else None,
                there,
                task,
                arguments,
            ),
        )
        process.start()
        there.close()
        started.append((process, here))
    said: dict[int, tuple[Any, str | None]] = {}
    for rank, (_, here) in enumerate(started):  # all are heard before any is waited for: they leave together
        if rank != frozen:
            patient, said[rank] = frozen is None and not said, (None, None)
            with suppress(EOFError):
                if patient or here.poll(kill_s):
                    said[rank] = here.recv()
    if frozen is not None:
        started[frozen][0].kill()
    ended = []
    for rank, (process, _) in enumerate(started):
        value, error = said.get(rank, (None, None))
        process.join(timeout=kill_s)
        if process.is_alive():
            process.kill()
            process.join()
        ended.append(Ended(value, error, process.exitcode))
    return ended


def _start_server() -> None:
    """Start what ranks are forked from. It finds the helpers by the environment alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), before)))
    try:
        ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def values(ended: Sequence[Ended]) -> list[Any]:
    """What the ranks' tasks gave; none may have failed."""
    for rank, each in enumerate(ended):
        assert each.error is None, f"rank {rank}: {each.error}"
        assert each.exit == 0, f"rank {rank} ended with {each.exit}"
    return [each.value for each in ended]


def _be_rank(
    variables: dict[str, str], patience_s: float | None, told: Connection, task: Task, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(variables)
    rank_tasks.quiet()
    try:
        ranks: Ranks
        if patience_s is None:
            told.send((task(*arguments), None))
            return
        with dp.join_ranks(patience_s=patience_s) as ranks:
            told.send((task(ranks, *arguments), None))
    except Exception as error:
        told.send((None, f"{getattr(error, 'code', '-')}: {error}\n{traceback.format_exc()}"))
