"""One lock a device: several micro-batches in flight, one of them computing.

A micro-batch holds the lock while it computes and releases it while it waits for the wire. So the next one computes
during the wait, and what the model or torch keep as state of the process (the random state, the micro-batch whose
experts are being asked for) belongs to whoever holds the lock.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

import torch
from torch import Tensor

from coterie.errors import CoterieError, RoundError


class DeviceLock:
    """The right to compute. `cancel` ends what everybody who shares it is doing.

    Attributes:
        cancelled: fails as soon as `cancel` was called, so that a wait for the wire can end early: wait for it
            together with the replies.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelling = threading.Lock()
        self.cancelled: Future[None] = Future()

    def acquire(self) -> None:
        """Wait for the lock.

        Raises:
            RoundError: another micro-batch failed; the lock was not acquired.
        """
        self._lock.acquire()
        try:
            self.check()
        except RoundError:
            self._lock.release()
            raise

    def release(self) -> None:
        """Let the next one compute."""
        self._lock.release()

    def check(self) -> None:
        """Raise `RoundError` if it was cancelled."""
        if not self.cancelled.done():
            return
        cause = self.cancelled.exception()
        raise RoundError(
            "This micro-batch was stopped because another one in flight failed.",
            code="round-stopped",
            why="a round is one transaction; its other micro-batches would be thrown away",
        ) from (cause if isinstance(cause, CoterieError) else None)

    def cancel(self, error: BaseException) -> None:
        """Let every other micro-batch in flight fail with `RoundError` at its next step. The first call counts."""
        with self._cancelling:
            if not self.cancelled.done():
                self.cancelled.set_exception(error)


class RandomState:
    """The random state of one micro-batch, put in place whenever it has the lock.

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
