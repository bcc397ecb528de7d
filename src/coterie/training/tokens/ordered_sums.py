"""Sums of gradients that do not depend on who came first.

Gradients are added parameter by parameter, in the order of the micro-batches, and not kept per micro-batch. A
micro-batch in flight usually runs a layer's backward after its predecessor did, so its share is added at once and
only one sum exists; a share that comes early (a tied embedding's, mostly) waits. Separate buffers would cost one more
copy of the trunk's gradients for every micro-batch in flight; letting a backward wait for its predecessor's would
cost time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


class OrderedSums:
    """Adds up the trunk gradients of the micro-batches of a round. Not locked: call it under a `DeviceLock`."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._next_number: dict[Tensor, int] = defaultdict(int)
        self._to_come: dict[int, dict[Tensor, int]] = {}
        self._early: dict[Tensor, dict[int, list[Tensor]]] = defaultdict(dict)

    def sink(self, number: int) -> _Sink:
        """Where the gradients of one micro-batch go; a `GradientSink`."""
        return _Sink(self, number)

    def result(self) -> dict[Tensor, Tensor]:
        """The sums, when all micro-batches are through."""
        assert not self._early, "a micro-batch has not been run backward"
        return self._sums

    def expect(self, number: int, visits: Mapping[Tensor, int]) -> None:
        """How many shares of each parameter a micro-batch will bring; one that is not named gets none."""
        self._to_come[number] = dict(visits)
        for parameter in list(self._early):
            self._settle(parameter)

    def add(self, number: int, parameter: Tensor, grad: Tensor | None) -> None:
        """One share of one micro-batch."""
        self._settle(parameter)
        self._to_come[number][parameter] -= 1
        if grad is None:
            pass
        elif self._next_number[parameter] == number:
            self._add(parameter, grad)
        else:
            self._early[parameter].setdefault(number, []).append(grad)
        self._settle(parameter)

    def _settle(self, parameter: Tensor) -> None:
        """Go on to the next micro-batch from those that have nothing more for it."""
        early = self._early.get(parameter, {})
        while True:
            number = self._next_number[parameter]
            for grad in early.pop(number, ()):
                self._add(parameter, grad)
            if number not in self._to_come or self._to_come[number].get(parameter, 0) > 0:
                break
            self._next_number[parameter] = number + 1
        if not early:
            self._early.pop(parameter, None)

    def _add(self, parameter: Tensor, grad: Tensor) -> None:
        if parameter in self._sums:
            self._sums[parameter] += grad
        else:  # a copy: autograd may have given the same memory to another parameter
            self._sums[parameter] = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)


class _Sink:
    def __init__(self, sums: OrderedSums, number: int) -> None:
        self._sums, self._number = sums, number

    def expect(self, visits: Mapping[Tensor, int]) -> None:
        self._sums.expect(self._number, visits)

    def add(self, parameter: Tensor, grad: Tensor | None) -> None:
        self._sums.add(self._number, parameter, grad)
