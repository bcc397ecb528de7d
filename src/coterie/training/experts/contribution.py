"""What a party adds to a round of the `experts` exchange: sums that may leave it, and what is promised about them.

`PlainSums`, `coterie.training.experts.adapter_sums.AdapterSums` and
`coterie.training.experts.private_sums.PrivateSums` make them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from coterie.dp.accounting.ledger import LedgerHead
from coterie.dp.balance import Balancer
from coterie.dp.losses import default_loss
from coterie.dp.ownership import Ownership
from coterie.dp.party_session import Contributor
from coterie.federation.cancel import CancelToken
from coterie.federation.experts.masking.grid import MaskGrid
from coterie.federation.experts.masking.session import Held
from coterie.models import seam
from coterie.models.seam import ExpertLayer, ExpertsImplementation
from coterie.models.spread.holdings import Holdings
from coterie.models.spread.spread import SpreadExperts, spread_of
from coterie.models.streaming.streamer import HostGradients, LayerStreamer, StreamedExperts
from coterie.ranks.ranks import Alone, Ranks
from coterie.training.data.packing import Batch
from coterie.training.experts.held_sums import TRUNK, HeldSums, Piece, SumValues, expert_names, held, to_owners
from coterie.training.experts.push_grid import plain_grid
from coterie.training.loop import to_device
from coterie.training.seeds import derived_seed

DRAW = "draw"
"""The pin that names the set of all parties' draws, where pushes are masked."""


@dataclass(frozen=True)
class Sums:
    """What a party adds to a round.

    Attributes:
        values: sums of the trained parameters, and of the expert loads where these are released; None when it does
            not contribute.
        weight: what everybody's sums together are divided by adds up from these.
        metrics: for the owner's eyes; never sent.
        digest: of the spooled release that they come from; empty without privacy.
        grid: where pushes are masked, what they are integers of: noised sums are int64 then.
    """

    values: SumValues | None
    weight: float
    metrics: Mapping[str, float]
    digest: str = ""
    grid: MaskGrid | None = None

    def trunk_values(self, name: str) -> Tensor:
        """The sum of a trunk parameter in floating point, for a party that steps it by itself."""
        assert self.values is not None
        values = self.values.trunk(name)
        if self.grid is None or values.dtype != torch.int64:
            return values
        return (values.to(torch.float64) * self.grid.scale(name).step).to(torch.float32)

    def only(self, names: Collection[str]) -> Sums:
        """With some trunk parameters' sums, in this process, and none of the others."""
        if self.values is None:
            return self
        return replace(self, values=HeldSums({Piece(TRUNK, name): self.trunk_values(name) for name in names}))


class Contribution(Protocol):
    """Turns a round's weights and this party's text into sums that may leave it.

    Attributes:
        balancer: is told the public loads of every round, where parties release theirs; None where nothing does.
    """

    @property
    def balancer(self) -> Balancer | None: ...

    def open(self, streamer: LayerStreamer) -> None:
        """Called before every attempt's `sums`, with weights at hand: what has to be refused is refused here."""
        ...

    def sums(self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken) -> Sums:
        """Process this party's share of a round.

        Args:
            round_no: from 1.
            pins: digests of what is computed on: weights, agreement, membership epoch.
            streamer: lends expert weights to the device.
            cancel: asked before every micro-batch.
        """
        ...

    def share(
        self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken
    ) -> HeldSums | None:
        """What the other ranks of this party do while rank 0 calls `sums`, with the same arguments.

        Returns:
            The sums that lie at this rank. None when the party does not contribute.
        """
        ...

    def nothing(self) -> Sums:
        """In place of sums: this party contributes to no round any more, or with masked pushes too few parties do."""
        ...

    def grid(self, parties: int) -> MaskGrid:
        """Where pushes are masked: what the sums of so many parties are integers of. Called after `open`."""
        ...

    def outlook(self, round_no: int, pins: Mapping[str, str]) -> Held:
        """Whether a lot can be drawn for a round, and the set of draws that is held for it. Called after `open`."""
        ...

    def applied(self, round_no: int, newest: int) -> None:
        """What was kept for sending rounds again may go.

        Args:
            round_no: every checkpoint that the federation could go back to includes it.
            newest: the same of the newest checkpoint but one; what lies between is kept only while there is room.
        """
        ...

    def check_not_behind(self, received: int) -> None:
        """Compare with the newest round that the hosts received from this party.

        Raises:
            LedgerError: they received more than the ledger knows.
        """
        ...

    def open_ledger(self, streamer: LayerStreamer) -> Contributor | None:
        """Open the ledger and what was spooled, so that `privacy` and `statement` answer also where nothing was
        computed in this process; None where there is no ledger."""
        ...

    def ledger_head(self) -> LedgerHead | None:
        """The newest entry of the ledger, for a checkpoint; None before it is open, or where there is none."""
        ...

    def expect(self, head: LedgerHead | None) -> None:
        """A checkpoint was loaded; before every attempt from now on, the ledger has to hold what it held then."""
        ...

    def privacy(self) -> dict[str, object] | None:
        """What was spent so far, at what noise; None before the ledger is open, or where nothing bounds it."""
        ...

    def statement(self) -> str:
        """What is promised about this party's records, for people; empty where there is no promise."""
        ...

    def close(self) -> None: ...


