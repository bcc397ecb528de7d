"""Clipped sums of per-sample gradients of any model, in one backward or two.

A backward captures, per use of a parameter, the rows that entered and the gradient at the output; norms come from
these. `coterie.dp.per_sample.book_keeping` takes the clipped sum from the same tensors, and
`coterie.dp.per_sample.ghost_clipping` from a second backward. Both give the same sums.

Shape letters: B records of a physical batch, G gradient groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from coterie.dp.checks.batches_of_one import Look, compare_once
from coterie.dp.clipping import Clipping, Flat
from coterie.dp.losses import Batch, LossFunction, batch_size, default_loss
from coterie.dp.per_sample import combine_uses, products
from coterie.dp.per_sample.book_keeping import BookKeeping
from coterie.dp.per_sample.captured_pass import CapturedPass, Ready
from coterie.dp.per_sample.ghost_clipping import GhostClipping
from coterie.dp.per_sample.gradient_groups import Diagnostics, GradientGroups
from coterie.dp.per_sample.gradient_sums import GradientSums, Sums
from coterie.dp.per_sample.gram import LONGEST, UNIT, SqNorms, worst_excess
from coterie.dp.per_sample.memory_choice import MemoryChoice, Method
from coterie.dp.per_sample.probe import learn_sites
from coterie.dp.per_sample.scaling import single
from coterie.dp.per_sample.shared_batch import SharedBatch, Sharing, users_refused
from coterie.dp.per_sample.sites import Sites
from coterie.dp.per_sample.terms import Dense
from coterie.dp.per_sample.weight_expressions import Root
from coterie.dp.refusals import check_batch, check_types
from coterie.dp.sum_engine import OnGrid
from coterie.errors import PrivacyError
from coterie.models.streaming.streamer import WeightSource

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _at_work(method: Callable[Concatenate[Engine, _P], _R]) -> Callable[Concatenate[Engine, _P], _R]:
    """A method that takes norms or sums: all of its products and slack are of the engine's own kind."""

    @wraps(method)
    def working(self: Engine, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with products.law(self.tensor_cores):
            return method(self, *args, **kwargs)

    return working


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
        tensor_cores: take products on tensor cores where their rounding is bounded; see `products`.

    Attributes:
        gradient_groups: what is clipped together.
        thresholds: [G] float64 clip norms of the groups; adaptive clipping replaces them between rounds.
        compared: with batches of one, by others; `prepare` then does not. Where expert weights are lent the model
            cannot compute by itself, and nothing is compared.
        tensor_cores: it was asked for, and the devices of all trained parameters are known.
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
        tensor_cores: bool = False,
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
        self.tensor_cores = tensor_cores and self._multiplies_on_tensor_cores()
        self._sharing = Sharing(model)
        self.eta = self._eta()
        self.compared = expert_weights is not None
        self._source = expert_weights
        self._accumulate_on = accumulate_on
        self._passes = CapturedPass(model, self.loss_fn, self.parameters, self.lent_shapes, expert_weights)
        self._memory = MemoryChoice(method, self.devices())
        self._sums = GradientSums(self.shapes, self._device_of)
        self._book_keeping = BookKeeping(self._run, self.gradient_groups, self._sums)
        self._ghost = GhostClipping(self._run, self.gradient_groups, self._sums, self.devices, self._memory.measured)
        self._sites: dict[bool, Sites] = {}
        self._looks: set[Look] = set()

    def _eta(self) -> float:
        """Rounding that the slack of the norms does not cover (see docs/concepts/dp-engine.md)."""
        whole = [self._sharing.size(name, shape) for name, shape in self.shapes.items()]  # the same at all ranks
        longest = max((size for shape in whole for size in shape), default=1)
        return worst_excess(max(2 * longest, LONGEST)) + 64 * UNIT  # a record's rows are added up as well

    def _multiplies_on_tensor_cores(self) -> bool:
        """Whether it could: tensor cores of all devices round as is known."""
        devices = self.devices()
        return bool(devices) and all(products.known(device) for device in devices)

    @property
    def on_grid(self) -> OnGrid | None:
        """None: sums are float32."""
        return None

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
    def lent(self) -> bool:
        """Whether expert weights are lent: the model cannot compute by itself."""
        return self._source is not None

    @property
    def lowered(self) -> bool:
        """Whether the model was seen to compute in lower precision than its parameters are stored in."""
        return any(sites.lowered for sites in self._sites.values())

    @property
    def sensitivity(self) -> float:
        """Most that one record moves the sum, rounding included, in the L2 norm over all parameters."""
        return self.gradient_groups.bound() * (1.0 + self.eta)

    @_at_work
    def prepare(self, batch: Batch) -> None:
        """Learn from probe passes what the dimensions of the model's tensors mean, and compare with batches of one.

        Only keys, shapes and types of ``batch`` are used, and whether it has padding and labels that do not count.
        Once for each mode (train, eval), and the comparison once for each such look of a batch.

        Raises:
            NoRuleError: a trainable parameter is used in a way that cannot be bounded, or the comparison failed.
        """
        mode = self.model.training
        if mode not in self._sites:
            self._sites[mode] = learn_sites(self._passes, batch, self._sharing.at_home)
        if self.compared or (look := Look.of(batch)) in self._looks:
            return
        self._looks.add(look)
        try:
            compare_once(self, batch, look, self._sites[mode].lowered)
        except BaseException:
            self._looks.discard(look)
            raise

    @_at_work
    def accumulate(self, batch: Batch, counted: int | None = None) -> Diagnostics:
        """Add the clipped gradients of one physical batch to the sums.

        Args:
            batch: as a Hugging Face collator makes it, tensors [B, ...].
            counted: how many rows, from the first, are records; later ones add exactly zero, whatever the loss makes
                of them. Default: all.

        Returns:
            Owner-only figures of this batch.
        """
        sharing = self._sharing
        with sharing.awaited() if self.lent else nullcontext():  # then another attempt could follow
            check_batch(batch, self.model)
            self.prepare(batch)
            shared, method = sharing.with_all(
                batch_size(batch), counted, self._memory.method, self.next_method(batch)
            )
        with sharing.exchanging(lent=self.lent):
            summing = self._ghost if method == "ghost" else self._book_keeping
            return summing.accumulate(batch, shared)

    @_at_work
    def accumulate_user(self, batches: Iterable[Batch]) -> Diagnostics:
        """Add one user's gradient, summed over all records of all ``batches`` and clipped once.

        Returns:
            Figures with B = 1: the user's summed loss and the norm of the summed gradient.

        Raises:
            PrivacyError: experts are spread over ranks.
        """
        if self._sharing.spread:
            raise users_refused()
        total: Sums = {}
        loss = torch.zeros(1)
        for batch in batches:
            check_batch(batch, self.model)
            self.prepare(batch)
            records = batch_size(batch)
            ones = torch.ones(len(self.groups), records)
            losses = self._ghost.add(batch, self._sharing.at_home(records), ones, total)
            loss += losses.detach().sum().cpu()
        norms = {name: Dense(gradient.unsqueeze(0)).sq_norms() for name, gradient in total.items()}
        factors, _, diagnostics = self._sharing.at_home(1).factors(self.gradient_groups, norms, loss)
        for name, gradient in total.items():
            factor = float(single(factors[self.gradient_groups.index(name), 0]))
            if factor > 0.0:
                out = self._sums.of(name)
                out.add_(gradient.to(out.device), alpha=factor)
        return diagnostics

    def begin(self, lot: str) -> None:
        """Start anew, with a lot: ranks whose experts are spread are held to it in every batch.

        Args:
            lot: its name.
        """
        self._sums.take()
        self._sharing.begin(lot)

    def take(self) -> Sums:
        """The sums so far, a float32 tensor for every trained parameter, and start anew."""
        return self._sums.take()

    @_at_work
    def norms(self, batch: Batch) -> Tensor:
        """[B] float64 norm of each record's whole gradient; nothing is added to the sums."""
        self.prepare(batch)
        shared, _ = self._sharing.with_all(batch_size(batch), None, "ghost", "ghost")
        squares = shared.own_squares(self.gradient_groups, self._careful_squares(batch, shared))
        return torch.stack([part.value.sum(0) for part in shared.exchanged(squares)]).sum(0)[shared.own].sqrt()

    @_at_work
    def summed(self, batch: Batch, factors_B: Tensor | None = None) -> Sums:
        """The records' gradients added up by the path that adds clipped ones, with factors of the caller's.

        For the self-check alone: nothing is added to the engine's sums; of spread experts only those here compute.

        Args:
            batch: as for `accumulate`.
            factors_B: [B]; a record of factor zero is left out, whatever its numbers are. Default: one each.
        """
        self.prepare(batch)
        records = batch_size(batch)
        factors_B = torch.ones(records) if factors_B is None else factors_B
        total: Sums = {}
        shared = self._sharing.at_home(records)
        self._ghost.add(batch, shared, factors_B.expand(len(self.groups), -1), total, factors_B != 0)
        return total

    @_at_work
    def norms_by_parameter(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """Squared norm of every record's gradient of every parameter, [parameters, B], and the parameters' names.

        For the self-check alone: of spread experts only those here compute.
        """
        self.prepare(batch)
        squares = self._careful_squares(batch, self._sharing.at_home(batch_size(batch)))
        names = list(self.shapes)
        return torch.stack([squares[name].value.cpu() for name in names]), names

    def _careful_squares(self, batch: Batch, shared: SharedBatch) -> dict[str, SqNorms]:
        """The most careful squared norms by parameter, of the records that each sees."""
        squares: dict[str, SqNorms] = {}

        def ready(root: Root) -> None:
            records = shared.records(root.name)
            uses = combine_uses.bounded(combine_uses.simplify(root, records))
            squares[root.name] = combine_uses.precise_sq_norms(root, uses, records)[1]
            root.captured = []

        self._run(batch, ready, shared)
        return squares

    def _run(self, batch: Batch, ready: Ready, shared: SharedBatch) -> Tensor:
        """One captured forward and backward; returns the losses, detached."""
        return self._passes.run(batch, ready, self._sites[self.model.training], shared)

    def _device_of(self, name: str) -> torch.device:
        """Where a parameter's sum lies."""
        own = self.parameters[name].device if name in self.parameters else torch.device("cpu")
        return self._accumulate_on or own

    def devices(self) -> list[torch.device]:
        """On which trained parameters lie."""
        return list(dict.fromkeys(p.device for p in self.parameters.values()))

    def next_method(self, batch: Batch) -> Method:
        """The way in which a batch would be summed; see `MemoryChoice`."""
        return self._memory.next(batch)
