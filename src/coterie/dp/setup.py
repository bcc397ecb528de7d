"""`make_private`: a private session from one call. It builds the plan and the options, and starts the run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.dp.accounting.budget import Budget
from coterie.dp.accounting.lots import LotPlan
from coterie.dp.accounting.provenance import Artefact
from coterie.dp.accounting.texts import Originals
from coterie.dp.balance import Balance
from coterie.dp.clipping import Clipping
from coterie.dp.isolation.exact_engine import Isolation, chosen, computes_in_half
from coterie.dp.losses import LossFunction
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.numbers import checked_number
from coterie.dp.per_sample.memory_choice import Method
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import Collate, PrivateData
from coterie.dp.session import PrivateSession
from coterie.dp.start import start_run
from coterie.dp.stepping import momentum_of
from coterie.dp.sum_engine import SumEngine
from coterie.errors import BudgetError, PrivacyError
from coterie.ranks.ranks import Ranks


def make_private(  # noqa: PLR0913 - one call is a run's whole choice; most have defaults
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
    noise_bands: int = 1,
    tensor_cores: bool = False,
    provenance: Mapping[str, str] | Iterable[Artefact] | None = None,
    ledger: str | Path | None = None,
    digest: str | None = None,
    originals: Originals | None = None,
    run: str | None = None,
    seed: int | None = None,
    self_check: bool = True,
    record: Mapping[str, Any] | None = None,
    engine: SumEngine | None = None,
    ranks: Ranks | None = None,
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
        schedule: learning rate by the number of steps taken, from 0; set before every optimizer step, also where a
            resumed run repeats released rounds. Default: the optimizer's own rate.
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
        noise_bands: over how many rounds noise hangs together, each taking back part of earlier ones' noise: 4 to 16
            leave less noise in the weights where the budget is large (epsilon 8), more where it is small; 1: none.
            For optimizers that add up what they are given (``torch.optim.SGD``, with momentum or without).
        tensor_cores: take norms and sums on the GPU's tensor cores, with the wider bound on rounding that they need;
            a record contributes up to half a percent less. Said to be without effect elsewhere, with ``isolation:
            exact`` and for an ``engine`` of one's own.
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
        ranks: what `join_ranks` gave, to train on several devices: every rank calls this with the same arguments and
            each computes its part of every lot; ``lot_size`` is of all together, ``physical_batch`` of one device.
            Rank 0 keeps the ledger and writes checkpoints.

    Returns:
        A session; use it as a context manager or call ``close``.

    Raises:
        BudgetError: an impossible budget, lot or number of rounds.
        DataError: a dataset without length or records, or a missing user column.
        NoRuleError: a parameter is used in a way that cannot be clipped per record.
        PrivacyError: nothing to train, a clip norm that is not positive, a loss over the batch, several processes
            without ``ranks``...
        RankError: the ranks differ, or one is gone.
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
    data = PrivateData.of(
        dataset, collate_fn, user_column=user_column, users=users, records_per_user=records_per_user, digest=digest,
        originals=originals,
    )  # fmt: skip
    lots = LotPlan.of(data.units.count, lot_size, sampler, max_lot)  # type: ignore[arg-type]
    planned = _rounds(rounds, epochs, lots)
    half = computes_in_half(model) if half_precision is None else half_precision
    plan = PrivacyPlan(
        budget,
        planned,
        lots.lot_size,
        clip_norm=clip_norm,
        clipping=clipping,
        adaptive_quantile=adaptive_quantile,
        sampler=lots.sampler,
        max_lot=lots.max_lot,
        records_per_user=records_per_user,
        balance=balance or Balance(),
        isolation=chosen(isolation if engine is None else _isolation_of(engine, isolation), half),
        half_precision=half,
        seed=seed,
        bands=NoiseBands.of(noise_bands, planned, momentum_of(optimizer)),
    )
    options = ComputeOptions(method, physical_batch, self_check=self_check, tensor_cores=tensor_cores)
    return start_session(
        model, optimizer, data, plan, options.repeatable(plan.seed), loss_fn=loss_fn, engine=engine,
        provenance=provenance, ledger=ledger, run=run, record=record, schedule=schedule, ranks=ranks,
    )  # fmt: skip


def start_session(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: PrivateData,
    plan: PrivacyPlan,
    options: ComputeOptions,
    *,
    schedule: Callable[[int], float] | None = None,
    **start: Any,
) -> PrivateSession:
    """A session of a plan; ``start`` holds the other arguments of `make_private` (`coterie.dp.start.start_run`)."""
    opened = start_run(model, optimizer, data, plan, options, **start)
    return PrivateSession(model, optimizer, opened, schedule)


def _rounds(rounds: int | None, epochs: float, lots: LotPlan) -> int:
    """The number of rounds, fixed in advance.

    Raises:
        BudgetError: there are none.
    """
    if rounds is not None:
        return int(checked_number("rounds", rounds))
    epochs = checked_number("epochs", epochs)
    planned = round(epochs * lots.units / lots.lot_size)
    if planned < 1:
        raise BudgetError(
            f"{planned} rounds are planned ({epochs} epochs of {lots.units} with lots of {lots.lot_size}).",
            code="dp-rounds",
            why="the number of rounds is fixed in advance",
            fix="train for more epochs, or use smaller lots",
        )
    return planned


def _isolation_of(engine: SumEngine, asked: Isolation | None) -> Isolation:
    """What a ready engine does."""
    own: Isolation = "fast" if engine.on_grid is None else "exact"
    if asked not in (None, own):
        raise PrivacyError(
            f"isolation {asked} was asked for, and the engine that was given does not do that.",
            code="dp-isolation-engine",
            why="the statement would promise what is not computed",
            fix="leave out isolation, or pass dp.ExactEngine for exact and dp.Engine for fast",
        )
    return own
