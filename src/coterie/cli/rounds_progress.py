"""What `coterie coordinator` and `coterie up` show while rounds go by. Nothing in it comes from data."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import typer

from coterie.cli.output import Advance, progress
from coterie.cli.streams import KeptOnFileHandler
from coterie.revision import software
from coterie.storage import writing

SILENT_S = 3.5


class Progressing(Protocol):
    """The fields of `federation.rounds.state.State` that are shown."""

    @property
    def phase(self) -> str: ...
    @property
    def round(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def committed(self) -> int: ...
    @property
    def note(self) -> str: ...


class RoundLines:
    """Shows rounds as they are committed, and every event that is not routine."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._stack = ExitStack()
        self._advance: Advance | None = None
        self._shown = 0
        self._said = ""
        self._remark = ""
        self._silence_said = 0.0

    def __enter__(self) -> RoundLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._stack.close()

    def show(
        self,
        state: Progressing,
        missing: Collection[str],
        left_s: float | None = None,
        refused: Mapping[str, str] | None = None,
        spent: str = "",
        remark: str = "",
        cut: Collection[tuple[str, str]] = (),
        busy: Collection[str] = (),
    ) -> None:
        """Tell what changed; ``spent`` stands beside each round, ``remark`` is said once.

        Args:
            state: where the run stands.
            missing: parties that are not here.
            left_s: seconds until the run ends for want of them.
            refused: error codes of parties that were turned away, by name.
            spent: stands beside each round.
            remark: said once.
            cut: pairs of parties without a connection.
            busy: parties that have not done yet what was asked.
        """
        if remark and remark != self._remark:
            self._remark = remark
            self._line(remark)
        for name, code in (refused or {}).items():
            self._say(f"{name} was turned away: {code}", key=f"{name}{code}")
        awaited = [*sorted(missing), *(f"a connection between {one} and {other}" for one, other in sorted(cut))]
        if state.phase in ("gather", "restore"):
            awaited += [f"{name} ({state.phase} of round {state.round})" for name in sorted(busy)]
        if awaited:
            left = f", {left_s:.0f} s left" if left_s is not None else ""
            reason = f" ({state.note})" if state.note else ""
            self._line(f"waiting for {', '.join(awaited)}{left}{reason}")
        elif state.note and state.phase in ("gather", "restore", "end"):
            self._say(f"{state.note}" if state.phase != "restore" else f"restoring {state.note}", key=state.note)
        if state.committed < self._shown:
            self._stack.close()
            self._advance, self._shown = None, 0
        if state.committed > self._shown:
            if self._advance is None:
                done = state.committed - 1
                self._advance = self._stack.enter_context(progress("round", self._rounds, done=done))
                self._shown = done
            again = f"attempt {state.attempt}" if state.phase == "step" and state.attempt > 1 else ""
            self._advance("  ".join(part for part in (spent, again) if part), steps=state.committed - self._shown)
            self._shown = state.committed

    def silence(self, seconds: float) -> None:
        """Tell a party's user when the coordinator has fallen silent, now and then how long, and when it is back."""
        if seconds < SILENT_S:
            if self._silence_said:
                self._line("the coordinator is back")
            self._silence_said = 0.0
        elif seconds >= 2 * self._silence_said:
            self._silence_said = seconds
            self._line(f"waiting for the coordinator, which has been silent for {seconds:.0f} s")

    def _say(self, text: str, key: str) -> None:
        if key != self._said:
            self._said = key
            self._line(text)

    def _line(self, text: str) -> None:
        typer.echo(text, file=sys.stderr)


@contextmanager
def log_file(folder: Path) -> Iterator[logging.Logger]:
    """Warnings of connections, rounds and errors go to ``coterie.log`` in the run folder instead of the screen."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handler = KeptOnFileHandler(folder / "coterie.log", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger("coterie")
    before = log.propagate, log.level
    log.addHandler(handler)
    log.propagate, log.level = False, logging.INFO
    log.info("coterie %(coterie)s, revision %(revision)s", software())
    try:
        yield log
    finally:
        log.removeHandler(handler)
        log.propagate, log.level = before
        handler.close()