class WithoutLedger:
    """The answers of a `Contribution` that nothing bounds.

    Args:
        push_limit: largest size of a value in a masked sum.
    """

    balancer = None

    def __init__(self, push_limit: float = 1e4) -> None:
        self._push_limit = push_limit

    def nothing(self) -> Sums:
        return Sums(None, 0.0, {})

    def grid(self, parties: int) -> MaskGrid:
        return plain_grid(parties, self._push_limit)

    def outlook(self, round_no: int, pins: Mapping[str, str]) -> Held:
        """Nothing runs out, and no sums are kept for another attempt."""
        return Held(can_draw=True)

    def open(self, streamer: LayerStreamer) -> None:
        """There is nothing to refuse."""

    def applied(self, round_no: int, newest: int) -> None:
        """Nothing is kept."""

    def check_not_behind(self, received: int) -> None:
        """Nothing is counted."""

    def open_ledger(self, streamer: LayerStreamer) -> None:
        """There are none."""

    def ledger_head(self) -> None:
        """There is none."""

    def expect(self, head: LedgerHead | None) -> None:
        """Nothing can be missing."""

    def privacy(self) -> None:
        """Nothing bounds it."""

    def statement(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing is open."""


class PlainSums(WithoutLedger):
    """Sums without privacy: summed token gradients of the round's sequences.

    Args:
        model: partial model, trunk on its device; where experts are spread over ranks, with this one's.
        layers: its MoE layers.
        batches: the micro-batches of a round, from 1.
        loss: summed loss and tokens of a micro-batch.
        seed: repeats dropout on a second attempt; of the whole run.
        per_record: sum each record's mean loss and count records, as private parties of the same federation do.
        push_limit: largest size of a value in a masked sum.
        ranks: share the micro-batches; each owns a part of the sums of all.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertLayer],
        batches: Callable[[int], Sequence[Batch]],
        loss: Callable[[Batch], tuple[Tensor, int]],
        seed: int,
        *,
        per_record: bool = False,
        push_limit: float = 1e4,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(push_limit)
        self._model, self._layers, self._batches, self._seed = model, layers, batches, seed
        self._ranks = ranks or Alone()
        self._loss = self._record_loss if per_record else loss
        self._spread = spread_of(model)

    def _record_loss(self, batch: Batch) -> tuple[Tensor, int]:
        device = next(p for p in self._model.parameters() if not p.is_meta).device
        losses_B = default_loss(self._model, to_device(batch, device))
        return losses_B.sum(), losses_B.shape[0]

    def sums(self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken) -> Sums:
        own, figures = self._own(round_no, streamer, cancel)
        return Sums(own, float(figures["tokens"]), figures)

    def share(
        self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken
    ) -> HeldSums | None:
        return self._own(round_no, streamer, cancel)[0]

    def _own(self, round_no: int, streamer: LayerStreamer, cancel: CancelToken) -> tuple[HeldSums, dict[str, float]]:
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad and not p.is_meta}
        sink = HostGradients()
        totals = {name: torch.zeros(p.shape) for name, p in trained.items()}
        experts: ExpertsImplementation = StreamedExperts(streamer, sink)
        if self._spread is not None:
            experts = SpreadExperts(self._spread.trip, experts)

        def own() -> list[float]:
            return self._add_own(round_no, trained, totals, experts, cancel)

        figures = summed_figures(self._ranks, round_no, own)
        names = expert_names(self._layers)
        shapes = {layer.index: layer.parameters() for layer in self._layers}
        for full, (layer, name) in names.items():  # zeros where no micro-batch had a backward
            found = sink.sums.get(layer, {}).pop(name, None)
            totals[full] = torch.zeros(shapes[layer][name].shape) if found is None else found
        holdings = Holdings(self._model)
        to_owners(Ownership(self._ranks, holdings, totals), totals)
        return held(holdings.stored(totals), names, holdings), figures

    def _add_own(
        self,
        round_no: int,
        trained: Mapping[str, nn.Parameter],
        totals: Mapping[str, Tensor],
        experts: ExpertsImplementation,
        cancel: CancelToken,
    ) -> list[float]:
        """Add the gradients of this rank's micro-batches; their summed loss, and tokens."""
        for param in trained.values():
            param.grad = None  # an attempt that failed in its backward leaves some
        loss_sum, tokens = 0.0, 0
        self._model.train()
        with torch.random.fork_rng(), seam.computed_by(self._model, experts):
            torch.manual_seed(derived_seed(self._seed, round_no - 1) + self._ranks.rank)
            for batch, counts in dealt(self._batches(round_no), self._ranks, spread=self._spread is not None):
                next_batch(self._ranks, cancel, spread=self._spread is not None)
                with self._ranks.exchanging() if self._spread is not None else nullcontext():
                    loss, counted = self._loss(batch)
                    torch.autograd.backward(loss if counts else 0.0 * loss)
                if counts:
                    loss_sum, tokens = loss_sum + float(loss.detach()), tokens + counted
                for name, param in trained.items():
                    if param.grad is not None:
                        totals[name].add_(param.grad.to("cpu", torch.float32))
                        param.grad = None
        return [loss_sum, tokens]


