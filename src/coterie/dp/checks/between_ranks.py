"""What ranks compute together beside what each can compute alone, on made-up records, before anything is spent.

Each rank has one record. Its norm, and the sum of what is clipped of all of them, come about as in a round: rows that
travel, squared norms that are exchanged, sums that are added up and handed out. Beside it stands plain autograd, one
record at a time: of a whole model at every rank, of a spread one with all ranks of a group running the same record,
which takes neither rows nor records' numbers nor an exchange of norms. So a sum that is averaged, a part that is lost
or counted twice, or a partner that is the wrong one shows before a lot is drawn.

A routing decision at a tie may fall differently beside other rows. Where the first comparison fails, two of the
next have to agree. A draw whose gradients are no numbers compares nothing, and the next is taken.

Shape letters: B records, one for each rank; G gradient groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from coterie.dp.checks.batches_of_one import BatchesOfOne, Gradient, allowed, in_mode, only, square
from coterie.dp.clipping import LARGEST, SMALLEST
from coterie.dp.losses import Batch, checked
from coterie.dp.ownership import Ownership
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.gram import TRUSTED_CERTAIN, SqNorms
from coterie.dp.per_sample.probe import probe_sizes, synthetic_batch
from coterie.errors import RankError
from coterie.models import seam
from coterie.models.lora import expert_adapters, factors_stay_apart
from coterie.models.spread.holdings import Holdings
from coterie.models.spread.spread import spread_of
from coterie.models.spread.unison import InUnison
from coterie.models.streaming.streamer import HostGradients, StreamedExperts, WeightSource
from coterie.ranks.ranks import Ranks

_MORE_DRAWS = 4


def check_between_ranks(
    engine: Engine, ranks: Ranks, owners: Ownership, like: Batch, lent: WeightSource | None = None
) -> None:
    """Compare norms and sums of one made-up record of each rank; all of them call this.

    Args:
        engine: of the run; its sums have to be empty.
        ranks: of the run.
        owners: of its sums.
        like: only keys, shapes and types are used.
        lent: lends weights of this rank's experts, where the model has none.

    Raises:
        RankError: what they compute together is something else.

    Cost: a forward and a backward for each rank, of a short record, and one round's exchange of sums.
    """
    if ranks.world == 1:
        return
    comparison = _Comparison(engine, ranks, owners, lent)
    seen: list[str | None] = []
    for seed in range(1 + _MORE_DRAWS):
        compared, wrong = comparison.run(like, seed)
        if compared:
            seen.append(wrong)
        if seen[:1] == [None] or seen.count(None) == 2:
            return
    if not seen:
        raise _refusal(
            "what the ranks compute together cannot be compared: the model's gradients on made-up records are no "
            "numbers.",
            fix="look at the model's weights: a layer may hold infinities",
        )
    raise _refusal(
        f"what the ranks compute together is not what each computes alone: {seen[0]}.",
        fix="train in one process, and report this with the versions of torch at all ranks",
    )


def _refusal(message: str, fix: str) -> RankError:
    return RankError(
        message,
        code="ranks-computed",
        where="a comparison on made-up records, before anything is spent",
        why="what is lost, mixed or counted twice between ranks is neither clipped nor noised as the ledger says",
        fix=fix,
    )


class _Comparison:
    def __init__(self, engine: Engine, ranks: Ranks, owners: Ownership, lent: WeightSource | None) -> None:
        self._engine, self._ranks, self._owners, self._lent = engine, ranks, owners, lent
        self._spread, self._holdings = spread_of(engine.model), Holdings(engine.model)
        parts_travel = self._spread is not None and not self._spread.gathered
        self._parts = self._holdings.group.world if parts_travel else 1
        # Ranks with another number of experts would take records of another length.
        self._tokens = ranks.tell("length of the compared records", lambda: probe_sizes(engine.model)[0][1])

    def run(self, like: Batch, seed: int) -> tuple[bool, str | None]:
        """Whether gradients were numbers everywhere, and what differs, as the first rank that sees something says."""
        engine, ranks = self._engine, self._ranks
        batch = synthetic_batch(engine.model, like, ranks.world, self._tokens, 101 + seed)
        with in_mode(engine.model, training=False), torch.random.fork_rng(devices=[]):
            losses, gradients = self._one_by_one(batch)
            squares_GB = self._squares(gradients)
            with self._clipping(squares_GB):
                norms = engine.accumulate(only(batch, ranks.rank)).norms
                sums = {name: own.cpu().contiguous() for name, own in engine.take().items()}
                zero = SqNorms(squares_GB, torch.zeros_like(squares_GB))
                factors_GB, _ = engine.gradient_groups.factors(zero, losses, ranks=self._parts)
        for sharing, owner, names in self._owners.by_owner(sums):
            sharing.add_up([sums[name] for name in names], owner)
        self._owners.hand_out(sums)
        finite = bool(torch.isfinite(squares_GB).all())
        found = self._differs(norms, squares_GB, sums, gradients, factors_GB) if finite else None
        by_rank = ranks.together(f"comparison {seed}", lambda: [finite, found])
        return all(own for own, _ in by_rank), next((wrong for _, wrong in by_rank if wrong is not None), None)

    def _one_by_one(self, batch: Batch) -> tuple[Tensor, list[Gradient]]:
        """[B] losses, and gradients by plain autograd of what this rank has."""
        model, spread, sink = self._engine.model, self._spread, HostGradients()
        own = None if self._lent is None else StreamedExperts(self._lent, sink, expert_adapters(model))
        losses, gradients = list[float](), list[Gradient]()
        with (
            factors_stay_apart(model) if own is not None else nullcontext(),
            nullcontext() if spread is None else seam.computed_by(model, InUnison(spread, own)),
        ):
            alone = BatchesOfOne(self._engine, 0.0, "")
            for record in range(self._ranks.world):
                loss = checked(self._engine.loss_fn(model, only(batch, record)), 1)
                losses.append(float(loss.detach()))
                gradients.append(alone.autograd(loss.sum()) | self._streamed(sink))
        return torch.tensor(losses), gradients

    def _streamed(self, sink: HostGradients) -> Gradient:
        """Gradients of lent weights, which go to a sink in a backward; it is emptied."""
        found, sink.sums = sink.sums, {}
        names = {layer.index: layer.name for layer in seam.expert_layers(self._engine.model)}
        return {
            name: gradient
            for layer, own in found.items()
            for short, gradient in own.items()
            if (name := f"{names[layer]}.{short}") in self._engine.shapes
        }

    def _squares(self, gradients: list[Gradient]) -> Tensor:
        """[G, B] squared norms of records' gradients at all ranks of a group together."""
        groups, parts = self._engine.gradient_groups, self._holdings
        whole = torch.zeros(len(groups.names), len(gradients), dtype=torch.float64)
        own = torch.zeros_like(whole)
        for record, gradient in enumerate(gradients):
            for name, value in gradient.items():
                (own if parts.is_part(name) else whole)[groups.index(name), record] += square(value)
        by_rank = parts.group.together("squared norms", lambda: own.tolist())
        return whole + torch.tensor(by_rank, dtype=torch.float64).sum(0)

    @contextmanager
    def _clipping(self, squares_GB: Tensor) -> Iterator[None]:
        """Inside, every record is clipped, so that a sum tells by which norm; where a clip norm may be so small."""
        engine, before = self._engine, self._engine.thresholds
        least_G = squares_GB.sqrt().amin(1)
        usable_G = torch.isfinite(least_G) & (0.5 * least_G >= SMALLEST) & (0.5 * least_G <= LARGEST)
        engine.thresholds = torch.where(usable_G, 0.5 * least_G, before)
        try:
            yield
        finally:
            engine.thresholds = before

    def _differs(
        self, norms: Tensor, squares_GB: Tensor, sums: Gradient, gradients: list[Gradient], factors_GB: Tensor
    ) -> str | None:
        rank, groups = self._ranks.rank, self._engine.gradient_groups
        most = allowed(self._engine, self._engine.lowered)
        right = float(squares_GB[:, rank].sum().sqrt())
        if not math.isclose(float(norms[0]), right, rel_tol=most, abs_tol=1e-12):
            return f"the norm of rank {rank}'s record is {float(norms[0]):.6g} together and {right:.6g} alone"
        expected: Gradient = {}
        for record, gradient in enumerate(gradients):
            for name, value in gradient.items():
                added = value.detach().double().cpu() * float(factors_GB[groups.index(name), record])
                expected[name] = expected[name] + added if name in expected else added
        # Certain slack may take half of itself from a contribution; plain autograd knows of none.
        most += 0.5 * TRUSTED_CERTAIN if self._engine.tensor_cores else 0.0
        wrong = BatchesOfOne(self._engine, most, "").wrong_sum(sums, expected)
        return None if wrong is None else f"at rank {rank}: {wrong.message.rstrip('.')}"
