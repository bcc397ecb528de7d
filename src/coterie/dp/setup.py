"""Set up a private session: refuse what would make a privacy statement untrue before anything is trained."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.dp import checkpoint, selfcheck
from coterie.dp.accounting import noise_multiplier
from coterie.dp.balance import Balance, Balancer
from coterie.dp.budget import Budget, PrivacyWarning
from coterie.dp.clipping import Clipping, policy
from coterie.dp.comparison import Report
from coterie.dp.dataset import checked_length, dataset_digest
from coterie.dp.dry_step import check_optimizer_step
from coterie.dp.engine import Engine, Method
from coterie.dp.isolation import ExactEngine, Isolation, chosen, computes_in_half, make_engine
from coterie.dp.ledger import open_ledger
from coterie.dp.losses import LossFunction, check_own_loss, default_loss
from coterie.dp.lot_sums import Collate, Settings, SumEngine
from coterie.dp.lots import LotPlan, Units
from coterie.dp.made_up import FromCollator, Made
from coterie.dp.numbers import checked_number
from coterie.dp.probe import synthetic_batch
from coterie.dp.provenance import Artefact, as_loaded, declared, not_covered
from coterie.dp.randomness import random_source
from coterie.dp.records import Extent, check_records
from coterie.dp.refusals import check_hooks, check_rows, unused_warning
from coterie.dp.run_facts import RunStart
from coterie.dp.session import PrivateSession, put_gradient
from coterie.dp.spool import Spool
from coterie.dp.texts import Originals
from coterie.dp.users import check_one_naming, user_ids
from coterie.dp.users import user_column as users_of
from coterie.dp.watched import Watched
from coterie.errors import BudgetError, DataError, PrivacyError
from coterie.models import seam


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    collate_fn: Collate | None = None,
    loss_fn: LossFunction | None = None,
    budget: Budget | None = None,
    clip_norm: float = 1.0,
    lot_size: int = 256,
    epochs: float = 3,
    physical_batch: int = 16,
    *,
    rounds: int | None = None,
    schedule: Callable[[int], float] | None = None,
    clipping: str | Clipping = "flat",
    method: Method = "auto",
    isolation: Isolation | None = None,
    half_precision: bool | None = None,
    adaptive_quantile: float | None = None,
    sampler: str = "poisson",
    max_lot: int | None = None,
    user_column: str | None = None,
    users: Sequence[Hashable] | None = None,
    records_per_user: int = 16,
    balance: Balance | None = None,
    provenance: Mapping[str, str] | Iterable[Artefact] | None = None,
    ledger: str | Path | None = None,
    digest: str | None = None,
    originals: Originals | None = None,
    run: str | None = None,
    seed: int | None = None,
    self_check: bool = True,
    record: Mapping[str, Any] | None = None,
    engine: SumEngine | None = None,
) -> PrivateSession:
    """A session that trains ``model`` on ``dataset`` within ``budget``: ``for lot in session: session.step(lot)``.

    Args:
        model: parameters that require a gradient are trained; all of them get noise every round.
        optimizer: any torch optimizer over these parameters.
        dataset: records by index, with a length. One item is one record, whatever it holds.
        collate_fn: list of items to a batch of tensors [B, ...], one row for each record. Default: transformers'
            ``default_data_collator``, which needs items of equal length.
        loss_fn: ``loss_fn(model, batch) -> [B]``; default: the model's own loss of each record (`default_loss`).
        budget: epsilon and delta for adding or removing one record (one user, with ``user_column``).
        clip_norm: C, the bound of one unit's gradient norm.
        lot_size: expected units in a round; real lots vary around it and may be empty.
        epochs: expected times each unit is used; with ``lot_size`` it fixes the number of rounds.
        physical_batch: records computed at once; never changes the result.
        rounds: number of rounds, instead of ``epochs``.
        schedule: learning rate of a round, counted from 0; set before every optimizer step, also where a resumed run
            repeats released rounds. Default: the optimizer's own rate.
        clipping: ``flat``, ``per_layer``, ``per_group``, ``automatic``, or a policy of `coterie.dp.clipping`.
        method: how the engine computes clipped sums; never changes the result.
        isolation: ``exact``: each record is computed alone and added in integers, so that no record moves what
            another adds, whatever the weights are; ``fast``: up to rounding, which crafted weights can amplify.
            Default: ``exact`` where the model computes in half precision, else ``fast``. ``exact`` leaves ``method``
            and ``physical_batch`` without effect.
        half_precision: whether the model computes in half precision. Default: by its parameters and autocast.
        adaptive_quantile: adapt the clip norms so that this share of units stays unclipped (Andrew et al. 2021); what
            they adapt to is released inside the round's one Gaussian.
        sampler: ``poisson``, or ``truncated_poisson`` with lots of at most ``max_lot``.
        max_lot: most units in a lot, for ``truncated_poisson``.
        user_column: column that names a record's user; the unit is then the user.
        users: the user of each record, instead of ``user_column``.
        records_per_user: most records of one user in a lot.
        balance: how experts are kept evenly used.
        provenance: what weights, tokenizer, ... were made from: ``public``, ``dp:LEDGER_ID`` or ``private`` by kind,
            or `Artefact` objects. What is not declared is listed as not covered.
        ledger: folder of the privacy ledgers; default: the user's data folder. Keep it outside run folders.
        digest: names the dataset in the ledger; default: its records' content. Give one to keep the ledger of the
            same text prepared in another way.
        originals: the documents that the records were made from, by which runs on some of the same text are known
            and added up; default: the records. Give them where one document becomes several records.
        run: identifier in the ledger; default: random.
        seed: for tests only: lots, dropout and noise come from it, and the run is NOT private.
        self_check: compare the engine with one record at a time on synthetic records, before training. Without it
            the statement lists as not covered whether the model keeps records apart.
        record: what one record is, in public words and numbers (packing, sequence length), for ledger and statement.
        engine: a ready engine, instead of one made from ``loss_fn``, ``clipping`` and ``method``.

    Returns:
        A session; use it as a context manager or call ``close``.

    Raises:
        BudgetError: an impossible budget, lot or number of rounds.
        DataError: a dataset without length or records, or a missing user column.
        NoRuleError: a parameter is used in a way that cannot be clipped per record.
        PrivacyError: nothing to train, a clip norm that is not positive, a loss over the batch...
        ProvenanceError: the start was made from private records.
        LedgerError: the ledger is damaged, behind, or in use.

    Guarantee: after any number of rounds, everything the session did to the model is (epsilon, delta)-differentially
        private for ``session.spent()``, against anyone who sees all rounds' noisy sums. See docs/concepts/privacy.md.
    """
    if budget is None:
        raise BudgetError(
            "private training needs a budget.",
            code="dp-no-budget",
            why="noise is calibrated to it",
            fix="pass budget=Budget(epsilon=8.0, delta=1e-5), delta well below 1 / number of records",
        )
    units = _units(dataset, user_column, users, records_per_user)
    plan = LotPlan.of(units.count, lot_size, sampler, max_lot)  # type: ignore[arg-type]
    if rounds is not None:
        planned = checked_number("rounds", rounds)
    else:
        epochs = checked_number("epochs", epochs)
        planned = round(epochs * units.count / plan.expected_size)
    if planned < 1:
        raise BudgetError(
            f"{planned} rounds are planned ({epochs} epochs of {units.count} with lots of {lot_size}).",
            code="dp-rounds",
            why="the number of rounds is fixed in advance",
            fix="train for more epochs, or use smaller lots",
        )
    unit = "record" if units.starts is None else "user"
    budget.warn_for(units.count, unit)
    artefacts = as_loaded(declared(provenance), model)
    uncovered = not_covered(artefacts)
    balance = balance or Balance()
    method = _repeatable(method, seed)
    if engine is not None:
        isolation = _isolation_of(engine, isolation)
    half_precision = computes_in_half(model) if half_precision is None else half_precision
    isolation = chosen(isolation, half_precision)
    built, balancer = _engine(model, loss_fn, clipping, clip_norm, method, isolation, balance, engine)
    _check_optimizer(model, optimizer)
    collate = collate_fn or _default_collate
    sigma = noise_multiplier(budget, plan.rate, planned, plan.sampler, *_event_numbers(plan))
    settings = Settings(
        budget, sigma, clip_norm, planned, physical_batch, adaptive_quantile, user_column=user_column, seed=seed,
        isolation=isolation, half_precision=half_precision,
    )  # fmt: skip
    extent = check_records(_Without(dataset, user_column), units.records, collate, model, loss_fn, physical_batch)
    report = _self_check(built, dataset, collate, settings, loss_fn, extent) if self_check else None
    unused = unused_warning(model, report.unused) if report is not None else None
    if unused is not None:
        warnings.warn(unused, PrivacyWarning, stacklevel=2)
        uncovered.append(unused)
    books = open_ledger(digest or dataset_digest(dataset), ledger)
    run = run or secrets.token_hex(6)
    about = dict(record or {}) | ({"user_column": user_column} if user_column is not None else {})
    RunStart(plan, settings, units, built).open(
        books, run, artefacts, about, report is not None, originals or Originals(dataset, units.owners())
    )
    options = {
        "clipping": clipping if isinstance(clipping, str) else None,
        "method": method,
        "balance": asdict(balance),
        "records_per_user": records_per_user,
        "self_check": self_check,
    }
    return PrivateSession(
        model, optimizer, dataset, collate, built, balancer, plan, units, settings, random_source(seed), books,
        Spool(books.folder / "spool" / run), run, uncovered, options, schedule,
    )  # fmt: skip


def resume_session(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    collate_fn: Collate | None = None,
    loss_fn: LossFunction | None = None,
    *,
    ledger: str | Path | None = None,
    digest: str | None = None,
    schedule: Callable[[int], float] | None = None,
    users: Sequence[Hashable] | None = None,
    clipping: str | Clipping | None = None,
    method: Method | None = None,
    engine: SumEngine | None = None,
    state_only: bool = False,
) -> PrivateSession:
    """See `PrivateSession.resume`. Settings come from the checkpoint; only objects have to be given again.

    With ``state_only`` the checkpoint is one of `PrivateSession.save_state`: model and optimizer are the caller's.
    """
    facts = checkpoint.read_facts(path)
    saved, options = facts["settings"], facts["options"]
    settings = Settings(**{**saved, "budget": Budget(**saved["budget"])})
    units = _units(dataset, settings.user_column, users, facts["user_cap"])
    if units.cap != facts["user_cap"]:
        raise PrivacyError(
            "the session protects users, and nobody says which record is whose.",
            code="dp-resume-users",
            why="every record would become a unit of its own",
            fix="pass the same users: PrivateSession.resume(..., users=...)",
        )
    clipper = clipping or options["clipping"]
    if clipper is None:
        raise PrivacyError(
            "the session was started with a clipping policy of its own.",
            code="dp-resume-clipping",
            why="it bounds what one record contributes, and a checkpoint does not hold it",
            fix="pass the same policy: PrivateSession.resume(..., clipping=...)",
        )
    built, balancer = _engine(
        model,
        loss_fn,
        clipper,
        settings.clip_norm,
        _repeatable(method or options["method"], settings.seed),
        settings.isolation,
        Balance(**options["balance"]),
        engine,
    )
    books = open_ledger(digest or dataset_digest(dataset), ledger or facts["ledger_root"])
    plan, collate = LotPlan(**facts["plan"]), collate_fn or _default_collate
    RunStart(plan, settings, units, built).check(books, facts["run"])
    _check_optimizer(model, optimizer)
    extent = check_records(
        _Without(dataset, settings.user_column), units.records, collate, model, loss_fn, settings.physical_batch
    )
    if options.get("self_check", True):
        _self_check(built, dataset, collate, settings, loss_fn, extent)
    session = PrivateSession(
        model, optimizer, dataset, collate, built, balancer, plan, units,
        settings, random_source(settings.seed), books, Spool(books.folder / "spool" / facts["run"]), facts["run"],
        facts["not_covered"], options, schedule,
    )  # fmt: skip
    try:
        session.restore_state(path) if state_only else session.restore(path)
    except BaseException:
        session.releases.spool.close()
        raise
    return session


def _repeatable(method: Method, seed: int | None) -> Method:
    """The automatic choice of method depends on free memory; a seeded run has to repeat to the last bit."""
    return "book_keeping" if seed is not None and method == "auto" else method


def _units(dataset: Any, column: str | None, users: Sequence[Hashable] | None, cap: int | None) -> Units:
    records = checked_length(dataset)
    check_one_naming(column, users)
    if column is not None:
        users = users_of(dataset, column)
    if users is None or cap is None:
        return Units.of_records(records)
    names = user_ids(users)
    if len(names) != records:
        raise DataError(
            f"{len(names)} users are named for {records} records.",
            code="dp-no-user",
            why="every record must belong to one privacy unit",
            fix="give one user for each record",
        )
    return Units.of_users(names, cap)


def _engine(
    model: nn.Module,
    loss_fn: LossFunction | None,
    clipping: str | Clipping,
    clip_norm: float,
    method: Method,
    isolation: Isolation,
    balance: Balance,
    engine: SumEngine | None,
) -> tuple[SumEngine, Balancer | None]:
    clipper = policy(clipping, clip_norm) if isinstance(clipping, str) else clipping
    if clipper.clip_norm != clip_norm:
        raise PrivacyError(
            f"the clipping policy has clip norm {clipper.clip_norm}, the session {clip_norm}.",
            code="dp-clip-norm",
            why="noise is calibrated to the clip norm",
            fix="give both the same number",
        )
    if seam.expert_layers(model):
        seam.select(model)
    loss = loss_fn or default_loss
    balancer = Balancer(balance, model, loss) if balance.mode != "off" else None
    return engine or make_engine(isolation, model, balancer or loss, clipper, method), balancer


def _isolation_of(engine: SumEngine, asked: Isolation | None) -> Isolation:
    """What a ready engine does."""
    own: Isolation = "exact" if isinstance(engine, ExactEngine) else "fast"
    if asked not in (None, own):
        raise PrivacyError(
            f"isolation {asked} was asked for, and the engine that was given does not do that.",
            code="dp-isolation-engine",
            why="the statement would promise what is not computed",
            fix="leave out isolation, or pass dp.ExactEngine for exact and dp.Engine for fast",
        )
    return own


def _event_numbers(plan: LotPlan) -> tuple[int | None, int | None]:
    mechanism = plan.mechanism(1.0)
    return mechanism.units, mechanism.limit


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = sum(p.requires_grad and id(p) not in trained for p in stepped)
    missing = [name for key, name in trained.items() if key not in {id(p) for p in stepped}]
    if strangers:
        raise PrivacyError(
            f"the optimizer steps {strangers} parameters that are not the model's.",
            code="dp-outside-mechanism",
            why="what is trained outside the mechanism gets no noise",
            fix="build the optimizer from model.parameters()",
        )
    if missing:
        raise PrivacyError(
            f"`{missing[0]}` is trainable but not in the optimizer ({len(missing)} in all).",
            code="dp-not-stepped",
            why="its gradient would use up clip norm and noise without being learned from",
            fix="freeze it with requires_grad_(False), or add it to the optimizer",
        )
    check_hooks(model)
    if not any(parameter.is_meta for parameter in stepped):
        check_optimizer_step(model, _unwrapped(optimizer), put_gradient)


def _unwrapped(optimizer: Any) -> Any:
    """What accelerate's wrapper steps.

    Raises:
        PrivacyError: the wrapper leaves out steps.
    """
    while hasattr(optimizer, "gradient_state") and hasattr(optimizer, "optimizer"):
        every = getattr(optimizer.gradient_state, "num_steps", 1)
        if every != 1 or getattr(optimizer, "scaler", None) is not None:
            raise PrivacyError(
                f"accelerate steps this optimizer every {every} batches"
                if every != 1
                else "accelerate scales this optimizer's gradients (fp16).",
                code="dp-optimizer-step",
                why="each release is paid for when it is counted, and some would not be applied",
                fix="pass the optimizer itself, or an Accelerator without gradient accumulation and fp16",
            )
        optimizer = optimizer.optimizer
    return optimizer


def _self_check(
    engine: SumEngine,
    dataset: Any,
    collate: Collate,
    settings: Settings,
    loss_fn: LossFunction | None,
    extent: Extent,
) -> Report | None:
    """Compare with one record at a time, on made-up records of the keys, shapes and types of a real one.

    Returns:
        None for an engine of the caller's own, which cannot be compared.
    """
    if not isinstance(engine, Engine):
        return None
    item = _Without(dataset, settings.user_column)[0]
    example = collate([item])
    check_rows(example, 1)
    if loss_fn is None:
        check_own_loss(engine.model, synthetic_batch(engine.model, example, 1, 7))
    source = FromCollator(engine.model, collate, item, extent.longest, extent.padding, extent.numbers)
    if extent.numbers and not _computes(
        engine, source
    ):  # numbers that mean something of the record, such as its length
        source = FromCollator(engine.model, collate, item, extent.longest, extent.padding)
    return selfcheck.check(engine, example, source if source.usable() else None, settings.physical_batch)


def _computes(engine: Engine, source: FromCollator) -> bool:
    """Whether the model can compute made-up records at all; it is left as it was."""
    batch = source.batch([Made(source.base, 0), Made(source.base, 1)])
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


class _Without:
    """A dataset whose records lack a column, read as they are needed."""

    def __init__(self, dataset: Any, column: str | None) -> None:
        self._dataset = dataset
        self._column = column

    def __getitem__(self, index: int) -> Any:
        item = self._dataset[index]
        return item if self._column is None else {name: item[name] for name in item if name != self._column}


def _default_collate(items: list[Any]) -> Mapping[str, Any]:
    from transformers import default_data_collator

    other = next((item for item in items if not isinstance(item, Mapping)), None)
    if other is not None:
        raise DataError(
            f"a record is a {type(other).__name__}, not a mapping of names to values.",
            code="dp-record-mapping",
            why="the default collator does not know what its parts are called",
            fix="give records as dicts, or pass a collate_fn that makes a dict of tensors from a list of records",
        )
    batch: Mapping[str, Any] = default_data_collator(items)
    return batch
