"""Gradients of one round, gathered until the round commits.

Sums do not depend on when messages arrive: a party's micro-batches are added in their order, and parties in roster
order. A micro-batch that is early waits. Nothing here is on the accelerator.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.errors import RoundError

Gradients = Mapping[str, Tensor]


@dataclass
class _LayerStage:
    """One layer's running sum, and the micro-batches that are not in it yet."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    next: int = 0
    open: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    early: dict[int, list[Gradients]] = field(default_factory=lambda: defaultdict(list))

    def settle(self) -> None:
        """Add every micro-batch whose turn has come."""
        while self.open.get(self.next) == 0:
            for gradients in self.early.pop(self.next, []):
                self.add(gradients)
            del self.open[self.next]
            self.next += 1
            if self.open.get(self.next, 0) > 0:  # its finished exchanges need not wait for the others
                for gradients in self.early.pop(self.next, []):
                    self.add(gradients)

    def add(self, gradients: Gradients) -> None:
        for name, grad in gradients.items():
            if name in self.sums:
                self.sums[name] += grad
            else:
                self.sums[name] = grad.to(torch.float32, copy=True)


class PartyStage:
    """What one party contributed to one attempt at a round.

    Every micro-batch takes part in every layer that has experts here, with or without a token, so the host knows
    which ones are still to come.

    Args:
        party: whose.
        max_ahead: most micro-batches that may have begun behind one that has not finished.
    """

    def __init__(self, party: str, max_ahead: int) -> None:
        self._party, self._max_ahead = party, max_ahead
        self._layers: dict[int, _LayerStage] = defaultdict(_LayerStage)
        self._lock = threading.Lock()
        self._tokens: int | None = None

    @property
    def tokens(self) -> int | None:
        """The party's tokens in this round, once it has declared them."""
        return self._tokens

    def begin(self, layer: int, micro_batch: int) -> None:
        """A forward was answered whose backward will come.

        Raises:
            RoundError: the micro-batch is over or too far ahead, or the party has declared its round finished.
        """
        with self._lock:
            stage = self._layers[layer]
            if self._tokens is not None or micro_batch < stage.next:
                raise self._error(f"sends micro-batch {micro_batch} again", code="micro-batch-over")
            if micro_batch >= stage.next + self._max_ahead:
                raise self._error(f"sends micro-batch {micro_batch} before {stage.next}", code="micro-batch-ahead")
            stage.open[micro_batch] += 1

    def finish(self, layer: int, micro_batch: int, gradients: Gradients) -> None:
        """Its backward was computed: add the weight gradients (any float dtype, CPU) when their turn comes."""
        with self._lock:
            stage = self._layers[layer]
            stage.open[micro_batch] -= 1
            if micro_batch == stage.next:
                stage.add(gradients)
            else:
                stage.early[micro_batch].append(gradients)
            stage.settle()

    def declare(self, tokens: int) -> None:
        """The party is done; ``tokens`` is what it divides its own loss by.

        Raises:
            RoundError: a backward is missing, or it declared something else before.
        """
        with self._lock:
            if any(stage.open or stage.early for stage in self._layers.values()):
                raise self._error("declares its round finished, but backwards are missing", code="round-incomplete")
            if self._tokens not in (None, tokens):
                raise self._error("declares its number of tokens twice, differently", code="tokens-changed")
            self._tokens = tokens

    def sums(self, layer: int) -> dict[str, Tensor]:
        """The summed gradients of a layer, float32 on CPU; a parameter without any is missing."""
        return self._layers[layer].sums if layer in self._layers else {}

    def _error(self, problem: str, *, code: str) -> RoundError:
        return RoundError(
            f"{self._party} {problem}.", code=code, why="a round's sums would depend on chance", where=self._party
        )
