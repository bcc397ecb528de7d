"""Ghost clipping (Li et al. 2022, arXiv:2110.05679): one backward for norms that keeps nothing, a second for the sum.

Shape letters: B records of a physical batch, G gradient groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from coterie.dp.losses import Batch
from coterie.dp.per_sample import combine_uses
from coterie.dp.per_sample.book_keeping import Run
from coterie.dp.per_sample.gradient_groups import Diagnostics, GradientGroups
from coterie.dp.per_sample.gradient_sums import GradientSums, Sums
from coterie.dp.per_sample.gram import SqNorms
from coterie.dp.per_sample.shared_batch import SharedBatch
from coterie.dp.per_sample.weight_expressions import Root
from coterie.errors import PrivacyError


class GhostClipping:
    """Two passes over a batch; the second also adds with factors that are known beforehand.

    Args:
        run: one pass.
        groups: turn norms into factors.
        sums: take the clipped gradients.
        devices: of the model; where it computes, and whose randomness is repeated.
        captured: called with a batch and the bytes that keeping its captures would have taken.
    """

    def __init__(
        self,
        run: Run,
        groups: GradientGroups,
        sums: GradientSums,
        devices: Callable[[], list[torch.device]],
        captured: Callable[[Batch, int], None],
    ) -> None:
        self._run, self._groups, self._sums, self._devices, self._captured = run, groups, sums, devices, captured

    def accumulate(self, batch: Batch, shared: SharedBatch) -> Diagnostics:
        """Add a batch's clipped gradients; see `coterie.dp.per_sample.engine.Engine.accumulate`."""
        squares: dict[str, SqNorms] = {}
        apart: set[str] = set()
        captured_bytes = 0

        def ready(root: Root) -> None:
            nonlocal captured_bytes
            records = shared.records(root.name)
            uses = combine_uses.bounded(combine_uses.simplify(root, records))
            root.captured = []
            captured_bytes += sum(term.nbytes() for _, term in uses)
            careful, squares[root.name] = combine_uses.precise_sq_norms(root, uses, records)
            if careful is not uses:
                apart.add(root.name)

        with _replayable_randomness(self._devices()):
            losses = self._run(batch, ready, shared)
        self._captured(batch, captured_bytes)
        factors, masked, diagnostics = shared.factors(self._groups, squares, losses)
        again = self.add(batch, shared, factors, None, ~masked, apart)
        if not torch.equal(losses.nan_to_num(), again.nan_to_num()):
            raise PrivacyError(
                "The second backward of ghost clipping did not repeat the first one.",
                code="dp-not-repeatable",
                why="factors computed for one set of gradients would be applied to another",
                fix="use method: book_keeping, or torch.use_deterministic_algorithms(True)",
            )
        return diagnostics

    def add(
        self,
        batch: Batch,
        shared: SharedBatch,
        factors_GB: Tensor,
        into: Sums | None,
        keep_B: Tensor | None = None,
        apart: Collection[str] = (),
    ) -> Tensor:
        """Add gradients times known factors.

        Args:
            batch: as for the first pass.
            shared: whose records it has.
            factors_GB: [G, B].
            into: takes them; None: the sums that the round releases.
            keep_B: [B] records that count; the others add nothing, whatever their numbers are. Default: all.
            apart: parameters whose gradients are formed one record at a time, as they were for their norms.

        Returns:
            The losses, [B].
        """

        def ready(root: Root) -> None:
            records, columns = shared.records(root.name), shared.columns(root.name)
            uses = combine_uses.bounded(combine_uses.simplify(root, records))
            root.captured = []
            if root.name in apart:
                uses = combine_uses.apart(root, uses, records)
            if keep_B is not None and not bool(keep_B[columns].all()):
                uses = [(node, term.masked(keep_B[columns].to(term_device))) for node, term in uses]
            factors_B = factors_GB[self._groups.index(root.name), columns].to(term_device)
            self._sums.add(root, uses, factors_B, into, shared.layers)

        term_device = next(iter(self._devices()), torch.device("cpu"))
        return self._run(batch, ready, shared)


@contextmanager
def _replayable_randomness(devices: list[torch.device]) -> Iterator[None]:
    """Put the random state back at the end, so that what comes next draws the same dropout masks."""
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        yield
