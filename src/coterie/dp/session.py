"""One object that ties sampling, clipping, noise and ledger together, so that they cannot disagree.

A round: draw a lot (or take the one that a crash left), add up clipped gradients in physical batches, noise every
trainable parameter, spool, count, and only then step the optimizer with the noisy sum over the *expected* lot size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.checkpoints import Content, keep_parts
from coterie.dp import checkpoint
from coterie.dp.accounting.budget import Spent
from coterie.dp.accounting.ledger import Ledger, LedgerHead
from coterie.dp.accounting.lots import Lot
from coterie.dp.accounting.releases import Pending, Releases
from coterie.dp.accounting.spool import SPOOL_LIMIT_BYTES, Durable, Release
from coterie.dp.accounting.statement import Statement
from coterie.dp.losses import LossFunction
from coterie.dp.lot_figures import RoundFigures
from coterie.dp.open_run import OpenRun, experts_digest, weights_digest
from coterie.dp.private_data import Collate
from coterie.dp.refusals import check_hooks
from coterie.dp.saved_plan import plan_to_json
from coterie.dp.start import resume_run
from coterie.dp.stepping import ExpectsNoise, put_gradient, stepping_without
from coterie.errors import CheckpointError, LedgerError, PrivacyError
from coterie.models.split.trainings import Training


class PrivateSession:
    """Private training of one model on one dataset; see `coterie.dp.make_private`, which sets it up.

    Use it as a context manager, or call `close`, to let another process continue the run.

    Args:
        model: as the run was opened with.
        optimizer: of its trained parameters.
        opened: the run.
        schedule: learning rate by the number of steps taken, from 0; None: the optimizer's own.

    Attributes:
        round: rounds that the model has taken.
        run: identifier in the ledger.
        privacy_plan: what bounds the cost of the run.
        plan: how its lots are drawn, of how many units.
        lot_sums: see `coterie.dp.open_run.OpenRun`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        opened: OpenRun,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.privacy_plan, self.plan, self.run, self.round = opened.plan, opened.lots, opened.name, 0
        self.lot_sums = opened.lot_sums
        self._opened = opened
        self._schedule = schedule
        self._pending: Pending | None = None
        self._parent = "start"
        self._saved: Path | None = None
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._by_owners: bool | None = None

    @property
    def ledger(self) -> Ledger:
        """Of the dataset; where ranks share the session, rank 0 keeps it."""
        return self._opened.ledger

    @property
    def releases(self) -> Releases:
        """What the run released; where ranks share the session, rank 0 keeps them."""
        return self._opened.releases

    @property
    def remaining(self) -> int:
        """Releases that the plan still allows; the same at every rank."""
        return self._opened.shared.remaining

    # -- training ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Lot]:
        """The lots of the remaining rounds. Ends when the planned rounds, or the releases left, are used up."""
        while True:
            while self._replay():
                pass
            if self.round >= self.privacy_plan.rounds or self.remaining <= 0:
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
            begun = self._opened.begin(self.round + 1, self._pins())
            assert isinstance(begun, Pending)  # a release for these pins would have been replayed
            self._pending = begun
        return self._pending.lot

    def __len__(self) -> int:
        """Rounds that are left: how many lots iterating will give."""
        return max(0, min(self.privacy_plan.rounds - self.round, self.releases.remaining))

    def __bool__(self) -> bool:
        return True  # also when no round is left

    def step(self, lot: Lot) -> RoundFigures | None:
        """One round: the lot's clipped gradients, noised, spooled, counted; then one optimizer step.

        Args:
            lot: what iterating over the session gave.

        Returns:
            What the round looked like: loss, records drawn, share clipped. For the owner's eyes: NOT private. None
            where its result had been released before, so that nothing was computed.

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
        self._steps_by_owners(True)
        self._step(*self._publish(pending, to_all=False))
        self._trim_spool()
        last = self.last
        return last if last is not None and last.round == self.round else None

    def put_gradients(self) -> None:
        """One round for loops that step the optimizer themselves: it leaves the noisy mean gradients in ``.grad``.

        A round that was released before a crash is taken from the spool, not computed again. Where several ranks
        share the session all of them have all gradients, and step everything.

        Raises:
            BudgetError: no release is left.
            PrivacyError: several ranks share the session, and each has stepped its own parameters before.
        """
        self._steps_by_owners(False)
        release = self._published()
        if release is not None:
            self._take(self._opened.tensors(release), release, self._parameters)
            return
        self.next_lot()
        assert self._pending is not None
        self._take(*self.publish(self._pending), self._parameters)
        self._trim_spool()

    @property
    def noise_multiplier(self) -> float:
        """Sigma of every round."""
        return self._opened.noise_multiplier

    def has_release(self) -> bool:
        """Whether the next round's result is already in the spool, so that it costs nothing more."""
        return self._published() is not None

    @property
    def last(self) -> RoundFigures | None:
        """Figures of the last lot that was computed, owner-only; None before the first."""
        return self.lot_sums.last

    def publish(self, pending: Pending) -> tuple[dict[str, Tensor], Release]:
        """Compute a pending lot, noise it, spool and count the result; the model is not changed.

        Returns:
            The noised sums over the expected lot size, float32 on the CPU, and the release that holds them.
        """
        return self._publish(pending, to_all=True)

    def _publish(self, pending: Pending, to_all: bool) -> tuple[dict[str, Tensor], Release]:
        with self._opened.ranks.all_well(f"before round {pending.round}"):
            self._check_trained()
        # Nothing leaves before the next checkpoint, and without one nobody could go on.
        durable: Durable = "never" if self._saved is None else "behind"
        divisor = float(self.privacy_plan.lot_size)
        return self._opened.publish(pending, divisor, to_all=to_all, durable=durable)

    def _trim_spool(self) -> None:
        """Drop results that no checkpoint could be brought up to date with, and keep the rest within bounds.

        Without a checkpoint nothing can be resumed. Beyond the limit a resumed run spends the dropped rounds again.
        """
        shared = self._opened.shared
        if self._saved is None or shared.nbytes() > SPOOL_LIMIT_BYTES:
            shared.drop(self.round)

    def _pins(self) -> dict[str, str]:
        # The weights of round r + 1 follow from the start and the results of rounds 1..r; the last digest stands for
        # all of them, because each result is counted under the digest before it.
        return {"parent": self._parent}

    def _check_trained(self) -> None:
        """The mechanism covers what required a gradient, and was stepped, when the session was made."""
        check_hooks(self.model)
        now = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        other = now.keys() ^ self._parameters.keys()
        other |= {name for name in now.keys() - other if now[name] is not self._parameters[name]}
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if other or stepped != self._stepped:
            raise PrivacyError(
                f"`{min(other)}` was frozen, unfrozen or replaced after the session was made."
                if other
                else "the optimizer steps other parameters than when the session was made.",
                code="dp-trained-changed",
                where=f"round {self.round + 1}",
                why="what is trained without having been in the mechanism gets gradients without noise",
                fix="choose what is trained (requires_grad) and build the optimizer before make_private",
            )

    def _drop_other_gradients(self) -> None:
        """Nothing but a release may be stepped with."""
        stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in (*self.model.parameters(), *stepped):
            parameter.grad = None

    def _take(self, means: Mapping[str, Tensor], release: Release, names: Iterable[str]) -> None:
        """A release into the gradients of some parameters, and its extra parts into later rounds."""
        self._check_trained()
        self._drop_other_gradients()
        for name in names:
            put_gradient(self.optimizer, self._parameters[name], means[name])
        if isinstance(self.optimizer, ExpectsNoise):
            noise, size = self.lot_sums.fixed_noise(), self.privacy_plan.lot_size
            self.optimizer.expect_noise({p: noise.std_of(name) / size for name, p in self._parameters.items()})
        self.lot_sums.released.take(means)
        self._pending = None
        self._parent = release.digest
        self.round = release.round

    def _step(self, means: Mapping[str, Tensor], release: Release) -> None:
        """Post-processing of a released result: one optimizer step, each parameter at its owner; then all have it."""
        owners = self.lot_sums.ownership
        own = owners.own(self._parameters)
        self._take(means, release, own)
        if self._schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._schedule(release.round - 1)
        others = {id(p) for name, p in self._parameters.items()} - {id(self._parameters[name]) for name in own}
        with self._opened.ranks.all_well(f"step {release.round}"), stepping_without(self.optimizer, others):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        owners.hand_out(self._parameters)

    def _steps_by_owners(self, by_owners: bool) -> None:
        """Hold ranks that share a session to one way: what the optimizer keeps is at owners, or at all of them."""
        if self._opened.ranks.world > 1 and self._by_owners is not None and by_owners is not self._by_owners:
            raise PrivacyError(
                "put_gradients and step cannot take turns where several ranks share a session.",
                code="dp-step-ranks",
                where=f"round {self.round + 1}",
                why="with step each rank steps its own parameters, and its optimizer knows nothing of the others'",
                fix="use one of them; for put_gradients, go on from what save_state wrote",
            )
        self._by_owners = by_owners

    def _published(self) -> Release | None:
        """The next round's result, if a run before this one had released it already from the same weights."""
        if self._pending is not None or self.round >= self.privacy_plan.rounds:
            return None
        release = self._opened.shared.published(self.round + 1)
        if release is not None and release.pins != self._pins():
            self._opened.shared.burn(release, "the weights it was computed from are not these")
            return None
        return release

    def _replay(self) -> bool:
        """Step with the next round's result, if there is one already."""
        release = self._published()
        if release is not None:
            self._steps_by_owners(True)
            self._step(self._opened.tensors(release), release)
        return release is not None

    # -- what it costs ---------------------------------------------------------------------------------------------

    def spent(self) -> Spent:
        """What this run has spent so far, at the budget's delta; infinite for a seeded run."""
        return self._opened.spent()

    def lifetime(self) -> Spent:
        """What all private runs on this dataset that protect the same unit have spent together."""
        return self.ledger.lifetime(self.privacy_plan.budget.delta, self.run)

    def statement(self) -> Statement:
        """The privacy statement as of now; ``str()`` of it is for people, ``to_json()`` for programs."""
        return self._opened.statement()

    def training(self) -> Training:
        """What a saved model says of this run; see `coterie.models.split.trainings`."""
        budget = self.privacy_plan.budget
        kind: Literal["budget", "seeded"] = "budget" if self._opened.source.private else "seeded"
        return Training(self.run, kind, self.ledger.public_name(), budget.epsilon, budget.delta)

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write model, optimizer and public state to a folder, replacing an older checkpoint there.

        Nothing secret is in it: no lot, no random state, no noise. Results it includes leave the spool.
        """
        parts = self.parts(Path(path))
        self._opened.ranks.tell("saving", lambda: checkpoint.save(Path(path), *self.content(), parts))
        self.saved(Path(path))

    def parts(self, path: Path) -> tuple[str, ...]:
        """Let the other ranks put down what is theirs, beside what rank 0 writes to ``path`` next.

        Returns:
            Digests that the checkpoint names; none of one process.
        """
        ranks, owners = self._opened.ranks, self.lot_sums.ownership
        if ranks.world == 1:
            return ()

        def put_down() -> str | None:
            if ranks.rank == 0:
                return None
            return checkpoint.save_part(path, ranks.rank, self.model, self.optimizer, owners, self.run, self.round)

        return tuple(ranks.together(f"parts after round {self.round}", put_down)[1:])

    def save_state(self, path: str | Path) -> None:
        """`save` without model and optimizer, for loops that save these themselves, before this call."""

        def write() -> None:
            content, state = {checkpoint.SESSION: self.lot_sums.released.state()}, {checkpoint.SESSION: self._facts()}
            checkpoint.save(Path(path), content, state)

        self._opened.ranks.tell("saving", write)
        self.saved(Path(path))

    def content(self) -> tuple[Content, dict[str, Any]]:
        """What `save` writes, tensors and JSON values, for whoever keeps checkpoints in a store and calls `saved`."""
        extra = self.lot_sums.released.state()
        return checkpoint.pack(self.model, self.optimizer, self.lot_sums.ownership, extra, self._facts())

    def saved(self, folder: Path) -> None:
        """Everything up to now is durable in ``folder``: the results it includes leave the spool.

        Raises:
            RankError: the ranks' weights are not the same.
        """
        ranks = self._opened.ranks
        ranks.agree(f"saved after round {self.round}", lambda: {"the weights": weights_digest(self.model)})
        self.lot_sums.holdings.replicas.agree(
            f"experts after round {self.round}", lambda: {"the experts": experts_digest(self.model)}
        )
        self._saved = folder
        self._opened.shared.drop(self.round)
        keep_parts(folder, ranks.rank, ranks.world)

    def _facts(self) -> dict[str, Any]:
        opened = self._opened
        facts = plan_to_json(self.privacy_plan, opened.options, self.plan, self.noise_multiplier)
        facts["settings"]["user_column"] = opened.data.user_column
        return {
            **facts,
            "run": self.run,
            "round": self.round,
            "parent": self._parent,
            "dataset": opened.dataset,
            "ledger_root": str(self.ledger.folder.parent),
            "head": asdict(self.ledger.head()),
            "user_cap": opened.data.units.cap,
            "not_covered": list(opened.not_covered),
            "private": opened.source.private,
        }

    def restore(self, path: str | Path) -> None:
        """Load what `save` wrote into this session's model and optimizer, and replay what was released since.

        Raises:
            CheckpointError: another run's, dataset's or model's checkpoint.
            LedgerError: the ledger does not hold what it held when the checkpoint was made.
        """
        self.restore_state(path)
        self._steps_by_owners(True)
        checkpoint.read(Path(path)).load(self.model, self.optimizer, self.lot_sums.ownership)
        while self._replay():
            pass

    def restore_state(self, path: str | Path) -> None:
        """Load what `save_state` (or `save`) wrote; model and optimizer are the caller's.

        Raises:
            CheckpointError: another run's or dataset's checkpoint.
            LedgerError: the ledger does not hold what it held when the checkpoint was made.
        """
        folder = Path(path)
        saved = checkpoint.read(folder)
        facts = saved.facts
        if (facts["run"], facts["dataset"]) != (self.run, self._opened.dataset):
            raise CheckpointError(
                f"{folder} is of run {facts['run']} on dataset {facts['dataset'][:12]}, "
                f"not of {self.run} on {self._opened.dataset[:12]}.",
                code="dp-checkpoint-run",
                fix="resume with the dataset that the run was started with",
            )
        self._opened.ranks.tell("the checkpoint", lambda: self._check_counted(facts))
        self.lot_sums.released.restore(saved.extra())
        self.round, self._parent, self._saved = int(facts["round"]), str(facts["parent"]), folder

    def _check_counted(self, facts: Mapping[str, Any]) -> None:
        """Make sure that the ledger holds what it held when a checkpoint was made."""
        self.ledger.check_contains(LedgerHead(**facts["head"]))
        if self.releases.last_round() < facts["round"]:
            raise LedgerError(
                f"the checkpoint is at round {facts['round']}, the ledger at {self.releases.last_round()}.",
                code="dp-ledger-behind",
                why="privacy already spent would be forgotten",
                fix="put the newest ledger back",
            )

    @classmethod
    def resume(
        cls,
        path: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        collate_fn: Collate | None = None,
        loss_fn: LossFunction | None = None,
        *,
        schedule: Callable[[int], float] | None = None,
        state_only: bool = False,
        **options: Any,
    ) -> PrivateSession:
        """Continue a saved run: same settings, same ledger; nothing that was released is computed again.

        Args:
            path: what `save` was given.
            model: built as it was at the start.
            optimizer: the same, over the parameters of this model.
            dataset: the records of the start.
            collate_fn: as at the start.
            loss_fn: as at the start.
            schedule: as at the start.
            state_only: the checkpoint is one of `save_state`: model and optimizer are the caller's.
            options: objects that a checkpoint does not hold, and places: ``ledger``, ``digest``, ``users``,
                ``clipping``, ``method``, ``engine``, as `make_private` was given them, and ``ranks``, of any number.

        Raises:
            CheckpointError: no checkpoint, or another run's, dataset's or model's.
            PrivacyError: something that the run rests on is not in the checkpoint and was not given.
            LedgerError: the ledger is behind, or says otherwise.
        """
        opened = resume_run(Path(path), model, optimizer, dataset, collate_fn, loss_fn, **options)
        try:
            session = cls(model, optimizer, opened, schedule)
            session.restore_state(path) if state_only else session.restore(path)
        except BaseException:
            opened.close()
            raise
        return session

    def close(self) -> None:
        """Let another process or session continue this run. Without a checkpoint there is nothing to continue."""
        if self._saved is None:
            self._opened.shared.remove()
        self._opened.close()

    def __enter__(self) -> PrivateSession:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
