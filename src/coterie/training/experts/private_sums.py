"""A party's private sums in the `experts` exchange: what leaves it was clipped, noised, spooled and counted."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.accounting.budget import PrivacyWarning
from coterie.dp.accounting.ledger import LedgerHead
from coterie.dp.accounting.lots import Lot
from coterie.dp.accounting.spool import Release
from coterie.dp.checks import self_check
from coterie.dp.checks.between_ranks import check_between_ranks
from coterie.dp.checks.made_up import FromCollator
from coterie.dp.noise.joint_noise import LOAD
from coterie.dp.noise.pooled import contributors_in
from coterie.dp.open_run import RunEntry, open_run
from coterie.dp.party_session import Contributor
from coterie.dp.per_sample.engine import Engine
from coterie.dp.plan import ComputeOptions
from coterie.dp.private_data import PrivateData
from coterie.dp.refusals import check_model, unused_warning
from coterie.errors import BudgetError, PrivacyError
from coterie.federation.cancel import NEVER, CancelToken
from coterie.federation.experts.masking.grid import GridScale, MaskGrid
from coterie.federation.experts.masking.session import Held
from coterie.models import seam
from coterie.models.lora import expert_adapters, factors_stay_apart
from coterie.models.seam import ExpertLayer, ExpertsImplementation
from coterie.models.spread.holdings import Holdings
from coterie.models.spread.spread import SpreadExperts, spread_of
from coterie.models.streaming.cache import digest_layer
from coterie.models.streaming.streamer import HostGradients, LayerStreamer, StreamedExperts
from coterie.ranks.ranks import Ranks, ranks_or_alone
from coterie.training.data.packing import Batch, Sequences
from coterie.training.experts.constant_work import ConstantWork, no_whole_users
from coterie.training.experts.contribution import DRAW, Sums, next_batch
from coterie.training.experts.held_sums import HeldSums, expert_names, held
from coterie.training.experts.push_grid import noised_scale
from coterie.training.loop import to_device
from coterie.training.party.inputs import PrivacyInputs, party_plan

_RECORDED = (
    "recordings for an audit (`transcript`): with what all parties recorded masked sums are opened, and this party's "
    "key says which records its lots held; whoever is given them learns more than any party"
)


class PrivateSums:
    """Sums under a privacy budget; see `coterie.training.experts.contribution.Contribution`.

    Args:
        model: partial model, trunk on its device; where experts are spread over ranks, with this one's.
        layers: its MoE layers.
        records: the party's sequences; each is a record.
        inputs: see `PrivacyInputs`.
        run: name of this party's run in its ledger, known once it has joined.
        drawn: see `coterie.dp.party_session.Contributor`.
        masked: releases stay integers on the noise's grid.
        ranks: share every lot; rank 0 keeps the ledger.
        whole: the model with all adapters, where ``model`` has those of this rank's experts alone.

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
        inputs: PrivacyInputs,
        run: Callable[[], str],
        drawn: Callable[[Lot], None] = lambda lot: None,
        *,
        masked: bool = False,
        ranks: Ranks | None = None,
        whole: nn.Module | None = None,
    ) -> None:
        if inputs.push_after_s is not None and records.users is not None:
            raise no_whole_users()
        self._model, self._layers, self._records, self._inputs, self._run = model, layers, records, inputs, run
        self._drawn, self._masked, self._ranks = drawn, masked, ranks_or_alone(ranks)
        self._whole, self._spread, self._holdings = whole or model, spread_of(model), Holdings(model)
        self._names = expert_names(layers)
        check_model(model)
        self._check_covered()
        self._plan = party_plan(inputs, model)
        self._options = ComputeOptions.of_settings(inputs.spec, accumulate_on=torch.device("cpu"))
        self.balancer = self._plan.balancer(model)
        self.contributor: Contributor | None = None
        self.exhausted = False
        self._compared = False
        self._gaps: tuple[str, ...] = ()
        self._expected: LedgerHead | None = None
        self._constant: ConstantWork | None = None
        self._engine: Engine | None = None
        self._cancel = NEVER
        self._held: str | None = None  # the set of draws that the others heard is here

    def sums(self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken) -> Sums:
        contributor, released = self._released(round_no, pins, streamer, cancel)
        if released is None:
            return self.nothing()
        self.exhausted = False
        noised, release = released
        metrics = self._metrics(contributor, round_no, release)
        grid = self.grid(len(contributors_in(pins))) if self._masked else None
        own = held(noised, self._names, self._holdings)
        return Sums(own, float(self._plan.lot_size), metrics, release.digest, grid)

    def share(
        self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken
    ) -> HeldSums | None:
        _, released = self._released(round_no, pins, streamer, cancel)
        return None if released is None else held(released[0], self._names, self._holdings)

    def _released(
        self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken
    ) -> tuple[Contributor, tuple[Mapping[str, Tensor], Release] | None]:
        began = time.monotonic()
        self._cancel = cancel
        contributor = self.open_ledger(streamer)
        if self._constant is not None:
            self._constant.batches = 0
        again = self._held is not None and pins.get(DRAW) == self._held
        released = contributor.release(round_no, self._with_trunk(pins), may_draw=not again)
        self._finish_work(began)
        return contributor, released

    def nothing(self) -> Sums:
        self.exhausted = True
        spent = {} if self.contributor is None else {"epsilon": self.contributor.run.spent().epsilon}
        return Sums(None, 0.0, spent)

    def grid(self, parties: int) -> MaskGrid:
        run, plan, balancer = self._opened().run, self._plan, self.balancer
        noise = run.lot_sums.fixed_noise(plan.own_noise(run.mechanism, parties))

        def scale(name: str, bound: float) -> GridScale:
            return noised_scale(noise.step(name), bound, self._inputs.largest_lot or plan.lot_size, plan.max_lot)

        released = balancer is not None and balancer.balance.releases_loads
        loads = {LOAD: scale(LOAD, balancer.load_bound)} if released and balancer is not None else {}
        gradients = scale("gradients", run.lot_sums.engine.sensitivity)
        return MaskGrid(parties, gradients, loads, secret=plan.seed is None)

    def outlook(self, round_no: int, pins: Mapping[str, str]) -> Held:
        contributor = self._opened()
        can_draw = contributor.run.releases.remaining > 0
        held = contributor.held(round_no, self._with_trunk(pins), DRAW)
        self._held = None if held is None else held[DRAW]
        return Held(can_draw) if held is None else Held(can_draw, held[DRAW], contributors_in(held))

    def _opened(self) -> Contributor:
        if self.contributor is None:
            raise RuntimeError("masked pushes are agreed on before `open` was called")
        return self.contributor

    def _with_trunk(self, pins: Mapping[str, str]) -> dict[str, str]:
        trunk = {name: p for name, p in self._whole.named_parameters() if not p.is_meta}
        return {**pins, "trunk": digest_layer(trunk)}

    def applied(self, round_no: int, newest: int) -> None:
        """Nobody asks for spooled results up to ``round_no`` again; those up to ``newest`` go if room is short."""
        if self.contributor is not None:
            self.contributor.forget(round_no, newest)

    def check_not_behind(self, received: int) -> None:
        """Hosts received this many rounds of ours; a ledger that knows fewer was put back and stops the run."""
        if self.contributor is not None:
            if self._expected is not None:
                self.contributor.run.ledger.check_contains(self._expected)
            run = self.contributor.run
            run.ledger.check_not_behind(run.name, received)

    def ledger_head(self) -> LedgerHead | None:
        """The newest entry of the ledger, for a checkpoint."""
        return None if self.contributor is None else self.contributor.run.ledger.head()

    def expect(self, head: LedgerHead | None) -> None:
        """A checkpoint was loaded; before every attempt from now on, the ledger has to hold what it held then."""
        self._expected = head

    def privacy(self) -> dict[str, object] | None:
        if self.contributor is None:
            return None
        run = self.contributor.run
        spent = run.spent()
        return {
            "epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None,
            "delta": spent.delta,
            "noise_multiplier": run.noise_multiplier,
            "isolation": run.plan.isolation,
            "rounds": run.releases.used,
            "rounds_left": run.releases.remaining,
            "contributing": not self.exhausted,
            **({} if self._inputs.trained is None else {"trained": self._inputs.trained}),
        }

    def statement(self) -> str:
        return "" if self.contributor is None else str(self.contributor.run.statement())

    def close(self) -> None:
        if self.contributor is not None:
            self.contributor.run.close()
            self.contributor = None

    def open(self, streamer: LayerStreamer) -> None:
        """Compare the engine with batches of one on made-up records, once, and open the ledger.

        Raises:
            NoRuleError, PrivacyError: the model cannot be trained privately; nothing of the text was used.
            LedgerError: the ledger is damaged, in use, or knows the run with other numbers.
        """
        if self.contributor is None:
            engine = self._make_engine(streamer)
            experts: ExpertsImplementation
            experts = StreamedExperts(streamer, HostGradients(), expert_adapters(self._model))
            if self._spread is not None:
                experts = SpreadExperts(self._spread.trip_at_home, experts)
            with (
                self._ranks.all_well("the comparison before the first lot"),
                factors_stay_apart(self._model),
                seam.computed_by(self._model, experts),
            ):
                first, collate = self._records[0], self._records.collate
                source = FromCollator(self._model, collate, first, int(self._records.lengths.max()))
                report = self_check.check(engine, collate([first]), source, self._options.physical_batch)
            self._compared = True
            unused = unused_warning(self._model, report.unused)
            if unused is not None:
                warnings.warn(unused, PrivacyWarning, stacklevel=2)
                self._gaps = (unused,)
            opened = self.open_ledger(streamer)
            if self._spread is not None:
                assert self._engine is not None
                owners = opened.run.lot_sums.ownership
                like = to_device(collate([first]), self._device)
                with self._ranks.exchanging():
                    check_between_ranks(self._engine, self._ranks, owners, like, streamer)

    def open_ledger(self, streamer: LayerStreamer) -> Contributor:
        """Open the ledger and what was spooled; uses no weights."""
        if self.contributor is None:
            inputs = self._inputs
            data = PrivateData.of(
                self._records, self._collate, users=self._records.users,
                records_per_user=self._plan.records_per_user, digest=inputs.digest, originals=inputs.originals,
            )  # fmt: skip
            entry = RunEntry(
                inputs.spec.ledger, self._run(), inputs.artefacts, inputs.record, self._compared,
                (*self._gaps, *((_RECORDED,) if self._masked and inputs.recorded else ())), trained=inputs.trained,
            )  # fmt: skip
            engine = self._engine = self._make_engine(streamer)
            self._constant = None if inputs.push_after_s is None else self._one_shape()
            self.contributor = Contributor(
                open_run(
                    self._plan,
                    self._options,
                    data,
                    self._model,
                    engine,
                    self.balancer,
                    entry,
                    self._constant,
                    self._ranks,
                ),
                self._drawn,
                as_integers=self._masked,
            )
            self._check_noise(self.contributor, inputs.largest_noise)
        return self.contributor

    def _check_noise(self, contributor: Contributor, largest: float) -> None:
        multiplier = contributor.run.noise_multiplier
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
        return self._options.engine(self._plan, self._model, self.balancer, streamer, shapes)

    @property
    def _device(self) -> torch.device:
        """Where the trunk computes."""
        return next(p for p in self._model.parameters() if not p.is_meta).device

    def _one_shape(self) -> ConstantWork:
        length = self._inputs.sequence_length
        longest = length or max(len(self._records[row]["input_ids"]) for row in range(len(self._records)))
        return ConstantWork(
            1 if self._plan.isolation == "exact" else self._options.physical_batch,
            longest,
            math.ceil((self._plan.max_lot or len(self._records)) / self._ranks.world),
            self._records.pad_id,
            self._device,
        )

    def _collate(self, items: list[Any]) -> Batch:
        next_batch(self._ranks, self._cancel, spread=self._spread is not None)
        with self._ranks.awaited() if self._spread is not None else nullcontext():
            return self._records.collate(items)

    def _finish_work(self, began: float) -> None:
        """In constant-work mode: compute what the lot did not need, and wait for the fixed moment."""
        after = self._inputs.push_after_s
        if after is None or self._constant is None or self._engine is None:
            return
        self._constant.fill_up(self._engine)
        while time.monotonic() - began < after:
            self._cancel.check()
            time.sleep(min(0.05, max(0.0, after - (time.monotonic() - began))))

    def _metrics(self, contributor: Contributor, round_no: int, release: Release) -> dict[str, float]:
        run = contributor.run
        metrics: dict[str, float] = {**asdict(run.spent()), "noise_multiplier": run.noise_multiplier}
        metrics |= {f"{what}_seconds": seconds for what, seconds in run.seconds.items()}
        if self.balancer is not None:
            metrics |= self.balancer.figures()
        last = run.lot_sums.last
        if last is not None and last.round == round_no:
            metrics |= {
                "loss_not_private": last.loss,
                "drawn_not_private": last.drawn,
                "clipped_not_private": last.clipped,
                "not_finite_not_private": last.masked,
            }
        return metrics
