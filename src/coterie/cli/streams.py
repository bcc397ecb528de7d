"""Printing that never reaches into the work: output that cannot be written is dropped, once, and said once elsewhere.

A reader may go away (``coterie up ... | tee log`` and Ctrl-C ends tee first), a terminal be closed, a disk be full.
The run goes on, and what it was asked to write (``--json``) is written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer


class KeptOn:
    """A text stream that stops writing at the first error instead of raising it.

    Args:
        stream: standard output or standard error.
        name: what it is called in words.
        tell: gets one sentence when it is given up.
    """

    def __init__(self, stream: TextIO, name: str, tell: Callable[[str], None]) -> None:
        self._stream, self._name, self._tell = stream, name, tell
        self._lost = False

    def write(self, text: str) -> int:
        if not self._lost:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a terminal of another encoding: a mark in place of what it cannot show
                encoding = self._stream.encoding or "ascii"
                return self.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = True
        # What is still buffered would raise again when Python ends; it goes nowhere instead.
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self._tell(f"{self._name} cannot be written any more ({reason}); going on without it")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_output() -> Iterator[None]:
    """Inside, neither standard stream can end the work.

    Descriptors 0 to 2 that were closed from the start are opened on nothing: the next file that is opened would get
    their number, and libraries would print into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    output, errors = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115 - as long as the process
    log = logging.getLogger("coterie")

    def tell_errors(text: str) -> None:
        typer.echo(text, file=sys.stderr)

    sys.stdout = KeptOn(output, "standard output", tell_errors)
    sys.stderr = KeptOn(errors, "standard error", log.warning)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class KeptOnFileHandler(logging.FileHandler):
    """A log file that is given up, and said once on standard error, when it cannot be written."""

    _lost = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._lost:
            try:
                super().emit(record)
            except OSError:
                self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._lost = True
        with contextlib.suppress(OSError):  # what is left in its buffer has nowhere to go
            self.close()
        reason = error.strerror or type(error).__name__
        text = f"the log {self.baseFilename} cannot be written any more ({reason}); going on without it"
        typer.echo(text, file=sys.stderr)
