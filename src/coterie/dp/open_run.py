"""One private run, opened: the same for a session of one party and for a party of a federation.

Opening checks the lots against the data, finds the noise that the budget needs, writes the run into the ledger (or
holds a resumed one to its entry), takes up what was spooled, and joins sums, noise and releases. From then on a round
is `OpenRun.begin` and `OpenRun.publish`; what is done with a release is the caller's business.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.budget import PrivacyWarning, Spent
from coterie.dp.accounting.dataset import ordered_digest
from coterie.dp.accounting.ledger import Ledger, open_ledger
from coterie.dp.accounting.lots import Lot, LotPlan, draw_lot
from coterie.dp.accounting.provenance import Artefact, not_covered
from coterie.dp.accounting.releases import Pending, Releases
from coterie.dp.accounting.run_entry import RunStart
from coterie.dp.accounting.spool import Durable, Release, Spool, shard_folder
from coterie.dp.accounting.statement import Statement, make_statement
from coterie.dp.balance import Balancer
from coterie.dp.checks.between_ranks import check_between_ranks
from coterie.dp.lot_sums import LotSums
from coterie.dp.noise.discrete_gaussian import Slabs
from coterie.dp.noise.joint_noise import LOAD, WITHIN
from coterie.dp.noise.past_noise import PastNoise
from coterie.dp.noise.pooled import contributors_in
from coterie.dp.noise.randomness import RandomSource, random_source
from coterie.dp.per_sample import products
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.shared_batch import users_refused
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.dp.shared_releases import SharedReleases
from coterie.dp.sum_engine import ConstantShape, SumEngine
from coterie.errors import LedgerError, PrivacyError, RankError
from coterie.models.spread.holdings import Holdings
from coterie.models.spread.spread import spread_of
from coterie.models.tensors import raw_bytes
from coterie.ranks.ranks import Ranks, ranks_or_alone
from coterie.revision import software


@dataclass(frozen=True)
class RunEntry:
    """Where a run is counted, and what its entry says beside the plan.

    Attributes:
        ledger: root of the ledgers; None: the user's data folder.
        run: identifier; the same after a restart.
        artefacts: what the start was made from.
        record: what one record is, in public words and numbers.
        self_check: the engine was compared with one record at a time.
        gaps: lines for what the statement lists as not covered, beside those of the artefacts.
        resumed: the entry exists, and the run is held to it.
        trained: what of the model is, in words; None: nothing is said.
    """

    ledger: Path | str | None
    run: str
    artefacts: Sequence[Artefact] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    self_check: bool = False
    gaps: Sequence[str] = ()
    resumed: bool = False
    trained: str | None = None


@dataclass
class OpenRun:
    """A run whose ledger is open; `open_run` makes it.

    Attributes:
        name: identifier in the ledger.
        plan, options, data: as given.
        lots: how lots are drawn.
        mechanism: what one round costs.
        ranks: that share the run.
        shared: what this run released, as all its ranks see it.
        lot_sums: from a lot to its sums.
        source: of everything random.
        dataset: digest of the records.
        not_covered: lines of the statement about this run's own gaps.
        past_noise: of this rank's values, where noise is in bands.
        seconds: how long the parts of the last round took in this process; owner-only.
    """

    name: str
    plan: PrivacyPlan
    options: ComputeOptions
    data: PrivateData
    lots: LotPlan
    mechanism: Mechanism
    ranks: Ranks
    shared: SharedReleases
    lot_sums: LotSums
    source: RandomSource
    dataset: str
    not_covered: Sequence[str]
    past_noise: PastNoise | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def noise_multiplier(self) -> float:
        """Sigma of every round."""
        return self.mechanism.noise_multiplier

    @property
    def ledger(self) -> Ledger:
        """Of the dataset; rank 0 keeps it."""
        return self.releases.ledger

    @property
    def releases(self) -> Releases:
        """What this run released; rank 0 keeps them."""
        return self.shared.own

    def begin(self, round_no: int, pins: Mapping[str, str], *, may_draw: bool = True) -> Pending | Release:
        """What to do for a round; see `Releases.begin`.

        Args:
            round_no: from 1.
            pins: digests of everything that the sums are computed from.
            may_draw: False where others rely on what was drawn for these pins before. Rank 0's word counts.

        Raises:
            BudgetError: no release is left.
            LedgerError: ``dp-draw-gone``: a lot would have to be drawn, and none may be.
        """
        self.seconds = {}

        def draw(number: int) -> Lot:
            if not may_draw:
                raise _draw_gone(round_no)
            return draw_lot(round_no, self.lots, self.data.units, self.source, number, self.releases.used)

        return self.shared.begin(round_no, pins, draw)

    def publish(
        self,
        pending: Pending,
        divisor: float = 1.0,
        *,
        as_integers: bool = False,
        to_all: bool = True,
        durable: Durable = "first",
    ) -> tuple[dict[str, Tensor], Release]:
        """Compute a pending lot, noise it, spool and count the result; the model is not changed.

        Each rank computes its part of the lot. Then every value has one owner, who gets all ranks' sums of it, adds
        the noise and puts it on disk; what the others had of it is gone before noised values are handed out.

        Args:
            pending: of `begin`.
            divisor: public; what is released is the noised sums over it.
            as_integers: release them as they lie on the grid; see `coterie.dp.noise.discrete_gaussian.add_noise`.
            to_all: hand out everything; otherwise gradients stay with their owners, and lie nowhere else.
            durable: see `coterie.dp.accounting.spool.Durable`.

        Returns:
            Float32 (or int64) tensors on the CPU by parameter name, and the release that holds them.
        """
        earlier = self.shared.spooled(pending)
        if earlier is not None:
            return self.tensors(earlier), earlier
        ranks, owners, began = self.ranks, self.lot_sums.ownership, time.monotonic()
        # From the pins, which are spooled and counted with the result: what is said of its noise is what it has.
        self.lot_sums.noise_multiplier = self.plan.own_noise(self.mechanism, len(contributors_in(pending.pins)))
        sums = self.lot_sums.compute(pending.lot, pending.name)
        slabs = self.lot_sums.noise(sums).cut(sums, self.lot_sums.holdings.parts(), as_integers=as_integers)
        del sums  # with isolation: exact they take twice the memory of what is spooled
        for sharing, owner, names in owners.by_owner(tuple(slabs.noised)):
            sharing.add_up(slabs.sums(names), owner)
            if not to_all and sharing.rank != owner:
                slabs.let_go(set(names) - {LOAD, WITHIN})
        summed, own = time.monotonic(), owners.own(slabs.noised)
        with ranks.all_well(f"noise {pending.name}"):
            keep = self._add_noise(slabs, own, f"noise|{pending.name}", divisor)
            slabs.keep_noised(own)
        drawn = time.monotonic()
        release = self.shared.publish(pending, slabs.parts(own), durable)
        keep()
        handed_out = slabs.noised.keys() if to_all else {LOAD, WITHIN} & slabs.noised.keys()
        for sharing, owner, names in owners.by_owner(handed_out):
            sharing.hand_out(slabs.targets(names), owner)
        self.seconds = {"sums": summed - began, "noise": drawn - summed, "spool": time.monotonic() - drawn}
        return {name: slabs.noised[name] for name in {*handed_out, *own}}, release

    def _add_noise(self, slabs: Slabs, own: Sequence[str], purpose: str, divisor: float) -> Callable[[], None]:
        """Noise a rank's own sums; what is returned is to be called when they are released."""
        past = self.past_noise
        if past is None:
            slabs.add_noise(own, self.source, purpose, divisor)
            return lambda: None
        slot = self.shared.slot
        sums = past.mix(slabs, own, slot)
        slabs.add_noise(own, self.source, purpose, divisor * past.main)
        return lambda: past.keep(sums, slabs, own, slot, divisor)

    def tensors(self, release: Release) -> dict[str, Tensor]:
        """What a release holds, by parameter name, at every rank."""
        return self.lot_sums.shaped(self.lot_sums.holdings.joined(self.shared.pieces(release)))

    def own_tensors(self, release: Release) -> dict[str, Tensor]:
        """What a release holds, by the names in its files, each at one rank, whichever noised it."""
        return self.lot_sums.shaped(self.shared.own_parts(release))

    def spent(self) -> Spent:
        """What this run has spent so far, at the budget's delta; infinite for a seeded run."""
        return self.ledger.spent(self.name, self.plan.budget.delta)

    def statement(self) -> Statement:
        """What is promised about the records, as of now."""
        return make_statement(self.ledger, self.name, self.plan.budget, self.plan.clip_norm, self.not_covered)

    def close(self) -> None:
        """Let another process go on with this run."""
        self.shared.close()


