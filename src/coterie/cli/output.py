"""Everything commands print: figures on standard output, errors and progress on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from coterie.errors import ConfigError, CoterieError
from coterie.storage import write_whole

EXIT_ERROR = 1
EXIT_STOPPED = 5
"""A run was stopped cleanly before its last round: started again it goes on. (3 and 4 are an audit's.)"""


def console() -> Console:
    """Standard output; lines are not wrapped when it is a file or a pipe.

    Emoji codes are off, here and below: the ``:AB:`` of a fingerprint would be printed as a picture.
    """
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False, emoji=False)


def error_console() -> Console:
    """Standard error, for progress and errors."""
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False, emoji=False)


def say(text: str = "") -> None:
    """One plain line (no markup is read in it)."""
    console().print(escape(text))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """Print rows under their column names; columns whose cells are all numbers are aligned right.

    On a terminal it has rules and fits the width, elsewhere columns are separated by two spaces.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(_is_number(row[index]) for row in rows) for index in range(len(columns))]
    if not sys.stdout.isatty():
        widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
        if title:
            typer.echo(title, file=sys.stdout)
        for line in [list(columns), *cells]:
            padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)]
            typer.echo("  ".join(padded).rstrip(), file=sys.stdout)
        return
    shown = Table(title=title, title_justify="left")
    for name, right in zip(columns, numeric, strict=True):
        shown.add_column(name, justify="right" if right else "left")
    for line in cells:
        shown.add_row(*[escape(cell) for cell in line])
    console().print(shown)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or value is None


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: str | Path, data: Any) -> None:
    """Write figures as JSON, whole or not at all. A number that is not finite becomes null.

    A link stays one, and what is no ordinary file (a pipe, ``/dev/null``) is written to, not replaced.
    """
    path = Path(path)
    text = json.dumps(_finite(data), indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (not path.is_file() or path.is_relative_to("/dev") or path.is_relative_to("/proc")):
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:  # of a pipe whose reader is gone, it does not say which
            raise OSError(error.errno, error.strerror, str(path)) from error
        return
    write_whole(path.resolve(), text.encode())


def check_writable(path: Path) -> None:
    """Make sure, before the work, that `write_json` will be able to write there.

    Raises:
        ConfigError: it will not.
    """
    place = path.resolve()
    near = next(each for each in (place, *place.parents) if each.exists())  # folders on the way are made
    folder = near.is_dir()
    if (folder and near == place) or (near != place and not folder) or not os.access(near, os.W_OK):
        raise ConfigError(
            f"The figures cannot be written to {path}: {near} is {'a folder' if near == place else 'no folder'}."
            if os.access(near, os.W_OK)
            else f"The figures cannot be written to {path}: {near} is closed to you.",
            code="option-json",
            where="--json",
            why="it would be noticed only after the work",
            fix="name a file in a folder that you may write to",
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Advance(Protocol):
    """Call it after each step: ``advance("loss 2.31")``; ``steps`` when more than one was made."""

    def __call__(self, note: str = "", *, steps: int = 1) -> None: ...


@contextmanager
def progress(description: str, total: int, *, done: int = 0, lines: int = 20) -> Iterator[Advance]:
    """Show how far a loop is: a bar on a terminal, otherwise about ``lines`` plain lines over the whole length."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=error_console()) as bars:
            task = bars.add_task(escape(description), total=total, completed=done, note="")

            def move(note: str = "", *, steps: int = 1) -> None:
                bars.update(task, advance=steps, note=escape(note))

            yield move
        return
    every = max(1, total // lines)
    count = done

    def line(note: str = "", *, steps: int = 1) -> None:
        nonlocal count
        before, count = count, count + steps
        if count // every > before // every or count >= total:
            typer.echo(f"{description} {count}/{total}  {note}".rstrip(), file=sys.stderr)

    yield line


def fail(error: CoterieError) -> NoReturn:
    """Print the error's four lines on standard error and end the command with exit code 1."""
    show_error(error)
    raise typer.Exit(EXIT_ERROR)


def show_error(error: CoterieError) -> None:
    """Print the error's four lines on standard error."""
    shown = error_console()
    shown.print(f"[bold red]Error[/] [bold]{escape(error.code)}[/]: {escape(error.message)}")
    for name, text in error.details():
        if text:
            shown.print(f"  [dim]{name:<6}[/] {escape(text)}")


def size(amount: int) -> str:
    """Bytes, to three digits."""
    value = float(amount)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def big(count: int) -> str:
    """A number of parameters, to three digits."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count)
