"""Taking turns on one device: several micro-batches in flight, one of them computing.

A micro-batch holds the turn while it computes and hands it on while it waits for the wire. So the next one computes
during the wait, and what the model or torch keep as state of the process (the random state, the micro-batch whose
experts are being asked for) belongs to whoever holds the turn.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

import torch
from torch import Tensor

from coterie.errors import CoterieError, RoundError


class Turn:
    """The right to compute. `stop` ends the work of everybody who shares it.

    Attributes:
        stopped: fails as soon as `stop` was called, so that a wait for the wire can end early: wait for it together
            with the replies.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopping = threading.Lock()
        self.stopped: Future[None] = Future()

    def take(self) -> None:
        """Wait for the turn.

        Raises:
            RoundError: another micro-batch failed; the turn was not taken.
        """
        self._lock.acquire()
        try:
            self.check()
        except RoundError:
            self._lock.release()
            raise

    def give(self) -> None:
        """Hand the turn on."""
        self._lock.release()

    def check(self) -> None:
        """Raise `RoundError` if the work was stopped."""
        if not self.stopped.done():
            return
        cause = self.stopped.exception()
        raise RoundError(
            "This micro-batch was stopped because another one in flight failed.",
            code="round-stopped",
            why="a round is one transaction; its other micro-batches would be thrown away",
        ) from (cause if isinstance(cause, CoterieError) else None)

    def stop(self, error: BaseException) -> None:
        """Let every other micro-batch in flight fail with `RoundError` at its next step. The first call counts."""
        with self._stopping:
            if not self.stopped.done():
                self.stopped.set_exception(error)


class RandomState:
    """The random state of one micro-batch, put in place whenever it has the turn.

    Without it, dropout masks would depend on which micro-batch happened to compute first.
    """

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._mine: tuple[Tensor, list[Tensor]] | None = None
        self._outer: tuple[Tensor, list[Tensor]] | None = None

    def enter(self) -> None:
        """Put this state in place and remember the one that was there."""
        self._outer = _random_state()
        if self._mine is None:
            assert self._seed is not None
            torch.manual_seed(self._seed)
        else:
            _set_random_state(self._mine)

    def leave(self) -> None:
        """Remember this state and put the other one back."""
        self._mine = _random_state()
        assert self._outer is not None
        _set_random_state(self._outer)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    on_devices = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_devices else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