def open_run(
    plan: PrivacyPlan,
    options: ComputeOptions,
    data: PrivateData,
    model: nn.Module,
    engine: SumEngine,
    balancer: Balancer | None,
    entry: RunEntry,
    shape: ConstantShape | None = None,
    ranks: Ranks | None = None,
) -> OpenRun:
    """Open a run, before anything is released.

    Args:
        plan: what bounds its cost.
        options: how it computes.
        data: what lots are drawn from.
        model: every parameter that requires a gradient is released with noise, also those whose values are elsewhere
            (the engine was told their shapes).
        engine: sums clipped gradients as the plan says.
        balancer: adds the lot's expert loads to the release where the plan's balance needs them.
        entry: where the run is counted.
        shape: fills every batch up to one shape.
        ranks: that share the run, and all call this; None: this process alone.

    Raises:
        BudgetError: an impossible budget or lot.
        PrivacyError: none were given, and a launcher started several processes.
        RankError: they do not agree on model, data or plan, or compute something else together than alone.
        ProvenanceError: the start was made from private records.
        LedgerError: the ledger is damaged, in use, or knows the run with other numbers.
    """
    ranks = ranks_or_alone(ranks)
    compared = options.self_check and isinstance(engine, Engine) and engine.on_grid is None and not engine.lent
    lent = isinstance(engine, Engine) and engine.lent  # then whoever lends compares, before the first lot
    _check_devices(ranks, model, compared or lent)
    gaps = [*not_covered(entry.artefacts), *entry.gaps]
    lots = plan.lots(data.units.count)
    if not entry.resumed:
        plan.check_secrecy()
        plan.budget.warn_for(data.units.count, "record" if data.units.starts is None else "user")
    mechanism = plan.mechanism(lots)
    dataset, source = data.digest(), random_source(plan.seed)
    order = None if plan.bands is None else ordered_digest(data.records)
    start = RunStart(plan, mechanism, data.units, engine, order)
    _check_spread(ranks, model, data, plan)
    if options.tensor_cores and not start.tensor_cores and ranks.rank == 0:
        warnings.warn(_without_effect(engine), PrivacyWarning, stacklevel=3)
    ranks.agree("the start of the run", lambda: _facts(start, model, data, entry, options))
    Holdings(model).replicas.agree("the experts of the run", lambda: {"the experts": experts_digest(model)})
    sums = LotSums(model, data, engine, balancer, plan, options, plan.own_noise(mechanism), source, ranks, shape)
    if compared:
        assert isinstance(engine, Engine)
        device = next(iter(engine.parameters.values())).device
        check_between_ranks(engine, ranks, sums.ownership, data.batch(np.zeros(1, np.int64), device))
    kept: list[Releases] = []

    def start_ledger() -> str:
        ledger = open_ledger(dataset, entry.ledger)
        if entry.resumed:
            start.check(ledger, entry.run)
        else:
            start.open(
                ledger, entry.run, entry.artefacts, entry.record, entry.self_check, data.originals(), entry.trained
            )  # fmt: skip
        kept.append(Releases(ledger, Spool(ledger.folder / "spool" / entry.run), entry.run))
        return str(kept[0].spool.folder)

    folder = Path(ranks.tell("the ledger", start_ledger))
    with ranks.all_well("the spools"):
        spool = None if kept else Spool(shard_folder(folder, ranks.rank))
    shared = SharedReleases(ranks, kept[0] if kept else None, spool)
    past = None if plan.bands is None else PastNoise(plan.bands)
    return OpenRun(entry.run, plan, options, data, lots, mechanism, ranks, shared, sums, source, dataset, gaps, past)


