"""Progress with the time since the start: a line that is replaced on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import sys
import time

import typer

from coterie.cli.output import error_console

EVERY_S = 10.0
"""Where nothing can be replaced, progress is printed this often."""


class TimedScreen:
    """The demo's `Screen`, on standard error."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._live = sys.stderr.isatty()
        self._head = ""
        self._shown = ""
        self._last = self._began

    def phase(self, number: int, of: int, name: str) -> None:
        """The next line begins with the phase; those after it are indented."""
        self._head = f"{number}/{of} {name}"
        self._last = time.monotonic()

    def line(self, text: str) -> None:
        """A line that stays."""
        self._erase()
        head = f"{self._head:<18} " if self._head else ""
        typer.echo(f"{self._time()}  {head}{text}", file=sys.stderr)
        self._head = " " if self._head else ""

    def progress(self, text: str) -> None:
        """A line that the next one replaces."""
        now = time.monotonic()
        if not self._live:
            if now - self._last >= EVERY_S:
                self._last = now
                self.line(text)
            return
        shown = f"{self._time()}  {self._head:<18} {text}"[: error_console().width - 1]
        if shown != self._shown:
            sys.stderr.write(f"\r\x1b[K{shown}")
            sys.stderr.flush()
            self._shown = shown

    def _erase(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            self._shown = ""

    def _time(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"{seconds // 60}:{seconds % 60:02d}"
