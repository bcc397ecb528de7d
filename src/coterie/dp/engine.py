"""Clipped sums of per-sample gradients of any model, in one backward or two.

Book-keeping (Bu et al. 2023, arXiv:2210.00038): one backward captures, per use of a parameter, the rows that entered
and the gradient at the output; norms come from these, then the clipped sum from the same tensors. Ghost clipping
(Li et al. 2022, arXiv:2110.05679): a first backward yields norms only and keeps nothing, a second one yields the
clipped sum. Both give the same sums.

Shape letters: B records of a physical batch, G gradient groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from coterie.dp import resolve
from coterie.dp.adapters import rows_of_single_experts
from coterie.dp.batches_of_one import Look, compare_once
from coterie.dp.capture import Capture
from coterie.dp.clipping import Clipping, Flat, bounded_factors, checked_thresholds
from coterie.dp.derived import Root
from coterie.dp.experts import PrivateExperts
from coterie.dp.gram import LONGEST, UNIT, SqNorms, worst_excess
from coterie.dp.gram_kernel import take_all
from coterie.dp.losses import Batch, LossFunction, batch_size, checked, default_loss
from coterie.dp.probe import learn_sites
from coterie.dp.refusals import check_batch, check_types
from coterie.dp.rules import apply_rule
from coterie.dp.scaling import SMALLEST, UNSEEN, single
from coterie.dp.sites import Sites, Size
from coterie.dp.terms import Dense
from coterie.errors import CoterieError, NoRuleError, PrivacyError
from coterie.models import seam
from coterie.models.lora import expert_adapters, factors_stay_apart
from coterie.models.streaming import WeightSource

Method = Literal["auto", "book_keeping", "ghost"]
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Diagnostics:
    """What one physical batch looked like. For the owner's eyes only: none of it is private.

    Attributes:
        losses: [B] float32.
        norms: [B] float64, norm of each record's whole gradient.
        group_norms: [G, B] float64.
        within: [G, B] bool, norm at or below the group's threshold; released only as a noised, centred sum.
        masked: [B] bool, records that were not finite, or beyond 2^126 thresholds, and contribute zero.
    """

    losses: Tensor
    norms: Tensor
    group_norms: Tensor
    within: Tensor
    masked: Tensor

    def first(self, records: int) -> Diagnostics:
        """Those of the first records: later rows only filled up the batch."""
        return Diagnostics(
            self.losses[:records],
            self.norms[:records],
            self.group_norms[:, :records],
            self.within[:, :records],
            self.masked[:records],
        )


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
        groups: gradient groups, in the order of ``thresholds``.
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
        self.method: Method = method
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
        self._group_of = {name: self.clipping.group_of(name) for name in self.shapes}
        self.groups = list(dict.fromkeys(self._group_of.values()))
        self.thresholds = self.clipping.thresholds(list(self.groups))
        self.eta = self._eta()
        self._source = expert_weights
        self._accumulate_on = accumulate_on
        self._sums: Sums = {}
        self._sites: dict[bool, Sites] = {}
        self.compared = expert_weights is not None
        self._looks: set[Look] = set()
        self._captured_bytes_per_value: float | None = None
        self._counted: int | None = None

    def _eta(self) -> float:
        """Rounding that the slack of the norms does not cover (see docs/concepts/dp-engine.md)."""
        longest = max((size for shape in self.shapes.values() for size in shape), default=1)
        return worst_excess(max(2 * longest, LONGEST)) + 64 * UNIT  # a record's rows are added up as well

    @property
    def thresholds(self) -> Tensor:
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds_G: Tensor) -> None:
        self._thresholds = checked_thresholds(thresholds_G, len(self.groups))

    def group_of(self, name: str) -> str:
        """The gradient group of a trained parameter, as the policy said when the engine was made."""
        return self._group_of[name]

    @property
    def sensitivity(self) -> float:
        """Most that one record moves the sum, rounding included, in the L2 norm over all parameters."""
        return float(self.thresholds.square().sum().sqrt()) * (1.0 + self.eta)

    def prepare(self, batch: Batch) -> None:
        """Learn from probe passes what the dimensions of the model's tensors mean, and compare with batches of one.

        Only keys, shapes and types of ``batch`` are used, and whether it has padding and labels that do not count.
        Once for each mode (train, eval), and the comparison once for each such look of a batch.

        Raises:
            NoRuleError: a trainable parameter is used in a way that cannot be bounded, or the comparison failed.
        """
        mode = self.model.training
        if mode not in self._sites:
            self._sites[mode] = learn_sites(self, batch)
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
        self._counted = counted
        try:
            return self._ghost(batch) if self.next_method(batch) == "ghost" else self._book_keeping(batch)
        finally:
            self._counted = None

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
        squares = torch.zeros(len(self.groups), 1, dtype=torch.float64)
        slack = torch.zeros_like(squares)
        for name, gradient in total.items():
            norms = Dense(gradient.unsqueeze(0)).sq_norms()
            squares[self._group_index(name)] += norms.value.cpu()
            slack[self._group_index(name)] += norms.slack.cpu()
        factors, diagnostics = self._factors(SqNorms(squares, slack), loss)
        for name, gradient in total.items():
            factor = float(single(factors[self._group_index(name), 0]))
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
        found: dict[str, SqNorms] = {}
        records = batch_size(batch)

        def ready(root: Root) -> None:
            uses = resolve.bounded(resolve.simplify(root, records))
            found[root.name] = resolve.precise_sq_norms(root, uses, records)[1]
            root.captured = []

        self._run(batch, ready)
        names = list(self.shapes)
        return torch.stack([found[name].value.cpu() for name in names]), names

    def _book_keeping(self, batch: Batch) -> Diagnostics:
        records = batch_size(batch)
        kept: dict[str, tuple[Root, list[resolve.Use]]] = {}

        def ready(root: Root) -> None:
            uses = resolve.simplify(root, records)
            root.captured = []
            kept[root.name] = (root, resolve.condensed(uses))

        losses = self._run(batch, ready)
        # All together, so that threads are started once.
        take_all(resolve.segment_norms(uses for _, uses in kept.values()))
        kept = {name: (root, resolve.bounded(uses)) for name, (root, uses) in kept.items()}
        found = {name: resolve.sq_norms(root, uses, records) for name, (root, uses) in kept.items()}
        self._refine(found, kept, records)
        factors, diagnostics = self._factors(self._by_group(found, records), losses)
        keep = ~diagnostics.masked
        masked = bool(diagnostics.masked.any())
        for name in list(kept):
            root, uses = kept.pop(name)
            if masked:
                uses = [(node, term.masked(keep.to(losses.device))) for node, term in uses]
            self._add(root, uses, factors[self._group_index(name)].to(losses.device), self._sums)
        return diagnostics

    def _refine(
        self, found: dict[str, SqNorms], kept: dict[str, tuple[Root, list[resolve.Use]]], records: int
    ) -> None:
        """Take norms again, more carefully, while the slack is a notable part of a group's whole norm.

        The parameter that adds most of it comes first: a careful norm costs several times a plain one, and one or two
        are usually enough.
        """
        left = {name for name in kept if not found[name].trusted()}
        while left:
            whole = self._by_group(found, records)
            doubtful = ~whole.trusted_rows()
            adds = {
                name: float((found[name].slack.cpu() / whole.value[index]).nan_to_num(0.0).max())
                for name in left
                if doubtful[index := self._group_index(name)]
            }
            if not adds:
                return
            worst = max(sorted(adds), key=adds.__getitem__)
            left.remove(worst)
            root, uses = kept[worst]
            uses, found[worst] = resolve.precise_sq_norms(root, uses, records)
            kept[worst] = root, uses

    def _ghost(self, batch: Batch) -> Diagnostics:
        records = batch_size(batch)
        found: dict[str, SqNorms] = {}
        apart: set[str] = set()
        captured_bytes = 0

        def ready(root: Root) -> None:
            nonlocal captured_bytes
            uses = resolve.bounded(resolve.simplify(root, records))
            root.captured = []
            captured_bytes += sum(term.nbytes() for _, term in uses)
            careful, found[root.name] = resolve.precise_sq_norms(root, uses, records)
            if careful is not uses:
                apart.add(root.name)

        with _replayable_randomness(self._devices()):
            losses = self._run(batch, ready)
        self._captured_bytes_per_value = captured_bytes / max(_values(batch), 1)
        factors, diagnostics = self._factors(self._by_group(found, records), losses)
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
            uses = resolve.bounded(resolve.simplify(root, records))
            root.captured = []
            if root.name in apart:
                uses = resolve.apart(root, uses, records)
            if masked and keep_B is not None:
                uses = [(node, term.masked(keep_B.to(term_device))) for node, term in uses]
            self._add(root, uses, factors_GB[self._group_index(root.name)].to(term_device), into)

        term_device = next(iter(self._devices()), torch.device("cpu"))
        return self._run(batch, ready)

    def _add(self, root: Root, uses: list[resolve.Use], factors_B: Tensor, into: Sums) -> None:
        if not uses:
            return
        fresh = root.name not in into
        out = self._sum_of(root.name, into, torch.empty)
        if out.device == factors_B.device:
            resolve.add_sum(root, uses, out, factors_B, fresh)
        else:
            here = torch.empty(out.shape, device=factors_B.device)
            resolve.add_sum(root, uses, here, factors_B, fresh=True)
            out.copy_(here) if fresh else out.add_(here.to(out.device))

    def _run(self, batch: Batch, ready: object) -> Tensor:
        """One captured forward and backward; returns the losses, detached."""
        return self.run_captured(batch, ready, self._sites[self.model.training], None)

    def run_captured(self, batch: Batch, ready: object, sites: Sites, probing: Size | None) -> Tensor:
        """A forward and backward of this model, experts included, seen by a capture; ``probing`` as in `Capture`.

        Raises:
            NoRuleError: also where something fails that does not fail in the model by itself.
        """
        records = batch_size(batch)
        try:
            with self._capturing(records, ready, sites, probing) as capture:
                losses = checked(self.loss_fn(self.model, batch), records)
                capture.backward(losses.float().sum())
        except (CoterieError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._fails_plainly(batch):
                raise
            used = "" if capture.last is None else f", where `{capture.last.roots[0].name}` was used last"
            raise NoRuleError(
                f"The model fails while its parameters are followed{used}: {type(error).__name__}: {error}",
                why="its gradients cannot be clipped per record, though it runs by itself",
                fix="freeze that parameter, or use the plain PyTorch form of that layer",
            ) from error
        return losses.detach().float()

    def _fails_plainly(self, batch: Batch) -> bool:
        """Whether forward or backward fail without a capture too: then the fault is the model's own."""
        try:
            with torch.random.fork_rng(devices=[]):
                loss = self.loss_fn(self.model, batch).sum()
                torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        except Exception:
            return True
        return False

    @contextmanager
    def _capturing(self, records: int, ready: object, sites: Sites, probing: Size | None) -> Iterator[Capture]:
        capture = Capture(self.parameters, records, apply_rule, ready, sites, probing)  # type: ignore[arg-type]
        for name, shape in self.lent_shapes.items():
            capture.roots[name] = Root(torch.empty(shape, device="meta"), name=name)
        with ExitStack() as stack:
            if seam.expert_layers(self.model):
                adapters = expert_adapters(self.model)
                stack.enter_context(factors_stay_apart(self.model))
                stack.enter_context(seam.computed_by(self.model, PrivateExperts(capture, adapters, self._source)))
            stack.enter_context(rows_of_single_experts(self.model, capture))
            stack.enter_context(capture)
            yield capture

    def _by_group(self, found: Mapping[str, SqNorms], records: int) -> SqNorms:
        """[G, B] squared norms of the groups."""
        value = torch.zeros(len(self.groups), records, dtype=torch.float64)
        slack = torch.zeros_like(value)
        for name, norms in found.items():
            value[self._group_index(name)] += norms.value.cpu()
            slack[self._group_index(name)] += norms.slack.cpu()
        return SqNorms(value, slack)

    def _factors(self, squares: SqNorms, losses: Tensor) -> tuple[Tensor, Diagnostics]:
        """[G, B] float64 factors, zero for records that are not finite."""
        upper = (squares.upper + UNSEEN * len(self.shapes)).sqrt()
        finite = (SMALLEST * upper <= self.thresholds[:, None]).all(0) & torch.isfinite(losses.cpu())
        norms = squares.value.sqrt()
        factors = bounded_factors(self.clipping, torch.where(finite, upper, 1.0), self.thresholds)
        factors = torch.where(finite, factors, 0.0)
        if self._counted is not None:
            factors[:, self._counted :] = 0.0
        within = (norms <= self.thresholds[:, None]) & finite
        total = squares.value.sum(0).sqrt()
        return factors, Diagnostics(losses.cpu(), total, norms, within, ~finite)

    def _group_index(self, name: str) -> int:
        return self.groups.index(self._group_of[name])

    def _sum_of(self, name: str, into: Sums | None = None, make: Callable[..., Tensor] = torch.zeros) -> Tensor:
        sums = self._sums if into is None else into
        if name not in sums:
            own = self.parameters[name].device if name in self.parameters else torch.device("cpu")
            sums[name] = make(self.shapes[name], dtype=torch.float32, device=self._accumulate_on or own)
        return sums[name]

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(p.device for p in self.parameters.values()))

    def next_method(self, batch: Batch) -> Method:
        """Ghost for the first batch of ``auto``, to measure; then book-keeping if its captures take half at most."""
        if self.method != "auto":
            return self.method
        if self._captured_bytes_per_value is None:
            return "ghost"
        need = self._captured_bytes_per_value * _values(batch)
        return "book_keeping" if need < 0.5 * _free_bytes(self._devices()) else "ghost"


def _values(batch: Batch) -> int:
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=1)


def _free_bytes(devices: list[torch.device]) -> int:
    cuda = [device for device in devices if device.type == "cuda"]
    if cuda:
        return min(torch.cuda.mem_get_info(device)[0] for device in cuda)
    return int(psutil.virtual_memory().available)


@contextmanager
def _replayable_randomness(devices: list[torch.device]) -> Iterator[None]:
    """Put the random state back at the end, so that what comes next draws the same dropout masks."""
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        yield
