"""Ending on request: cleanly where there is time, within seconds in any case, and when the starting process does.

SIGTERM (a service manager, ``docker stop``) and a second Ctrl-C leave no more than `LAST_S` seconds. Checkpoints,
ledgers and journals are whole or absent at every moment, so what was saved stays good.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import typer

from coterie.demonstration.processes import LIFELINE

LAST_S = 4.0
"""From a request that leaves no choice to the end."""


@contextmanager
def stop_signals(ask: Callable[[], bool], *, bounded: bool = True, quiet: bool = False) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or closed terminal asks for a clean end after the round; a second one interrupts.

    Args:
        ask: False when there is nothing to end cleanly yet; then the first one interrupts, too.
        bounded: SIGTERM leaves `LAST_S` seconds, as a second request always does. Otherwise a round may be finished
            however long it takes: nobody else waits for it.
        quiet: another process says that it is stopping.
    """
    asked, ended = False, threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not ask():
            end_within(LAST_S, number, ended)
            raise KeyboardInterrupt
        asked = True
        if bounded and number != signal.SIGINT:
            end_within(LAST_S, number, ended)
            text = f"stopping: after this round, or in {LAST_S:.0f} s with what was saved"
        else:
            text = "stopping after this round; Ctrl-C again ends at once"
        if not quiet:
            typer.echo(text, file=sys.stderr)

    with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handle)):
        try:
            yield
        finally:
            ended.set()


@contextmanager
def handling(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Signal handlers for a while. Only the main thread can have any; elsewhere this does nothing.

    A closed terminal that is ignored (``nohup``) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    wanted = {number: handler for number, handler in handlers.items() if not (ignored and number == signal.SIGHUP)}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_on_request() -> Iterator[None]:
    """Let SIGTERM end a command from its first moment on; commands with something to finish replace this.

    The first process of a container gets no signal that it does not handle, so without this one that comes while
    libraries are being loaded would be lost.
    """

    ended = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        end_within(LAST_S, number, ended)
        raise SystemExit(128 + number)

    follow_parent()
    with handling({signal.SIGTERM: leave}):
        try:
            yield
        finally:
            ended.set()


def end_within(seconds: float, number: int, ended: threading.Event) -> None:
    """End this process after ``seconds``, as one that signal ``number`` ended, unless ``ended`` is set by then."""

    def wait() -> None:
        if not ended.wait(seconds):
            typer.echo("ending now, with what was saved", file=sys.stderr)
            os._exit(128 + number)

    threading.Thread(target=wait, name="end-within", daemon=True).start()


def follow_parent() -> None:
    """Where a parent named a lifeline, end when it does, however it does.

    The parent holds the pipe's other end; the system closes that when the parent is gone, also after ``kill -9``.
    """
    named = os.environ.pop(LIFELINE, None)
    if named is None:
        return
    lifeline = int(named)
    os.set_inheritable(lifeline, False)

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(lifeline, 1):
                pass
        end_within(LAST_S, signal.SIGTERM, threading.Event())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
