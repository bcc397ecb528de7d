"""Book-keeping (Bu et al. 2023, arXiv:2210.00038): norms and clipped sums from what one backward captured.

Shape letters: B records of a physical batch, G gradient groups.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from coterie.dp.losses import Batch
from coterie.dp.per_sample import combine_uses
from coterie.dp.per_sample.captured_pass import Ready
from coterie.dp.per_sample.gradient_groups import Diagnostics, GradientGroups
from coterie.dp.per_sample.gradient_sums import GradientSums
from coterie.dp.per_sample.gram import SqNorms, trusted_by
from coterie.dp.per_sample.gram_kernel import take_all
from coterie.dp.per_sample.shared_batch import SharedBatch
from coterie.dp.per_sample.weight_expressions import Root

Run = Callable[[Batch, Ready, SharedBatch], Tensor]
"""One captured forward and backward: calls ``ready`` with each parameter, and returns the losses, [B], detached."""
Kept = dict[str, tuple[Root, list[combine_uses.Use]]]
"""What a parameter's norm and sum are made of, by name."""


class BookKeeping:
    """The rows and gradients of all parameters are kept until every record's norm is known.

    Args:
        run: one pass.
        groups: turn norms into factors.
        sums: take the clipped gradients.
    """

    def __init__(self, run: Run, groups: GradientGroups, sums: GradientSums) -> None:
        self._run, self._groups, self._sums = run, groups, sums

    def accumulate(self, batch: Batch, shared: SharedBatch) -> Diagnostics:
        """Add a batch's clipped gradients; see `coterie.dp.per_sample.engine.Engine.accumulate`."""
        groups = self._groups
        kept: Kept = {}

        def ready(root: Root) -> None:
            uses = combine_uses.simplify(root, shared.records(root.name))
            root.captured = []
            kept[root.name] = (root, combine_uses.condensed(uses))

        losses = self._run(batch, ready, shared)
        # All together, so that threads are started once.
        take_all(combine_uses.segment_norms(uses for _, uses in kept.values()))
        kept = {name: (root, combine_uses.bounded(uses)) for name, (root, uses) in kept.items()}
        squares = {
            name: combine_uses.sq_norms(root, uses, shared.records(name)) for name, (root, uses) in kept.items()
        }
        self.refine(squares, kept, shared)
        factors, masked, diagnostics = shared.factors(groups, squares, losses)
        keep = ~masked
        for name in list(kept):
            root, uses = kept.pop(name)
            columns = shared.columns(name)
            if bool(masked[columns].any()):
                uses = [(node, term.masked(keep[columns].to(losses.device))) for node, term in uses]
            factors_B = factors[groups.index(name), columns].to(losses.device)
            self._sums.add(root, uses, factors_B, layers=shared.layers)
        return diagnostics

    def refine(self, squares: dict[str, SqNorms], kept: Kept, shared: SharedBatch) -> None:
        """Take norms again, more carefully, while the slack is a notable part of a group's whole norm.

        The parameter that adds most of it comes first: a careful norm costs several times a plain one, and one or two
        are usually enough. How many a rank takes again is its own matter: ranks exchange norms once before it, and
        each brings its own slack down to its share of what does not matter beside the whole. Of the others' norms,
        which may fall when they are taken again, it believes the least that they may be.
        """
        elsewhere = shared.others(shared.exchanged(shared.own_squares(self._groups, squares))).least
        with trusted_by(shared.ranks.world):
            left = {name for name in kept if not squares[name].trusted()}
            while left:
                own = shared.own_squares(self._groups, squares)
                whole = own.value + elsewhere
                doubtful = ~SqNorms(whole, own.slack).trusted_rows()
                adds = {
                    name: float(
                        (squares[name].slack.cpu() / whole[index, shared.columns(name)]).nan_to_num(0.0).max()
                    )
                    for name in left
                    if doubtful[index := self._groups.index(name)] and shared.records(name)
                }
                if not adds:
                    return
                worst = max(sorted(adds), key=adds.__getitem__)
                left.remove(worst)
                root, uses = kept[worst]
                uses, squares[worst] = combine_uses.precise_sq_norms(root, uses, shared.records(worst))
                kept[worst] = root, uses
