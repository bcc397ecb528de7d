"""A party's private sums in the `experts` exchange: what leaves it was clipped, noised, spooled and counted."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp import selfcheck
from coterie.dp.balance import Balance, Balancer
from coterie.dp.budget import Budget, PrivacyWarning
from coterie.dp.clipping import policy
from coterie.dp.contributor import Contributor, Plan
from coterie.dp.engine import Engine
from coterie.dp.isolation import chosen, computes_in_half, make_engine
from coterie.dp.ledger import Head
from coterie.dp.losses import default_loss
from coterie.dp.lot_sums import SumEngine
from coterie.dp.lots import Lot
from coterie.dp.made_up import FromCollator
from coterie.dp.refusals import check_model, unused_warning
from coterie.dp.spool import Release
from coterie.errors import BudgetError, PrivacyError
from coterie.federation.participant import superseded
from coterie.models import seam
from coterie.models.lora import expert_adapters, factors_stay_apart
from coterie.models.seam import ExpertLayer
from coterie.models.streaming import HostGradients, LayerStreamer, StreamedExperts
from coterie.models.weight_cache import digest_layer
from coterie.training.constant_work import ConstantWork, no_whole_users
from coterie.training.contribution import Sums
from coterie.training.packing import Batch, Sequences
from coterie.training.party_parts import PrivacyParts


class PrivateSums:
    """Sums under a privacy budget; see `coterie.training.contribution.Contribution`.

    Args:
        model: partial model, trunk on its device.
        layers: its MoE layers.
        records: the party's sequences; each is a record.
        parts: see `PrivacyParts`.
        run: name of this party's run in its ledger, known once it has joined.
        drawn: see `coterie.dp.contributor.Contributor`.

    Flat clipping is by book-keeping unless the method says otherwise: one pass over the streamed weights forward and
    one backward, the rows kept; ``ghost`` keeps no rows and streams the weights twice as often.

    Attributes:
        contributor: the party's ledger and releases; None until the party has joined.
        balancer: keeps experts evenly used; None where nothing does.
        exhausted: the budget allowed no further round, so nothing was contributed to the last one.

    Raises:
        ConfigError: settings that a federation cannot keep.
        PrivacyError, NoRuleError: a model that cannot be trained privately.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertLayer],
        records: Sequences,
        parts: PrivacyParts,
        run: Callable[[], str],
        drawn: Callable[[Lot], None] = lambda lot: None,
    ) -> None:
        if parts.push_after_s is not None and records.users is not None:
            raise no_whole_users()
        self._model, self._layers, self._records, self._parts, self._run = model, layers, records, parts, run
        self._drawn = drawn
        self._names = {
            f"{layer.name}.{name}": (layer.index, name)
            for layer in layers
            for name, param in layer.parameters().items()
            if param.requires_grad
        }
        check_model(model)
        self._check_covered()
        spec = parts.spec
        balance = Balance(spec.balance, spec.balance_coefficient, spec.load_share, spec.load_smoothing)
        self.balancer = Balancer(balance, model, default_loss) if balance.mode != "off" else None
        self._in_half = computes_in_half(model)
        self._isolation = chosen(spec.isolation, self._in_half, against_hosts=True)
        self.contributor: Contributor | None = None
        self.exhausted = False
        self._compared = False
        self._gaps: tuple[str, ...] = ()
        self._expected: Head | None = None
        self._constant: ConstantWork | None = None
        self._alive: Callable[[], bool] = lambda: True

    def sums(self, round: int, pins: Mapping[str, str], streamer: LayerStreamer, alive: Callable[[], bool]) -> Sums:
        began = time.monotonic()
        self._alive = alive
        contributor = self.open_books(streamer)
        if self._constant is not None:
            self._constant.batches = 0
        trunk = {name: p for name, p in self._model.named_parameters() if not p.is_meta}
        made = contributor.release(round, {**pins, "trunk": digest_layer(trunk)})
        self._finish_work(began)
        self.exhausted = made is None
        if made is None:
            return Sums(None, {}, 0.0, {"epsilon": contributor.spent().epsilon})
        noised, release = made
        experts: dict[int, dict[str, Tensor]] = {layer.index: {} for layer in self._layers}
        for full, (layer, name) in self._names.items():
            experts[layer][name] = noised[full]
        rest = {name: value for name, value in noised.items() if name not in self._names}
        figures = self._figures(contributor, round, release)
        return Sums(experts, rest, float(contributor.expected_lot), figures, release.digest)

    def applied(self, round: int, newest: int) -> None:
        """Nobody will ask for spooled results up to ``round`` again; those up to ``newest`` go if room is short."""
        if self.contributor is not None:
            self.contributor.forget(round, newest)

    def check_not_behind(self, received: int) -> None:
        """Hosts received this many rounds of ours; a ledger that knows fewer was put back and stops the run."""
        if self.contributor is not None:
            if self._expected is not None:
                self.contributor.check_contains(self._expected)
            self.contributor.check_not_behind(received)

    def ledger_head(self) -> Head | None:
        """The newest entry of the ledger, for a checkpoint."""
        return None if self.contributor is None else self.contributor.head()

    def expect(self, head: Head | None) -> None:
        """A checkpoint was loaded; before every attempt from now on, the ledger has to hold what it held then."""
        self._expected = head

    def privacy(self) -> dict[str, object] | None:
        if self.contributor is None:
            return None
        contributor, spent = self.contributor, self.contributor.spent()
        return {
            "epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None,
            "delta": spent.delta,
            "noise_multiplier": contributor.noise_multiplier,
            "isolation": contributor.isolation,
            "rounds": contributor.rounds_released(),
            "rounds_left": contributor.rounds_left(),
            "contributing": not self.exhausted,
        }

    def statement(self) -> str:
        return "" if self.contributor is None else str(self.contributor.statement())

    def close(self) -> None:
        if self.contributor is not None:
            self.contributor.close()
            self.contributor = None

    def open(self, streamer: LayerStreamer) -> None:
        """Compare the engine with batches of one on made-up records, once, and open the ledger.

        Raises:
            NoRuleError, PrivacyError: the model cannot be trained privately; nothing of the text was used.
            LedgerError: the ledger is damaged, in use, or knows the run with other numbers.
        """
        if self.contributor is None:
            engine = self._make_engine(streamer)
            adapters = expert_adapters(self._model)
            with (
                factors_stay_apart(self._model),
                seam.computed_by(self._model, StreamedExperts(streamer, HostGradients(), adapters)),
            ):
                first, collate = self._records[0], self._records.collate
                source = FromCollator(self._model, collate, first, int(self._records.lengths.max()))
                report = selfcheck.check(engine, collate([first]), source, self._parts.spec.physical_batch)
            self._compared = True
            unused = unused_warning(self._model, report.unused)
            if unused is not None:
                warnings.warn(unused, PrivacyWarning, stacklevel=2)
                self._gaps = (unused,)
            self.open_books(streamer)

    def open_books(self, streamer: LayerStreamer) -> Contributor:
        """Open the ledger and what was spooled; uses no weights."""
        if self.contributor is None:
            spec, parts = self._parts.spec, self._parts
            made = self._make_engine(streamer)
            engine: SumEngine = made
            plan = Plan(
                budget=Budget(spec.epsilon, spec.delta),
                rounds=parts.rounds,
                lot_size=spec.lot_size or 1,
                clip_norm=spec.clip_norm,
                physical_batch=spec.physical_batch,
                sampler=spec.sampler,
                max_lot=spec.max_lot,
                records_per_user=spec.records_per_user,
                seed=parts.seed,
                sigma=parts.sigma,
                isolation=self._isolation,
                half_precision=self._in_half,
            )
            if parts.push_after_s is not None:
                engine = self._constant = self._steadied(made)
            self.contributor = Contributor(
                self._model, self._records, self._collate, engine, plan, ledger=spec.ledger, run=self._run(),
                digest=parts.digest, users=self._records.users, artefacts=parts.artefacts, balancer=self.balancer,
                record=parts.record, originals=parts.originals, self_check=self._compared,
                gaps=self._gaps, drawn=self._drawn,
            )  # fmt: skip
            self._check_noise(self.contributor, parts.largest_noise)
        return self.contributor

    def _check_noise(self, contributor: Contributor, largest: float) -> None:
        multiplier = contributor.noise_multiplier
        if multiplier > largest:
            self.close()
            raise BudgetError(
                f"This party's budget needs {multiplier:.4g} times the clip norm in noise; hosts take {largest:.4g}.",
                code="dp-noise-beyond-agreed",
                where="set-up of the party; nothing has left it",
                why="noise beyond what the agreed epsilon can need would drown everybody's sums",
                fix="ask for an epsilon and delta nearer to those of federation.yaml",
            )

    def _check_covered(self) -> None:
        """Everything that is trained has to get noise."""
        known = self._names.keys()
        outside = [n for n, p in self._model.named_parameters() if p.requires_grad and p.is_meta and n not in known]
        if outside:
            raise PrivacyError(
                f"`{outside[0]}` is trainable, but no host stores it ({len(outside)} in all).",
                code="dp-outside-mechanism",
                where="set-up of the party; nothing has left it",
                why="what is trained outside the mechanism gets no noise, and would void the guarantee",
                fix="freeze it with requires_grad_(False), or leave out the module that owns it",
            )

    def _make_engine(self, streamer: LayerStreamer) -> Engine:
        shapes = {
            f"{layer.name}.{name}": param.shape
            for layer in self._layers
            for name, param in layer.parameters().items()
            if param.requires_grad
        }
        clipping = policy(self._parts.spec.clipping, self._parts.spec.clip_norm)
        cpu = torch.device("cpu")
        return make_engine(
            self._isolation, self._model, self.balancer, clipping, self._parts.spec.method, streamer, shapes, cpu
        )

    def _steadied(self, engine: Engine) -> ConstantWork:
        spec, length = self._parts.spec, self._parts.sequence_length
        longest = length or max(len(self._records[row]["input_ids"]) for row in range(len(self._records)))
        device = next(p for p in self._model.parameters() if not p.is_meta).device
        return ConstantWork(
            engine,
            1 if self._isolation == "exact" else spec.physical_batch,
            longest,
            spec.max_lot or len(self._records),
            self._records.pad_id,
            device,
        )

    def _collate(self, items: list[Any]) -> Batch:
        if not self._alive():
            raise superseded()
        return self._records.collate(items)

    def _finish_work(self, began: float) -> None:
        """In constant-work mode: compute what the lot did not need, and wait for the fixed moment."""
        after = self._parts.push_after_s
        if after is None or self._constant is None:
            return
        self._constant.fill_up()
        while time.monotonic() - began < after:
            if not self._alive():
                raise superseded()
            time.sleep(min(0.05, max(0.0, after - (time.monotonic() - began))))

    def _figures(self, contributor: Contributor, round: int, release: Release) -> dict[str, float]:
        figures: dict[str, float] = {"epsilon": contributor.spent().epsilon}
        figures |= {f"{what}_seconds": seconds for what, seconds in contributor.seconds.items()}
        last = contributor.last
        if last is not None and last.round == round:
            figures |= {
                "loss_not_private": last.loss,
                "lot_size_not_private": last.lot_size,
                "clipped_not_private": last.clipped,
                "not_finite_not_private": last.masked,
            }
        return figures