def _draw_gone(round_no: int) -> LedgerError:
    return LedgerError(
        f"what was drawn for round {round_no} is no longer in the spool.",
        code="dp-draw-gone",
        why="the other parties push what they drew with it again; beside new noise of this party it would be worth "
        "less to them than they promise",
        fix="the attempt is given up, and all draw anew in the next one; see what removes files from the spool",
    )


def _check_devices(ranks: Ranks, model: nn.Module, compared: bool) -> None:
    """Let rows and layers go between GPUs only where a run compares, before anything is spent, what ranks compute.

    With whole models nothing goes from GPU to GPU but weights, after a step: sums are added up in host memory.

    Raises:
        RankError: experts are spread over ranks, a parameter is on a GPU, and nothing is compared.
    """
    elsewhere = next((name for name, p in model.named_parameters() if p.device.type not in ("cpu", "meta")), None)
    spread = ranks.world > 1 and spread_of(model) is not None
    if spread and elsewhere is not None and not compared:
        raise RankError(
            f"`{elsewhere}` is on a GPU, and what several ranks compute together would not be compared there.",
            code="ranks-device",
            why="ranks have not been tried on GPUs; what guards a run is the comparison with one record at a time, "
            "which self_check=False and engines of one's own leave out",
            fix="train with whole models (devices alone), on CPUs (device: cpu), or with what is compared",
        )


