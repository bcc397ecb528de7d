"""A physical batch whose records lie at several ranks, because experts do: which parameter sees whose records.

What holds no expert (the trunk) is whole at every rank and sees the rank's own records. An expert is at one rank and
sees the rows of all ranks' records. So squared norms of a record come about at several ranks; they are exchanged and
added up in the order of ranks, the same bits everywhere, before any factor is known. To clip rank by rank would let a
record add up to sqrt(W) clip norms.

A batch of a model that is whole is shared with nobody, and takes the same way.

Shape letters: G gradient groups, B records of all ranks, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.per_sample.gradient_groups import Diagnostics, GradientGroups
from coterie.dp.per_sample.gram import SqNorms
from coterie.dp.per_sample.memory_choice import Method
from coterie.dp.per_sample.private_experts import PrivateExperts
from coterie.errors import PrivacyError, RankError
from coterie.models.seam import ExpertsCall, ExpertsImplementation
from coterie.models.spread.spread import MakeTrip, spread_of
from coterie.models.spread.travel import there_and_back
from coterie.models.spread.whole_layers import WholeLayers
from coterie.ranks.ranks import Alone, Ranks, check_same


@dataclass(frozen=True)
class SharedBatch:
    """Whose records a physical batch has.

    Attributes:
        ranks: that share it.
        rows_W: rows of each rank.
        counted_W: how many of these, from the first, are records; later ones add zero.
        everybody: parameters that see the records of all ranks.
        trip: begins the way of a layer's rows; None where every row is computed here.
        layers: lend whole layers, and take their sums; None where weights stay where they are.
    """

    ranks: Ranks
    rows_W: Sequence[int]
    counted_W: Sequence[int]
    everybody: frozenset[str]
    trip: MakeTrip | None
    layers: WholeLayers | None = None

    @property
    def total(self) -> int:
        """B."""
        return sum(self.rows_W)

    @property
    def own(self) -> slice:
        """Where this rank's records are among all."""
        start = sum(self.rows_W[: self.ranks.rank])
        return slice(start, start + self.rows_W[self.ranks.rank])

    def columns(self, name: str) -> slice:
        """The records that a parameter sees."""
        return slice(0, self.total) if name in self.everybody else self.own

    def records(self, name: str) -> int:
        """How many records a parameter sees."""
        return self.total if name in self.everybody else self.rows_W[self.ranks.rank]

    def computed(self, experts: PrivateExperts) -> ExpertsImplementation:
        """What computes a model's experts in this batch."""
        trip = self.trip
        if trip is None:
            return experts

        def travelling(call: ExpertsCall) -> Tensor:
            way = trip(call.layer, call.expert_ids_NK, experts.record_of(call) + self.own.start)
            return there_and_back(
                experts.capture.anchor, call, way, lambda here: experts.compute(here, way.record_A, self.total)
            )

        return travelling

    # -- norms -------------------------------------------------------------------------------------------------------

    def own_squares(self, groups: GradientGroups, squares: Mapping[str, SqNorms]) -> SqNorms:
        """[G, B] what this rank's parameters have of every record's squared norms."""
        value = torch.zeros(len(groups.names), self.total, dtype=torch.float64)
        slack = torch.zeros_like(value)
        for name, norms in squares.items():
            value[groups.index(name), self.columns(name)] += norms.value.cpu()
            slack[groups.index(name), self.columns(name)] += norms.slack.cpu()
        return SqNorms(value, slack)

    def exchanged(self, own: SqNorms) -> list[SqNorms]:
        """[G, B] what the parameters of each rank have of them; every rank takes part."""
        return [SqNorms(*both) for both in self.ranks.gather(torch.stack([own.value, own.slack]))]

    def others(self, parts: Sequence[SqNorms]) -> SqNorms:
        """[G, B] what the others' parameters have of them."""
        return _added_up([SqNorms.zeros_like(parts[0]), *(p for r, p in enumerate(parts) if r != self.ranks.rank)])

    def factors(
        self, groups: GradientGroups, squares: Mapping[str, SqNorms], losses: Tensor
    ) -> tuple[Tensor, Tensor, Diagnostics]:
        """What every record's gradient is multiplied by, the same bits at every rank.

        Args:
            groups: clip.
            squares: of this rank's parameters.
            losses: of this rank's records; one that is not finite masks its record everywhere.

        Returns:
            [G, B] float64 factors, [B] bool records that count nowhere, and the figures of this rank's records.
        """
        own = self.own_squares(groups, squares)
        own.slack[:, self.own] += torch.where(torch.isfinite(losses.cpu()), 0.0, torch.nan)
        whole = _added_up(self.exchanged(own))
        all_losses = torch.zeros(self.total)
        all_losses[self.own] = losses.cpu()
        factors, figures = groups.factors(whole, all_losses, self._counts(), self.ranks.world)
        return factors, figures.masked, figures.part(self.own)

    def _counts(self) -> Tensor:
        """[B] bool: rows that are records."""
        pairs = zip(self.rows_W, self.counted_W, strict=True)
        return torch.cat([torch.arange(rows) < counted for rows, counted in pairs])


