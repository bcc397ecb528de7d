"""Clipped sums of per-sample gradients of any model, in one backward or two.

Book-keeping (Bu et al. 2023, arXiv:2210.00038): one backward captures, per use of a parameter, the rows that entered
and the gradient at the output; norms come from these, then the clipped sum from the same tensors. Ghost clipping
(Li et al. 2022, arXiv:2110.05679): a first backward yields norms only and keeps nothing, a second one yields the
clipped sum. Both give the same sums.

Shape letters: B records of a physical batch, G gradient groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coterie.dp.checks.batches_of_one import Look, compare_once
from coterie.dp.clipping import Clipping, Flat
from coterie.dp.losses import Batch, LossFunction, batch_size, default_loss
from coterie.dp.per_sample import combine_uses
from coterie.dp.per_sample.captured_pass import CapturedPass, Ready
from coterie.dp.per_sample.gradient_groups import Diagnostics, GradientGroups
from coterie.dp.per_sample.gram import LONGEST, UNIT, SqNorms, worst_excess
from coterie.dp.per_sample.gram_kernel import take_all
from coterie.dp.per_sample.memory_choice import MemoryChoice, Method
from coterie.dp.per_sample.probe import learn_sites
from coterie.dp.per_sample.scaling import single
from coterie.dp.per_sample.sites import Sites
from coterie.dp.per_sample.terms import Dense
from coterie.dp.per_sample.weight_expressions import Root
from coterie.dp.refusals import check_batch, check_types
from coterie.errors import PrivacyError
from coterie.models.streaming.streamer import WeightSource

Sums = dict[str, Tensor]


class Engine:
    """Adds clipped per-sample gradients into float32 sums.

    Args:
        model: any model; parameters that require a gradient when the engine is made are trained.
        loss_fn: ``loss_fn(model, batch) -> [B]``; default: `losses.default_loss`.
        clipping: how norms become factors.
        method: ``auto`` measures the first batch's captures and takes book-keeping where they fit in memory.
        expert_weights: lends stacked expert weights whose module holds none (a streamed layer); with it,
            ``expert_shapes`` names what is trained.
        expert_shapes: parameter name to shape, for lent weights.
        accumulate_on: device of the sums; default: each parameter's own.

    Attributes:
        gradient_groups: what is clipped together.
        thresholds: [G] float64 clip norms of the groups; adaptive clipping replaces them between rounds.
        compared: with batches of one, by others; `prepare` then does not. Where expert weights are lent the model
            cannot compute by itself, and nothing is compared.
        eta: the clipped sum of one record has norm at most ``(1 + eta)`` times the thresholds' root sum of squares.

    Raises:
        PrivacyError: nothing to train.
        NoRuleError: a trained parameter is neither float32 nor a half-precision type.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None = None,
        clipping: Clipping | None = None,
        method: Method = "auto",
        expert_weights: WeightSource | None = None,
        expert_shapes: Mapping[str, torch.Size] | None = None,
        accumulate_on: torch.device | None = None,
    ) -> None:
        self.model = model
        self.loss_fn: LossFunction = loss_fn or default_loss
        self.clipping = clipping or Flat(1.0)
        self.parameters = {
            name: p for name, p in model.named_parameters() if p.requires_grad and p.device.type != "meta"
        }
        self.lent_shapes = dict(expert_shapes or {})
        self.shapes = {name: p.shape for name, p in self.parameters.items()} | self.lent_shapes
        if not self.shapes:
            raise PrivacyError(
                "The model has nothing to train: no parameter requires a gradient.",
                code="dp-nothing-to-train",
                fix="call requires_grad_(True) on what should be trained, or attach LoRA adapters",
            )
        check_types(self.parameters)
        self.gradient_groups = GradientGroups(self.shapes, self.clipping)
        self.eta = self._eta()
        self.compared = expert_weights is not None
        self._source = expert_weights
        self._accumulate_on = accumulate_on
        self._passes = CapturedPass(model, self.loss_fn, self.parameters, self.lent_shapes, expert_weights)
        self._memory = MemoryChoice(method, self._devices())
        self._sums: Sums = {}
        self._sites: dict[bool, Sites] = {}
        self._looks: set[Look] = set()

    def _eta(self) -> float:
        """Rounding that the slack of the norms does not cover (see docs/concepts/dp-engine.md)."""
        longest = max((size for shape in self.shapes.values() for size in shape), default=1)
        return worst_excess(max(2 * longest, LONGEST)) + 64 * UNIT  # a record's rows are added up as well

    @property
    def groups(self) -> list[str]:
        """Gradient groups, in the order of ``thresholds``."""
        return self.gradient_groups.names

    @property
    def thresholds(self) -> Tensor:
        return self.gradient_groups.thresholds

    @thresholds.setter
    def thresholds(self, thresholds_G: Tensor) -> None:
        self.gradient_groups.thresholds = thresholds_G

    def group_of(self, name: str) -> str:
        """The gradient group of a trained parameter, as the policy said when the engine was made."""
        return self.gradient_groups.of(name)

    @property
    def sensitivity(self) -> float:
        """Most that one record moves the sum, rounding included, in the L2 norm over all parameters."""
        return self.gradient_groups.bound() * (1.0 + self.eta)

    def prepare(self, batch: Batch) -> None:
        """Learn from probe passes what the dimensions of the model's tensors mean, and compare with batches of one.

        Only keys, shapes and types of ``batch`` are used, and whether it has padding and labels that do not count.
        Once for each mode (train, eval), and the comparison once for each such look of a batch.

        Raises:
            NoRuleError: a trainable parameter is used in a way that cannot be bounded, or the comparison failed.
        """
        mode = self.model.training
        if mode not in self._sites:
            self._sites[mode] = learn_sites(self._passes, batch)
        if self.compared or (look := Look.of(batch)) in self._looks:
            return
        self._looks.add(look)
        try:
            compare_once(self, batch, look, self._sites[mode].lowered)
        except BaseException:
            self._looks.discard(look)
            raise

    def accumulate(self, batch: Batch, counted: int | None = None) -> Diagnostics:
        """Add the clipped gradients of one physical batch to the sums.

        Args:
            batch: as a Hugging Face collator makes it, tensors [B, ...].
            counted: how many rows, from the first, are records; later ones add exactly zero, whatever the loss makes
                of them. Default: all.

        Returns:
            Owner-only figures of this batch.
        """
        check_batch(batch, self.model)
        self.prepare(batch)
        if self.next_method(batch) == "ghost":
            return self._ghost(batch, counted)
        return self._book_keeping(batch, counted)

    def accumulate_user(self, batches: Iterable[Batch]) -> Diagnostics:
        """Add one user's gradient, summed over all records of all ``batches`` and clipped once.

        Returns:
            Figures with B = 1: the user's summed loss and the norm of the summed gradient.
        """
        total: Sums = {}
        loss = torch.zeros(1)
        for batch in batches:
            check_batch(batch, self.model)
            self.prepare(batch)
            records = batch_size(batch)
            ones = torch.ones(len(self.groups), records)
            losses = self._second_pass(batch, ones, total)
            loss += losses.detach().sum().cpu()
        groups = self.gradient_groups
        norms = {name: Dense(gradient.unsqueeze(0)).sq_norms() for name, gradient in total.items()}
        factors, diagnostics = groups.factors(groups.added_up(norms, 1), loss)
        for name, gradient in total.items():
            factor = float(single(factors[self.gradient_groups.index(name), 0]))
            if factor > 0.0:
                self._sum_of(name).add_(gradient.to(self._sum_of(name).device), alpha=factor)
        return diagnostics

    def take(self) -> Sums:
        """The sums so far, a float32 tensor for every trained parameter, and start anew."""
        for name in self.shapes:
            self._sum_of(name)
        sums, self._sums = self._sums, {}
        return sums

    def norms(self, batch: Batch) -> Tensor:
        """[B] float64 norm of each record's whole gradient; nothing is added to the sums."""
        return self.norms_by_parameter(batch)[0].sum(0).sqrt()

    def summed(self, batch: Batch, factors_B: Tensor | None = None) -> Sums:
        """The records' gradients added up by the path that adds clipped ones, with factors of the caller's.

        For the self-check alone; nothing is added to the engine's sums.

        Args:
            batch: as for `accumulate`.
            factors_B: [B]; a record of factor zero is left out, whatever its numbers are. Default: one each.
        """
        self.prepare(batch)
        factors_B = torch.ones(batch_size(batch)) if factors_B is None else factors_B
        total: Sums = {}
        self._second_pass(batch, factors_B.expand(len(self.groups), -1), total, factors_B != 0)
        return total

    def norms_by_parameter(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """Squared norm of every record's gradient of every parameter, [parameters, B], and the parameters' names."""
        self.prepare(batch)
        squares: dict[str, SqNorms] = {}
        records = batch_size(batch)

        def ready(root: Root) -> None:
            uses = combine_uses.bounded(combine_uses.simplify(root, records))
            squares[root.name] = combine_uses.precise_sq_norms(root, uses, records)[1]
            root.captured = []

        self._run(batch, ready)
        names = list(self.shapes)
        return torch.stack([squares[name].value.cpu() for name in names]), names

    def _book_keeping(self, batch: Batch, counted: int | None) -> Diagnostics:
        records, groups = batch_size(batch), self.gradient_groups
        kept: dict[str, tuple[Root, list[combine_uses.Use]]] = {}

        def ready(root: Root) -> None:
            uses = combine_uses.simplify(root, records)
            root.captured = []
            kept[root.name] = (root, combine_uses.condensed(uses))

        losses = self._run(batch, ready)
        # All together, so that threads are started once.
        take_all(combine_uses.segment_norms(uses for _, uses in kept.values()))
        kept = {name: (root, combine_uses.bounded(uses)) for name, (root, uses) in kept.items()}
        squares = {name: combine_uses.sq_norms(root, uses, records) for name, (root, uses) in kept.items()}
        self._refine(squares, kept, records)
        factors, diagnostics = groups.factors(groups.added_up(squares, records), losses, counted)
        keep = ~diagnostics.masked
        masked = bool(diagnostics.masked.any())
        for name in list(kept):
            root, uses = kept.pop(name)
            if masked:
                uses = [(node, term.masked(keep.to(losses.device))) for node, term in uses]
            self._add(root, uses, factors[self.gradient_groups.index(name)].to(losses.device), self._sums)
        return diagnostics

    def _refine(
        self, squares: dict[str, SqNorms], kept: dict[str, tuple[Root, list[combine_uses.Use]]], records: int
    ) -> None:
        """Take norms again, more carefully, while the slack is a notable part of a group's whole norm.

        The parameter that adds most of it comes first: a careful norm costs several times a plain one, and one or two
        are usually enough.
        """
        left = {name for name in kept if not squares[name].trusted()}
        while left:
            whole = self.gradient_groups.added_up(squares, records)
            doubtful = ~whole.trusted_rows()
            adds = {
                name: float((squares[name].slack.cpu() / whole.value[index]).nan_to_num(0.0).max())
                for name in left
                if doubtful[index := self.gradient_groups.index(name)]
            }
            if not adds:
                return
            worst = max(sorted(adds), key=adds.__getitem__)
            left.remove(worst)
            root, uses = kept[worst]
            uses, squares[worst] = combine_uses.precise_sq_norms(root, uses, records)
            kept[worst] = root, uses

    def _ghost(self, batch: Batch, counted: int | None) -> Diagnostics:
        records, groups = batch_size(batch), self.gradient_groups
        squares: dict[str, SqNorms] = {}
        apart: set[str] = set()
        captured_bytes = 0

        def ready(root: Root) -> None:
            nonlocal captured_bytes
            uses = combine_uses.bounded(combine_uses.simplify(root, records))
            root.captured = []
            captured_bytes += sum(term.nbytes() for _, term in uses)
            careful, squares[root.name] = combine_uses.precise_sq_norms(root, uses, records)
            if careful is not uses:
                apart.add(root.name)

        with _replayable_randomness(self._devices()):
            losses = self._run(batch, ready)
        self._memory.measured(batch, captured_bytes)
        factors, diagnostics = groups.factors(groups.added_up(squares, records), losses, counted)
        again = self._second_pass(batch, factors, self._sums, ~diagnostics.masked, apart)
        if not torch.equal(losses.nan_to_num(), again.nan_to_num()):
            raise PrivacyError(
                "The second backward of ghost clipping did not repeat the first one.",
                code="dp-not-repeatable",
                why="factors computed for one set of gradients would be applied to another",
                fix="use method: book_keeping, or torch.use_deterministic_algorithms(True)",
            )
        return diagnostics

    def _second_pass(
        self, batch: Batch, factors_GB: Tensor, into: Sums, keep_B: Tensor | None = None, apart: Collection[str] = ()
    ) -> Tensor:
        """Add gradients times known factors to ``into``; returns the losses.

        ``apart``: parameters whose gradients are formed one record at a time, as they were for their norms.
        """
        records = batch_size(batch)
        masked = keep_B is not None and not bool(keep_B.all())

        def ready(root: Root) -> None:
            uses = combine_uses.bounded(combine_uses.simplify(root, records))
            root.captured = []
            if root.name in apart:
                uses = combine_uses.apart(root, uses, records)
            if masked and keep_B is not None:
                uses = [(node, term.masked(keep_B.to(term_device))) for node, term in uses]
            self._add(root, uses, factors_GB[self.gradient_groups.index(root.name)].to(term_device), into)

        term_device = next(iter(self._devices()), torch.device("cpu"))
        return self._run(batch, ready)

    def _add(self, root: Root, uses: list[combine_uses.Use], factors_B: Tensor, into: Sums) -> None:
        if not uses:
            return
        fresh = root.name not in into
        out = self._sum_of(root.name, into, torch.empty)
        if out.device == factors_B.device:
            combine_uses.add_sum(root, uses, out, factors_B, fresh)
        else:
            here = torch.empty(out.shape, device=factors_B.device)
            combine_uses.add_sum(root, uses, here, factors_B, fresh=True)
            out.copy_(here) if fresh else out.add_(here.to(out.device))

    def _run(self, batch: Batch, ready: Ready) -> Tensor:
        """One captured forward and backward; returns the losses, detached."""
        return self._passes.run(batch, ready, self._sites[self.model.training])

    def _sum_of(self, name: str, into: Sums | None = None, make: Callable[..., Tensor] = torch.zeros) -> Tensor:
        sums = self._sums if into is None else into
        if name not in sums:
            own = self.parameters[name].device if name in self.parameters else torch.device("cpu")
            sums[name] = make(self.shapes[name], dtype=torch.float32, device=self._accumulate_on or own)
        return sums[name]

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(p.device for p in self.parameters.values()))

    def next_method(self, batch: Batch) -> Method:
        """The way in which a batch would be summed; see `MemoryChoice`."""
        return self._memory.next(batch)


@contextmanager
def _replayable_randomness(devices: list[torch.device]) -> Iterator[None]:
    """Put the random state back at the end, so that what comes next draws the same dropout masks."""
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        yield
