"""Rounds of `coterie train` within a privacy budget, behind the interface of `coterie.training.single.stepper`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coterie.checkpoints import Content, changing_tensors
from coterie.config import PrivacySpec, TrainConfig
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.ledger import default_root
from coterie.dp.accounting.statement import Statement
from coterie.dp.losses import LossFunction
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.dp.session import PrivateSession
from coterie.dp.setup import start_session
from coterie.models.split.trainings import Training
from coterie.ranks.ranks import Ranks
from coterie.training.data.documents import Documents
from coterie.training.optim import Float32Optimizer, lr_at, make_optimizer
from coterie.training.planning.forecast import Announce
from coterie.training.provenance import artefacts, originals, record_facts
from coterie.training.single.prepared import Prepared
from coterie.training.single.previewed import forecast_of
from coterie.training.single.setup import plan_of
from coterie.training.single.stepper import Step

_SPENT_SHOWN = 40
"""How often, over a run, epsilon is computed for showing; each time costs a tenth of a second."""


class PrivateStepper:
    """Rounds within a budget: lots, noise and what they cost are a `PrivateSession`'s.

    Args:
        prepared: what to train on what; its settings have a ``privacy`` block.
        documents: what the records were made from; the ledger knows their text again.
        saved: a checkpoint to go on from. Rounds released since are repeated from the spool, not redrawn.
        ranks: that share every round; None: this process alone.
        announce: hears what a new run will cost, before its ledger is opened.

    Raises:
        PrivacyError: anything that would make the statement untrue; nothing is trained then.
        CheckpointError: the run cannot be resumed from what is there.
        LedgerError: the ledger is damaged, behind, or in use.
    """

    def __init__(
        self,
        prepared: Prepared,
        documents: Documents,
        saved: Path | None = None,
        ranks: Ranks | None = None,
        announce: Announce | None = None,
    ) -> None:
        config, privacy = prepared.config, _privacy(prepared.config)
        self._keeps_ledger = ranks is None or ranks.rank == 0
        plan = plan_of(config, privacy, prepared.model)
        if saved is None and announce is not None:
            announce(forecast_of(config, privacy, plan, documents, prepared.train))
        self.optimizer = make_optimizer(prepared.stepped.values(), config.optim)
        self._prepared = prepared
        if saved is None:
            self._session = _begun(prepared, documents, self.optimizer, plan, ranks)
        else:
            self._session = _resumed(prepared, documents, self.optimizer, saved, ranks)

    @property
    def round(self) -> int:
        return self._session.round

    @property
    def finished(self) -> bool:
        return self.round == self._session.privacy_plan.rounds or self._session.remaining == 0

    def step(self) -> Step:
        session = self._session
        session.step(session.next_lot())
        last = session.last
        assert last is not None
        every = max(1, session.privacy_plan.rounds // _SPENT_SHOWN)
        due = self._keeps_ledger and (self.finished or self.round % every == 0)
        spent = session.spent() if due else None
        metrics = {
            "loss_not_private": last.loss,
            "drawn_not_private": last.drawn,
            "not_finite_not_private": last.masked,
        }
        if session.lot_sums.balancer is not None:
            metrics |= session.lot_sums.balancer.figures()
        if spent is not None:
            metrics |= {**asdict(spent), "noise_multiplier": session.noise_multiplier}
        return Step(last.loss, metrics, last.nothing_learnt, spent)

    def content(self) -> tuple[Content, Mapping[str, Any]]:
        content, state = self._session.content()
        if not self._prepared.base:
            return content, state
        changing = changing_tensors(self._prepared.model)
        return {**content, "weights": {name: content["weights"][name] for name in changing}}, state

    def parts(self, folder: Path) -> tuple[str, ...]:
        return self._session.parts(folder)

    def saved(self, folder: Path) -> None:
        self._session.saved(folder)

    def marker(self) -> Mapping[str, str]:
        return {"privacy_run": self._session.run}

    def training(self) -> Training:
        return self._session.training()

    def statement(self) -> Statement:
        return self._session.statement()

    def close(self) -> None:
        self._session.close()


def _begun(
    prepared: Prepared, documents: Documents, optimizer: Float32Optimizer, plan: PrivacyPlan, ranks: Ranks | None
) -> PrivateSession:
    config, privacy = prepared.config, _privacy(prepared.config)
    data = PrivateData.of(
        prepared.train, prepared.train.collate, users=prepared.train.users, records_per_user=plan.records_per_user,
        digest=dataset_digest(documents.texts), originals=originals(documents, prepared.train, prepared.config.data),
    )  # fmt: skip
    return start_session(
        prepared.model, optimizer, data, plan, ComputeOptions.of_settings(privacy).repeatable(plan.seed),
        provenance=artefacts(config.model, config.data, preconditioner=config.preconditioner), ledger=_ledger(config),
        record=record_facts(config.data),
        schedule=_schedule(config), ranks=ranks, loss_fn=_loss(prepared),
        trained=None if config.lora is None else config.lora.words(),
    )  # fmt: skip


def _resumed(
    prepared: Prepared, documents: Documents, optimizer: Float32Optimizer, saved: Path, ranks: Ranks | None
) -> PrivateSession:
    config = prepared.config
    return PrivateSession.resume(
        saved, prepared.model, optimizer, prepared.train, prepared.train.collate, _loss(prepared),
        schedule=_schedule(config), users=prepared.train.users, ledger=_ledger(config),
        digest=dataset_digest(documents.texts), ranks=ranks,
    )  # fmt: skip


def _loss(prepared: Prepared) -> LossFunction | None:
    words = prepared.train.words
    return None if words is None else words.loss


def _privacy(config: TrainConfig) -> PrivacySpec:
    assert config.privacy is not None
    return config.privacy


def _ledger(config: TrainConfig) -> Path:
    return _privacy(config).ledger or default_root(config.run_dir)


def _schedule(config: TrainConfig) -> Callable[[int], float]:
    return lambda taken: lr_at(taken + 1, config.optim, config.train.rounds)