def _added_up(parts: Sequence[SqNorms]) -> SqNorms:
    *_, total = accumulate(parts, lambda a, b: SqNorms(a.value + b.value, a.slack + b.slack))
    return total


class Sharing:
    """How an engine's batches are shared.

    Args:
        model: whole or spread.
    """

    def __init__(self, model: nn.Module) -> None:
        self._spread = spread_of(model)
        self._everybody = frozenset() if self._spread is None else frozenset(self._spread.cuts)
        self._ranks = Alone() if self._spread is None else self._spread.ranks
        gathered = self._spread is not None and self._spread.gathered
        self._layers = WholeLayers(model, self._spread) if self._spread is not None and gathered else None
        self._lot, self._batches = "no lot", 0
        self._inside = False

    def begin(self, lot: str) -> None:
        """From now on batches are of this lot."""
        self._lot, self._batches = lot, 0

    @property
    def spread(self) -> bool:
        """Whether the model's experts are spread over ranks."""
        return self._spread is not None

    def size(self, name: str, shape: torch.Size) -> torch.Size:
        """The shape of a parameter whose part here has ``shape``, whole."""
        return self._spread.cuts[name].shape() if self._spread is not None and name in self._everybody else shape

    def at_home(self, records: int) -> SharedBatch:
        """A batch of this rank alone, with its own experts alone: what is compared, and what is learnt, before."""
        trip = None if self._spread is None else self._spread.trip_at_home
        return SharedBatch(Alone(), (records,), (records,), frozenset(), trip)

    def awaited(self) -> AbstractContextManager[None]:
        """See `Ranks.awaited`; for a whole model's batches nobody waits."""
        return self._ranks.awaited() if self.spread else nullcontext()

    @contextmanager
    def exchanging(self, *, lent: bool) -> Iterator[None]:
        """Inside, ranks exchange what belongs to a batch; whoever leaves by an error begins no other one. A whole
        model's batches exchange nothing.

        Args:
            lent: experts are a party's, and an attempt may be given up: see `Ranks.exchanging`.
        """
        self._inside = self.spread
        with self._ranks.exchanging() if self.spread and lent else nullcontext():
            yield
        self._inside = False

    def with_all(
        self, records: int, counted: int | None, asked: Method, method: Method
    ) -> tuple[SharedBatch, Method]:
        """A batch of all ranks, each of which calls this; with `auto`, ghost clipping where one of them needs it.

        Where layers are gathered the records of each rank are its own matter, and all ranks make the same passes.

        Args:
            records: of this rank, at least one row.
            counted: how many of them count; None: all.
            asked: the method that is set.
            method: that this rank would take.

        Raises:
            RankError: the ranks are at different batches or lots, or set to different methods, or one of them left
                an earlier batch half done.
        """
        left = self._inside

        def own_part() -> list[Any]:
            if left:
                raise _half_done(self._ranks.rank)
            return [records, records if counted is None else counted, asked, method]

        self._batches += 1
        step = f"batch {self._batches} of {self._lot}"
        by_rank = self._ranks.together(step, own_part)
        check_same(step, [{"the method": each[2]} for each in by_rank])
        method = "ghost" if any(each[3] == "ghost" for each in by_rank) else method
        if self._layers is not None:
            own = by_rank[self._ranks.rank]
            return SharedBatch(Alone(), (own[0],), (own[1],), frozenset(), None, self._layers), method
        rows_W, counted_W = ([int(each[place]) for each in by_rank] for place in (0, 1))
        trip = None if self._spread is None else self._spread.trip
        return SharedBatch(self._ranks, rows_W, counted_W, self._everybody, trip), method


def _half_done(rank: int) -> RankError:
    return RankError(
        f"rank {rank} left a batch by an error while ranks exchanged what belongs to it.",
        code="ranks-failed",
        why="rows and norms of that batch could be taken for those of this one, and records clipped by them",
        fix="end the process where a step fails, and resume the run from its newest checkpoint",
    )


def users_refused() -> PrivacyError:
    """The refusal of users as units where experts are spread."""
    return PrivacyError(
        "users are not clipped as one where experts are spread over ranks.",
        code="dp-spread-users",
        why="every owner of experts would have to keep the whole summed gradient of each user of each rank",
        fix="train with whole models at each rank (devices alone), which clips users, too",
    )