def _check_spread(ranks: Ranks, model: nn.Module, data: PrivateData, plan: PrivacyPlan) -> None:
    """Make sure that the ranks that hold a model's experts are those that share the run, and can do as it plans.

    Raises:
        RankError: they are others.
        PrivacyError: units are users, or noise is in bands.
    """
    spread = spread_of(model)
    if spread is None:
        return
    group, replicas = spread.ranks, spread.replicas
    place = replicas.rank * group.world + group.rank
    if (place, group.world * replicas.world) != (ranks.rank, ranks.world):
        raise RankError(
            f"the experts are spread over {group.world * replicas.world} ranks, and {ranks.world} share the run.",
            code="ranks-spread",
            why="tokens would travel to ranks that do not wait for them",
            fix="give make_private the ranks that the experts were spread over",
        )
    if data.units.starts is not None:
        raise users_refused()
    if plan.bands is not None:
        raise PrivacyError(
            "noise in bands is not possible where experts are spread over ranks.",
            code="dp-spread-bands",
            why="what such runs release has not been compared with what one process does",
            fix="train with whole models at each rank (devices alone), or leave out noise_bands",
        )


def _without_effect(engine: SumEngine) -> str:
    """One sentence on a setting that changes nothing here."""
    unknown = (
        [device for device in engine.devices() if not products.known(device)] if isinstance(engine, Engine) else []
    )
    if engine.on_grid is not None:
        why = "with isolation: exact there are no such products"
    elif unknown:
        why = f"how {unknown[0]} rounds on tensor cores is not known, or it has none"
    else:
        why = "the engine is one of your own, or nothing that is trained lies on this device"
    return f"`tensor_cores` is without effect here, norms and sums are taken in float32: {why}"


def _facts(
    start: RunStart, model: nn.Module, data: PrivateData, entry: RunEntry, options: ComputeOptions
) -> dict[str, Any]:
    """What has to be the same at all ranks of a run."""
    return {
        "versions": {**software(), "torch": torch.__version__},
        "the run": entry.run,
        "the dataset": data.digest(),
        # The dataset's name says nothing of order, and a text that ranks have at two numbers would be two units.
        "the records": ordered_digest(data.records),
        "the plan": repr(start.plan),
        "the noise": start.mechanism.to_json(),
        "the weights": weights_digest(model),
        "the setting tensor_cores": options.tensor_cores,
        "the use of tensor cores": start.tensor_cores,
        **start.facts(),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers with their names; of those elsewhere the shapes alone.

    Of experts that are spread over ranks it says nothing: what is hashed is the same at all of them.
    """
    parts = Holdings(model)
    return _digest((name, own) for name, own in _values_of(model) if not parts.is_part(name))


def experts_digest(model: nn.Module) -> str:
    """SHA-256 of this rank's experts, where they are spread: the same at all ranks that hold these."""
    parts = Holdings(model)
    return _digest((name, own) for name, own in _values_of(model) if parts.is_part(name))


def _values_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{tensor.requires_grad}".encode())
        if not tensor.is_meta:
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()
