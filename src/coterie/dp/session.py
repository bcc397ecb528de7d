"""One object that ties sampling, clipping, noise and ledger together, so that they cannot disagree.

A round: draw a lot (or take the one that a crash left), add up clipped gradients in physical batches, noise every
trainable parameter, spool, count, and only then step the optimizer with the noisy sum over the *expected* lot size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from coterie.dp import checkpoint
from coterie.dp.balance import Balancer
from coterie.dp.budget import Budget, Spent
from coterie.dp.clipping import quantile_update
from coterie.dp.engine import Diagnostics
from coterie.dp.ledger import Head, Ledger
from coterie.dp.losses import batch_size
from coterie.dp.lots import Lot, LotPlan, Units, draw_lot
from coterie.dp.mechanism import LOAD, WITHIN, Part, RoundNoise
from coterie.dp.randomness import RandomSource
from coterie.dp.releases import Pending, Releases
from coterie.dp.spool import Release, Spool
from coterie.dp.statement import Statement, make_statement
from coterie.errors import CheckpointError, LedgerError, PrivacyError

_SPOOL_LIMIT_BYTES = 16 * 2**30
"""Most that results since the last checkpoint may take on disk."""

Collate = Callable[[list[Any]], Mapping[str, Any]]


class SumEngine(Protocol):
    """What a session needs of an engine; `coterie.dp.engine.Engine` is the one for models in memory."""

    groups: list[str]
    thresholds: Tensor
    eta: float

    @property
    def sensitivity(self) -> float: ...

    def accumulate(self, batch: Mapping[str, Any]) -> Diagnostics: ...

    def accumulate_user(self, batches: Any) -> Diagnostics: ...

    def take(self) -> dict[str, Tensor]: ...


@runtime_checkable
class KeepsFloat32(Protocol):
    """An optimizer that keeps float32 gradients of low-precision parameters, as `coterie.training.optim.AdamW`."""

    def gradient(self, param: Tensor) -> Tensor:
        """The float32 gradient of a parameter, to be changed in place."""


@dataclass(frozen=True)
class Settings:
    """A session's public numbers, fixed in advance and kept with its checkpoints.

    Attributes:
        budget: what the run may spend.
        noise_multiplier: sigma.
        clip_norm: C.
        rounds: releases planned.
        physical_batch: records computed at once.
        adaptive_quantile: share of records that adaptive clipping keeps unclipped; None for fixed thresholds.
        adaptive_share: the part of the clip norm, in (0, 1), that the released clip indicators take.
        user_column: left out of what the model sees.
        seed: for tests; None in private runs.
    """

    budget: Budget
    noise_multiplier: float
    clip_norm: float
    rounds: int
    physical_batch: int
    adaptive_quantile: float | None = None
    adaptive_share: float = 0.1
    user_column: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class RoundFigures:
    """What a round looked like. For the owner's eyes: NOT private, and never to leave the party.

    Attributes:
        round: its number.
        lot_size: records drawn.
        loss: mean loss of the lot; NaN for an empty one.
        clipped: share of units whose gradient was clipped.
        masked: records that were not finite and contributed zero.
    """

    round: int
    lot_size: int
    loss: float
    clipped: float
    masked: int


class PrivateSession:
    """Private training of one model on one dataset; see `coterie.dp.make_private`, which sets it up.

    Use it as a context manager, or call `close`, to let another process continue the run.

    Attributes:
        round: rounds that the model has taken.
        last: figures of the last round, owner-only.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        collate: Collate,
        engine: SumEngine,
        balancer: Balancer | None,
        plan: LotPlan,
        units: Units,
        settings: Settings,
        source: RandomSource,
        ledger: Ledger,
        spool: Spool,
        run: str,
        not_covered: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.plan = plan
        self.run = run
        self.round = 0
        self.last: RoundFigures | None = None
        self.ledger = ledger
        self.releases = Releases(ledger, spool, run)
        self._dataset = dataset
        self._collate = collate
        self._engine = engine
        self._balancer = balancer
        self._units = units
        self._source = source
        self._not_covered = tuple(not_covered)
        self._options = dict(options or {})
        self._schedule = schedule
        self._pending: Pending | None = None
        self._parent = "start"
        self._saved: Path | None = None
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    # -- training ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Lot]:
        """The lots of the remaining rounds. Ends when the planned rounds, or the releases left, are used up."""
        while True:
            while self._replay():
                pass
            if self.round >= self.settings.rounds or self.releases.remaining <= 0:
                return
            before = self.round
            yield self.next_lot()
            if self.round == before:
                raise PrivacyError(
                    "the loop asked for another lot before session.step(lot).",
                    code="dp-lot-unused",
                    where=f"round {before + 1}",
                    why="dropping a lot after looking at it would bias which records are used",
                    fix="call session.step(lot) once for every lot",
                )

    def next_lot(self) -> Lot:
        """The lot of the next round: the same one until `step` has used it, also after a crash.

        Raises:
            BudgetError: no release is left.
        """
        while self._replay():
            pass
        if self._pending is None:
            number = self.round + 1
            begun = self.releases.begin(
                number, self._pins(), lambda draw: draw_lot(number, self.plan, self._units, self._source, draw)
            )
            assert isinstance(begun, Pending)  # a release for these pins would have been replayed
            self._pending = begun
        return self._pending.lot

    def step(self, lot: Lot) -> None:
        """One round: the lot's clipped gradients, noised, spooled, counted; then one optimizer step.

        Args:
            lot: what iterating over the session gave.

        Raises:
            PrivacyError: another lot; a batch whose records cannot be told apart; a use the engine cannot bound.
            LedgerError: the result could not be counted; the model is then unchanged.
        """
        pending = self._pending
        if pending is None or lot is not pending.lot:
            raise PrivacyError(
                "this lot is not the one that is due.",
                code="dp-wrong-lot",
                where=f"round {self.round + 1}",
                why="each lot is used once; using one again would spend privacy that is not counted",
                fix="use `for lot in session: session.step(lot)`",
            )
        noised, release = self.publish(pending)
        self._pending = None
        self._apply(noised, release)
        self._trim_spool()

    def publish(self, pending: Pending) -> tuple[dict[str, Tensor], Release]:
        """Compute a pending lot, noise it, spool and count the result; the model is not changed.

        Returns:
            The noised sums, float32 on the CPU, and the release that holds them.
        """
        with self._secret_torch_randomness(pending):
            sums = self._sums(pending)
        noised = self._noise(sums).add(sums, self._source, f"noise|{pending.name}")
        return noised, self.releases.publish(pending, noised)

    def _trim_spool(self) -> None:
        """Drop results that no checkpoint could be brought up to date with, and keep the rest within bounds.

        Without a checkpoint nothing can be resumed. Beyond the limit a resumed run spends the dropped rounds again.
        """
        spool = self.releases.spool
        if self._saved is None or spool.nbytes() > _SPOOL_LIMIT_BYTES:
            spool.drop_releases(self.round)

    def _pins(self) -> dict[str, str]:
        # The weights of round r + 1 follow from the start and the results of rounds 1..r; the last digest stands for
        # all of them, because each result is counted under the digest before it.
        return {"parent": self._parent}

    def _sums(self, pending: Pending) -> dict[str, Tensor]:
        """Clipped sums of one lot, with the extra parts of the release."""
        self.model.train()
        self._engine.take()  # what an interrupted step left
        losses: list[float] = []
        within = torch.zeros(len(self._engine.groups), dtype=torch.float64)
        masked = clipped = 0
        loads: list[Tensor] = []
        for figures in self._accumulate(pending.lot, loads):
            usable = ~figures.masked
            losses += figures.losses[usable].tolist()
            within += torch.where(usable, figures.within.double() - 0.5, 0.0).sum(1)
            clipped += int((usable & ~figures.within.all(0)).sum())
            masked += int(figures.masked.sum())
        sums = self._engine.take()
        if self._balancer is not None and self._balancer.balance.releases_loads:
            empty = torch.zeros(0, sum(self._balancer.sizes), dtype=torch.float64)
            units = torch.from_numpy(pending.lot.units)
            sums[LOAD] = self._balancer.load_sum(torch.cat(loads) if loads else empty, units)
        if self.settings.adaptive_quantile is not None:
            sums[WITHIN] = within
        missing = self._parameters.keys() - sums.keys()
        if missing:
            raise PrivacyError(
                f"the engine gave no sum for `{min(missing)}`.",
                code="dp-no-sum",
                why="every trainable parameter gets noise every round, also one that no record used",
                fix="freeze the parameter, or report this with the model's family",
            )
        count = max(len(losses), 1)
        mean = math.fsum(losses) / count if losses else math.nan
        self.last = RoundFigures(pending.round, len(pending.lot), mean, clipped / count, masked)
        return sums

    def _accumulate(self, lot: Lot, loads: list[Tensor]) -> Iterator[Diagnostics]:
        """Run the physical batches of a lot, one unit at a time where units are users."""
        size = self.settings.physical_batch
        if self._units.starts is None:
            for records, _ in lot.physical_batches(size):
                figures = self._engine.accumulate(self._batch(records))
                loads += self._loads(~figures.masked)
                yield figures
            return
        for unit in range(lot.num_units):
            own = lot.records[lot.units == unit]
            yield self._engine.accumulate_user(self._user_batches(own, size, loads))

    def _user_batches(self, records: np.ndarray, size: int, loads: list[Tensor]) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(records), size):
            yield self._batch(records[start : start + size])
            loads += self._loads(None)

    def _loads(self, keep: Tensor | None) -> list[Tensor]:
        if self._balancer is None or self._balancer.latest is None:
            return []
        latest = self._balancer.latest
        return [latest if keep is None else torch.where(keep[:, None], latest, 0.0)]

    def _batch(self, records: np.ndarray) -> dict[str, Any]:
        items = [self._dataset[int(i)] for i in records]
        column = self.settings.user_column
        if column is not None:
            items = [{name: value for name, value in item.items() if name != column} for item in items]
        device = next(iter(self._parameters.values())).device
        batch = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self._collate(items).items()
        }
        if batch_size(batch) != len(items):
            raise PrivacyError(
                f"the collator made {batch_size(batch)} rows of {len(items)} records.",
                code="dp-collator-packs",
                why="records packed into one row cannot be clipped apart",
                fix="use a collator that keeps one row for each record (padding, not packing)",
            )
        return batch

    def _noise(self, sums: Mapping[str, Tensor]) -> RoundNoise:
        """This round's noise: one Gaussian over gradient groups, loads and clip indicators."""
        extra: dict[str, Part] = {}
        if LOAD in sums and self._balancer is not None:
            share = self._balancer.balance.load_share**2
            extra[LOAD] = Part(self._balancer.load_bound * (1 + 1e-6), share, sums[LOAD].numel())
        if WITHIN in sums:
            bound = 0.5 * math.sqrt(sums[WITHIN].numel())
            extra[WITHIN] = Part(bound, self.settings.adaptive_share**2, sums[WITHIN].numel())
        rest = 1 - sum(part.share for part in extra.values())
        gradients = {name: tensor.numel() for name, tensor in sums.items() if name not in extra}
        if self.settings.adaptive_quantile is None:
            parts = {"gradients": Part(self._engine.sensitivity, rest, sum(gradients.values()))}
            return RoundNoise.of(
                self.settings.noise_multiplier, parts | extra, lambda name: name if name in extra else "gradients"
            )
        # Adaptive thresholds differ between groups and rounds: each group's noise follows its own threshold.
        group_of: Callable[[str], str] = self._engine.clipping.group_of  # type: ignore[attr-defined]
        values = dict.fromkeys(self._engine.groups, 0)
        for name, count in gradients.items():
            values[group_of(name)] += count
        bounds = dict(zip(self._engine.groups, self._engine.thresholds.tolist(), strict=True))
        parts = {
            group: Part(bounds[group] * (1 + self._engine.eta), rest / len(values), count)
            for group, count in values.items()
        }
        return RoundNoise.of(
            self.settings.noise_multiplier, parts | extra, lambda name: name if name in extra else group_of(name)
        )

    def _apply(self, noised: Mapping[str, Tensor], release: Release) -> None:
        """Post-processing of a released result: one optimizer step, and what follows from the extra parts."""
        expected = float(self.plan.expected_size)
        for name, parameter in self._parameters.items():
            mean = noised[name] / expected
            if isinstance(self.optimizer, KeepsFloat32):
                self.optimizer.gradient(parameter).copy_(mean)
            else:
                parameter.grad = mean.to(parameter.device, parameter.dtype)
        if self._schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._schedule(release.round - 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._balancer is not None and LOAD in noised:
            self._balancer.take_released(noised[LOAD], expected)
        if WITHIN in noised and self.settings.adaptive_quantile is not None:
            fraction = noised[WITHIN].double() / expected + 0.5
            self._engine.thresholds = quantile_update(
                self._engine.thresholds, fraction.clamp(0, 1), self.settings.adaptive_quantile
            )
        self._parent = release.digest
        self.round = release.round

    def _replay(self) -> bool:
        """Take the next round from the spool, if a run before this one had released it already."""
        if self._pending is not None or self.round >= self.settings.rounds:
            return False
        release = self.releases.published(self.round + 1)
        if release is None:
            return False
        if release.pins != self._pins():
            self.releases.burn(release, "the weights it was computed from are not these")
            return False
        self._apply(release.tensors(), release)
        return True

    @contextmanager
    def _secret_torch_randomness(self, pending: Pending) -> Iterator[None]:
        """Dropout, and whatever else draws from torch, from a key that is not kept; the caller's state comes back."""
        devices = {p.device for p in self._parameters.values() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(self._source.stream(f"dropout|{pending.name}").integer(56))
            yield

    # -- what it costs ---------------------------------------------------------------------------------------------

    def spent(self) -> Spent:
        """What this run has spent so far, at the budget's delta; infinite for a seeded run."""
        return self.ledger.spent(self.run, self.settings.budget.delta)

    def lifetime(self) -> Spent:
        """What all private runs on this dataset have spent together."""
        return self.ledger.lifetime(self.settings.budget.delta)

    def statement(self) -> Statement:
        """The privacy statement as of now; ``str()`` of it is for people, ``to_json()`` for programs."""
        return make_statement(self.ledger, self.run, self.settings.budget, self.settings.clip_norm, self._not_covered)

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write model, optimizer and public state to a folder, replacing an older checkpoint there.

        Nothing secret is in it: no lot, no random state, no noise. Results it includes leave the spool.
        """
        folder = Path(path)
        extra = {"thresholds": self._engine.thresholds}
        if self._balancer is not None:
            extra |= self._balancer.state()
        facts = {
            "run": self.run,
            "round": self.round,
            "parent": self._parent,
            "dataset": self.ledger.dataset,
            "ledger_root": str(self.ledger.folder.parent),
            "head": asdict(self.ledger.head()),
            "settings": asdict(self.settings),
            "plan": asdict(self.plan),
            "user_cap": self._units.cap,
            "not_covered": list(self._not_covered),
            "options": self._options,
            "private": self._source.private,
        }
        checkpoint.save(folder, self.model, self.optimizer, extra, facts)
        self._saved = folder
        self.releases.spool.drop_releases(self.round)

    def restore(self, path: str | Path) -> None:
        """Load what `save` wrote into this session's model and optimizer, and replay what was released since.

        Raises:
            CheckpointError: another run's, dataset's or model's checkpoint.
            LedgerError: the ledger does not hold what it held when the checkpoint was made.
        """
        folder = Path(path)
        facts = checkpoint.read_facts(folder)
        if (facts["run"], facts["dataset"]) != (self.run, self.ledger.dataset):
            raise CheckpointError(
                f"{folder} is of run {facts['run']} on dataset {facts['dataset'][:12]}, "
                f"not of {self.run} on {self.ledger.dataset[:12]}.",
                code="dp-checkpoint-run",
                fix="resume with the dataset (and its order of records) that the run was started with",
            )
        self.ledger.check_contains(Head(**facts["head"]))
        if self.releases.last_round() < facts["round"]:
            raise LedgerError(
                f"the checkpoint is at round {facts['round']}, the ledger at {self.releases.last_round()}.",
                code="dp-ledger-behind",
                why="privacy already spent would be forgotten",
                fix="put the newest ledger back",
            )
        extra = checkpoint.load(folder, self.model, self.optimizer)
        self._engine.thresholds = extra["thresholds"]
        if self._balancer is not None:
            self._balancer.restore(extra)
        self.round, self._parent, self._saved = int(facts["round"]), str(facts["parent"]), folder
        while self._replay():
            pass

    @classmethod
    def resume(
        cls,
        path: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        collate_fn: Collate | None = None,
        loss_fn: Any = None,
        **options: Any,
    ) -> PrivateSession:
        """Continue a saved run: same settings, same ledger; nothing that was released is computed again.

        Args:
            path: what `save` was given.
            model, optimizer, dataset, collate_fn, loss_fn: built as they were at the start.
            options: the further arguments that `make_private` was given (ledger, clipping, method, balance...).
        """
        from coterie.dp.setup import resume_session

        return resume_session(Path(path), model, optimizer, dataset, collate_fn, loss_fn, **options)

    def close(self) -> None:
        """Let another process or session continue this run. Without a checkpoint there is nothing to continue."""
        if self._saved is None:
            self.releases.spool.remove()
        self.releases.spool.close()

    def __enter__(self) -> PrivateSession:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "releases"):
            self.releases.spool.close()
