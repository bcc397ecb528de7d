"""Sums without privacy where adapters are trained: the engine computes them, as it never forms ``W + B A``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.clipping import Flat
from coterie.dp.ownership import Ownership
from coterie.dp.per_sample.engine import Engine
from coterie.federation.cancel import CancelToken
from coterie.models.spread.holdings import Holdings
from coterie.models.spread.spread import spread_of
from coterie.models.streaming.streamer import LayerStreamer, WeightSource
from coterie.ranks.ranks import Alone, Ranks
from coterie.training.data.packing import Batch
from coterie.training.experts.contribution import Sums, WithoutLedger, dealt, next_batch, summed_figures
from coterie.training.experts.held_sums import HeldSums, held, to_owners
from coterie.training.loop import sequence_losses, to_device
from coterie.training.seeds import derived_seed

_NEVER_CLIPS = 1e30


def _summed_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return sequence_losses(model, dict(batch))[0]


def adapter_engine(model: nn.Module, weights: WeightSource | None = None) -> Engine:
    """What adds up the adapters' gradients without clipping any.

    Args:
        model: with adapters.
        weights: lends the experts' frozen weights; None: the model holds them.
    """
    return Engine(model, _summed_losses, Flat(_NEVER_CLIPS), "auto", weights, {}, torch.device("cpu"))


class AdapterSums(WithoutLedger):
    """Summed token gradients of the adapters; see `coterie.training.experts.contribution.Contribution`.

    Args:
        model: partial model with adapters; where experts are spread over ranks, with this one's.
        batches: the micro-batches of a round, from 1.
        seed: repeats dropout on a second attempt; of the whole run.
        push_limit: largest size of a value in a masked sum.
        ranks: share the micro-batches; each owns a part of the sums of all.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[int], Sequence[Batch]],
        seed: int,
        *,
        push_limit: float = 1e4,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(push_limit)
        self._model, self._batches, self._seed = model, batches, seed
        self._ranks = ranks or Alone()
        self._spread = spread_of(model) is not None
        self._engine: Engine | None = None

    def sums(self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken) -> Sums:
        own, figures = self._own(round_no, streamer, cancel)
        return Sums(own, float(figures["tokens"]), figures)

    def share(
        self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken
    ) -> HeldSums | None:
        return self._own(round_no, streamer, cancel)[0]

    def _own(self, round_no: int, streamer: LayerStreamer, cancel: CancelToken) -> tuple[HeldSums, dict[str, float]]:
        if self._engine is None:
            self._engine = adapter_engine(self._model, streamer)
        engine = self._engine
        figures = summed_figures(self._ranks, round_no, lambda: self._add_own(engine, round_no, cancel))
        totals, holdings = engine.take(), Holdings(self._model)
        to_owners(Ownership(self._ranks, holdings, totals), totals)
        return held(holdings.stored(totals), {}, holdings), figures

    def _add_own(self, engine: Engine, round_no: int, cancel: CancelToken) -> list[float]:
        """Add the gradients of this rank's micro-batches; their summed loss, and tokens."""
        device = next(p for p in self._model.parameters() if not p.is_meta).device
        loss, tokens = 0.0, 0
        engine.begin(str(round_no))
        self._model.train()
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(self._seed, round_no - 1) + self._ranks.rank)
            for batch, counts in dealt(self._batches(round_no), self._ranks, spread=self._spread):
                next_batch(self._ranks, cancel, spread=self._spread)
                figures = engine.accumulate(to_device(batch, device), counted=None if counts else 0)
                if counts:
                    loss += float(figures.losses.sum())
                    tokens += int((batch["labels"][:, 1:] != -100).sum())
        return [loss, tokens]
