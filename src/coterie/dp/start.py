"""The way of one party's session to its open run: refuse what would make a privacy statement untrue, before training.

A run that is started and one that is resumed pass the same checks on the same parts.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from coterie.dp import checkpoint
from coterie.dp.accounting.budget import PrivacyWarning
from coterie.dp.accounting.provenance import Artefact, as_loaded, declared
from coterie.dp.balance import Balancer
from coterie.dp.checks import self_check
from coterie.dp.checks.comparison import ComparisonReport
from coterie.dp.checks.made_up import FromCollator, SyntheticRecord
from coterie.dp.checks.records import check_records
from coterie.dp.checks.watched import Watched
from coterie.dp.clipping import Clipping
from coterie.dp.losses import LossFunction, check_own_loss
from coterie.dp.open_run import OpenRun, RunEntry, open_run
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.memory_choice import Method
from coterie.dp.per_sample.probe import synthetic_batch
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import Collate, PrivateData
from coterie.dp.refusals import check_rows, unused_warning
from coterie.dp.saved_plan import plan_from_json
from coterie.dp.stepping import check_adds_up, check_optimizer
from coterie.dp.sum_engine import SumEngine
from coterie.errors import PrivacyError
from coterie.models import seam
from coterie.models.spread.spread import at_home, spread_of
from coterie.ranks.ranks import Ranks, ranks_or_alone


def start_run(  # noqa: PLR0913 - one for each argument of `make_private` that plan and options do not hold
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: PrivateData,
    plan: PrivacyPlan,
    options: ComputeOptions,
    *,
    loss_fn: LossFunction | None = None,
    engine: SumEngine | None = None,
    provenance: Mapping[str, str] | Iterable[Artefact] | None = None,
    ledger: str | Path | None = None,
    run: str | None = None,
    record: Mapping[str, Any] | None = None,
    trained: str | None = None,
    ranks: Ranks | None = None,
) -> OpenRun:
    """Check everything, then open a new run; see `coterie.dp.make_private`.

    ``data`` and ``plan`` stand for its arguments; the others are the same. ``trained`` says in words what of the
    model is, for ledger and statement; None: how many of its values.
    """
    ranks = ranks_or_alone(ranks)
    with ranks.all_well("the checks before the first lot"):
        lots = plan.lots(data.units.count)
        artefacts = as_loaded(declared(provenance), model)
        parts = _RunParts.of(model, data, plan, options, loss_fn, engine)
        check_optimizer(model, optimizer, shared=ranks.world > 1)
        check_adds_up(optimizer, plan.bands)
        plan.mechanism(lots)  # kept: a budget out of reach is said before anything is computed
        with at_home(model):
            report = parts.check()
    unused = unused_warning(model, report.unused) if report is not None else None
    if unused is not None:
        warnings.warn(unused, PrivacyWarning, stacklevel=4)
    column = {} if data.user_column is None else {"user_column": data.user_column}
    entry = RunEntry(
        ledger,
        ranks.tell("the run's name", lambda: run or secrets.token_hex(6)),
        artefacts,
        {**(record or {}), **column},
        self_check=report is not None,
        gaps=() if unused is None else (unused,),
        trained=trained or _part_trained(model),
    )
    return open_run(plan, options, data, model, parts.engine, parts.balancer, entry, ranks=ranks)


def _part_trained(model: nn.Module) -> str | None:
    """How much of a model is trained, in words; None: all of it."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    if all(trained for _, trained in sizes):
        return None
    if spread_of(model) is not None:  # this rank holds only some
        return "some values of the model; the others stay as they were loaded"
    some, whole = sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
    return f"{some:,} of the model's {whole:,} values; the others stay as they were loaded"