def dealt(batches: Sequence[Batch], ranks: Ranks, *, spread: bool) -> Sequence[tuple[Batch, bool]]:
    """The micro-batches of one rank, and whether each counts.

    Args:
        batches: of the round.
        ranks: that share them.
        spread: every rank runs as many as the one with the most, because its experts are needed.
    """
    own = [(batch, True) for batch in batches[ranks.rank :: ranks.world]]
    missing = -(-len(batches) // ranks.world) - len(own)
    return [*own, *[(batches[0], False)] * missing] if spread else own


def next_batch(ranks: Ranks, cancel: CancelToken, *, spread: bool) -> None:
    """Go on to the next batch only while the attempt counts; where experts are spread all ranks stop at the same.

    Raises:
        CoterieError: it does not count any more.
    """
    if spread:
        ranks.together("the next batch", cancel.check)
    else:
        cancel.check()


def summed_figures(ranks: Ranks, round_no: int, own: Callable[[], list[float]]) -> dict[str, float]:
    """Mean loss and tokens of a round, from every rank's summed loss and tokens.

    Args:
        ranks: share the round, and all call this.
        round_no: from 1.
        own: computes this rank's part.

    Raises:
        CoterieError: what the first rank that failed raised, at every rank.
    """
    loss, tokens = (sum(each) for each in zip(*ranks.together(f"sums of {round_no}", own), strict=True))
    return {"loss": loss / max(tokens, 1), "tokens": tokens}
