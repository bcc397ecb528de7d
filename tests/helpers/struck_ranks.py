"""A run with experts over ranks in which a signal strikes one of them: at a told step, or in a collective.

What leaves the mechanism is written down beside the run when a rank is about to step with it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from coterie.dp.session import PrivateSession
from coterie.ranks.processes import ProcessRanks
from coterie.ranks.ranks import Ranks
from helpers.rank_tasks import words
from helpers.spread_tasks import collated, flat, opened, prepared, scaled_loss

COLLECTIVES = ("exchange", "gather", "add_up", "hand_out")
"""What ranks do with tensors: rows, norms, sums, weights."""


class Point(NamedTuple):
    """When a rank is struck, counted from the end of the first round on.

    Attributes:
        rank: who.
        at: the name of a step, or one of `COLLECTIVES`.
        when: ``before`` it takes part, when its own part is ``done``, or after all have been ``told``.
        nth: of those of this name.
    """

    rank: int
    at: str
    when: str
    nth: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.at}, {self.when}"


def strike(ranks: Ranks, point: Point, number: int, since: str) -> None:
    """Let a signal strike this process.

    Args:
        ranks: of the run.
        point: when; of whoever else it is nothing happens.
        number: of the signal.
        since: a step; what came before it does not count.
    """
    if point.rank != ranks.rank:
        return
    armed, calls = [False], [0]

    def due(name: str) -> bool:
        calls[0] += armed[0] and name == point.at
        return armed[0] and name == point.at and calls[0] == point.nth

    def struck(when: str) -> None:
        if when == point.when:
            os.kill(os.getpid(), number)

    together = ranks.together

    def step(name: str, make: Callable[[], Any], *, patient: bool = False) -> list[Any]:
        mine = due(name)

        def made() -> Any:
            value = make()
            if mine:
                struck("done")
            return value

        if mine:
            struck("before")
        told = together(name, made, patient=patient)
        if mine:
            struck("told")
        armed[0] = armed[0] or name == since
        return told

    ranks.together = step  # type: ignore[method-assign]
    if point.at in COLLECTIVES:
        plain = getattr(ProcessRanks, point.at)

        def collective(self: Ranks, *arguments: Any) -> Any:
            mine = due(point.at)
            if mine:
                struck("before")
            found = plain(self, *arguments)
            if mine:
                struck("told")
            return found

        setattr(ProcessRanks, point.at, collective)


def note_steps(ranks: Ranks, file: Path) -> None:
    """Write down the steps that a rank comes to, before it takes part."""
    together = ranks.together

    def step(name: str, make: Callable[[], Any], *, patient: bool = False) -> list[Any]:
        with file.open("a", encoding="utf-8") as notes:
            notes.write(f"{name}\n")
        return together(name, make, patient=patient)

    ranks.together = step  # type: ignore[method-assign]


def releases_on_disk(folder: Path) -> list[tuple[int, int]]:
    """(round, draw) of what the ledger counts, as it lies there."""
    (file,) = folder.glob("ledger/*/ledger.jsonl")
    entries = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [(e["data"]["round"], e["data"]["draw"]) for e in entries if e["kind"] == "release"]


def assert_all_counted(folder: Path) -> None:
    """What a rank was about to step with is in the ledger, as it lies on the disk."""
    steps = [line for file in folder.glob("steps-*") for line in file.read_text("utf-8").splitlines()]
    left = {int(step.removeprefix("step ")) for step in steps if step.startswith("step ")}
    counted = {round_no for round_no, _ in releases_on_disk(folder)}
    assert left <= counted, f"rounds {left} were used, {counted} are counted"


def run(ranks: Ranks, folder: Path, point: Point | None = None, number: int = signal.SIGKILL) -> dict[str, Any]:
    """Three rounds with a checkpoint before the first and after each, begun or gone on with."""
    folder.mkdir(exist_ok=True)
    note_steps(ranks, folder / f"steps-{ranks.rank}")
    if point is not None:
        strike(ranks, point, number, "saved after round 1")
    saved = folder / "saved"
    if (saved / "manifest.json").exists():
        model, optimizer = prepared(ranks, spread=True)
        session = PrivateSession.resume(
            saved, model, optimizer, words(), collated, scaled_loss, ledger=folder / "ledger", ranks=ranks
        )
    else:
        session = opened(ranks, folder)
        session.save(saved)
    with session:
        for lot in session:
            session.step(lot)
            session.save(saved)
        return {"weights": flat(ranks, session.model)}