def resume_run(  # noqa: PLR0913 - the arguments of `PrivateSession.resume`
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    collate_fn: Collate | None = None,
    loss_fn: LossFunction | None = None,
    *,
    ledger: str | Path | None = None,
    digest: str | None = None,
    users: Sequence[Hashable] | None = None,
    clipping: str | Clipping | None = None,
    method: Method | None = None,
    engine: SumEngine | None = None,
    ranks: Ranks | None = None,
) -> OpenRun:
    """Open the run of a checkpoint again, after the same checks; see `coterie.dp.PrivateSession.resume`.

    Raises:
        PrivacyError: something that the run rests on is not in the checkpoint and was not given.
        LedgerError: the ledger says otherwise.
    """
    ranks = ranks_or_alone(ranks)
    facts = checkpoint.read(path).facts
    data = PrivateData.of(
        dataset, collate_fn, user_column=facts["settings"]["user_column"], users=users,
        records_per_user=facts["user_cap"], digest=digest,
    )  # fmt: skip
    if data.units.cap != facts["user_cap"]:
        raise PrivacyError(
            "the session protects users, and nobody says which record is whose.",
            code="dp-resume-users",
            why="every record would become a unit of its own",
            fix="pass the same users: PrivateSession.resume(..., users=...)",
        )
    plan, options = plan_from_json(facts, clipping, method)
    parts = _RunParts.of(model, data, plan, options, loss_fn, engine)
    entry = RunEntry(ledger or facts["ledger_root"], facts["run"], gaps=facts["not_covered"], resumed=True)
    opened = open_run(plan, options, data, model, parts.engine, parts.balancer, entry, ranks=ranks)
    try:
        with ranks.all_well("the checks before the next lot"):
            check_optimizer(model, optimizer, shared=ranks.world > 1)
            check_adds_up(optimizer, plan.bands)
            with at_home(model):
                parts.check()
    except BaseException:
        opened.close()
        raise
    return opened


class _RunParts(NamedTuple):
    """What computes a run, before its ledger is opened."""

    model: nn.Module
    data: PrivateData
    options: ComputeOptions
    loss_fn: LossFunction | None
    engine: SumEngine
    balancer: Balancer | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: PrivateData,
        plan: PrivacyPlan,
        options: ComputeOptions,
        loss_fn: LossFunction | None,
        engine: SumEngine | None,
    ) -> _RunParts:
        """A ready engine, or the one of the plan."""
        plan.policy()  # a ready engine has to clip to the plan's norm, too
        if seam.expert_layers(model):
            seam.select(model)
        balancer = plan.balancer(model, loss_fn)
        ready = engine or options.engine(plan, model, balancer or loss_fn)
        return cls(model, data, options, loss_fn, ready, balancer)

    def check(self) -> ComparisonReport | None:
        """Read every record once, then compare the engine with one record at a time, on made-up records.

        Returns:
            None where no self-check is wanted, and for an engine of the caller's own, which cannot be compared.
        """
        extent = check_records(self.data, self.model, self.loss_fn, self.options.physical_batch)
        if not self.options.self_check or not isinstance(self.engine, Engine):
            return None
        item = self.data.visible[0]
        example = self.data.collate([item])
        check_rows(example, 1)
        if self.loss_fn is None:
            check_own_loss(self.model, synthetic_batch(self.model, example, 1, 7))
        source = FromCollator(self.model, self.data.collate, item, extent.longest, extent.padding, extent.numbers)
        if extent.numbers and not _computes(self.engine, source):
            # Numbers that mean something of the record, such as its length.
            source = FromCollator(self.model, self.data.collate, item, extent.longest, extent.padding)
        usable = source if source.usable() else None
        return self_check.check(self.engine, example, usable, self.options.physical_batch)


def _computes(engine: Engine, source: FromCollator) -> bool:
    """Whether the model can compute made-up records at all; it is left as it was."""
    batch = source.batch([SyntheticRecord(source.base, 0), SyntheticRecord(source.base, 1)])
    device = next((parameter.device for parameter in engine.parameters.values()), torch.device("cpu"))
    before = Watched(engine.model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            on_device = {
                name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (batch or {}).items()
            }
            engine.loss_fn(engine.model, on_device)
    except (RuntimeError, IndexError, ValueError, KeyError):
        return False
    finally:
        before.restore()
    return True
