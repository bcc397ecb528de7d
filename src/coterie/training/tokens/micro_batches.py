"""Runs the micro-batches of a round, a few of them in flight, and adds up what they yield in their order.

While one micro-batch waits for the wire, the next one computes: threads that share a `DeviceLock`. Which of them gets
where first depends on chance, the result does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from coterie.federation.cancel import cancelled_round
from coterie.models.cut.cut_model import Cut, RowsExchange
from coterie.models.cut.device_lock import DeviceLock
from coterie.training.seeds import derived_seed
from coterie.training.tokens.ordered_sums import OrderedSums

Batch = TypeVar("Batch")

MakeExchange = Callable[[int, "Future[None]"], RowsExchange]
"""``make(number, cancelled)``: the exchange of one micro-batch; its waits should end when ``cancelled`` is done."""


@dataclass(frozen=True)
class RoundSums:
    """What the micro-batches of a round add up to.

    Attributes:
        losses: of each micro-batch, nats, summed over its tokens.
        tokens: of all of them.
        gradients: the trunk's, summed over micro-batches; float32 where the parameter is narrower. A parameter that
            no loss depends on is missing.
    """

    losses: tuple[float, ...]
    tokens: int
    gradients: dict[Tensor, Tensor]


class Scheduler(Generic[Batch]):
    """Runs micro-batches through a cut model.

    Args:
        cut: the model.
        loss: the summed loss of a micro-batch (scalar) and its number of tokens. Called while it holds the device,
            on one of ``in_flight`` threads; contexts of the calling thread (autocast) do not reach it.
        in_flight: micro-batches at once; 1 runs them one after the other in the calling thread.
    """

    def __init__(self, cut: Cut, loss: Callable[[Batch], tuple[Tensor, int]], in_flight: int = 2) -> None:
        assert in_flight >= 1
        self._cut, self._loss, self._in_flight = cut, loss, in_flight

    def run(self, batches: Sequence[Batch], exchange: MakeExchange, *, seed: int | None = None) -> RoundSums:
        """Forward and backward of all micro-batches. No parameter and no ``.grad`` is touched.

        Args:
            batches: the micro-batches, in their order.
            exchange: makes the exchange of each micro-batch; they are numbered from 0.
            seed: makes dropout and router noise repeatable whatever the timing; None: the process's random state.

        Returns:
            The same bits for the same batches and expert answers, whatever the timing.

        Raises:
            Exception: the first that a micro-batch raised. The others were cancelled.
            RoundError: `cancel` was called.
        """
        lock = self._cut.device_lock = DeviceLock()
        task = _Task(self._cut, self._loss, batches, exchange, seed, lock)
        if self._in_flight == 1:
            task()
        else:
            threads = [
                threading.Thread(target=task, name=f"micro-batches-{number}", daemon=True)
                for number in range(min(self._in_flight, len(batches)))
            ]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            except BaseException as error:  # Ctrl-C while waiting
                lock.cancel(error)
                for thread in threads:
                    if thread.ident is not None:
                        thread.join()
                raise
        if lock.cancelled.done():
            lock.cancelled.result()  # raises what it was cancelled with
        return RoundSums(tuple(task.losses), sum(task.tokens), task.sums.result())

    def cancel(self) -> None:
        """Make a running `run` raise soon. Can be called from any thread; returns at once."""
        self._cut.device_lock.cancel(cancelled_round())


class _Task(Generic[Batch]):
    """What each thread runs: the next micro-batch, until there is none or something failed."""

    def __init__(
        self,
        cut: Cut,
        loss: Callable[[Batch], tuple[Tensor, int]],
        batches: Sequence[Batch],
        exchange: MakeExchange,
        seed: int | None,
        lock: DeviceLock,
    ) -> None:
        self._cut, self._loss, self._exchange, self._seed, self._device_lock = cut, loss, exchange, seed, lock
        self._left = list(enumerate(batches))[::-1]
        self._lock = threading.Lock()
        self.losses, self.tokens = [0.0] * len(batches), [0] * len(batches)
        self.sums = OrderedSums()

    def __call__(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._left:
                        return
                    number, batch = self._left.pop()
                self._run(number, batch)
        except BaseException as error:
            self._device_lock.cancel(error)

    def _run(self, number: int, batch: Batch) -> None:
        seed = None if self._seed is None else derived_seed(self._seed, number)
        with self._cut.record(self._exchange(number, self._device_lock.cancelled), seed=seed) as tape:
            loss, self.tokens[number] = self._loss(batch)
            tape.backward(loss, self.sums.sink(number))
            self.losses[number] = float(loss.detach())
