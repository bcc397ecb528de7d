"""The rounds of `coterie train` within a privacy budget, behind the interface of `coterie.training.stepper`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coterie.checkpoints import Content
from coterie.config import PrivacySpec, TrainConfig
from coterie.dp.balance import Balance
from coterie.dp.budget import Budget
from coterie.dp.dataset import dataset_digest
from coterie.dp.ledger import default_root
from coterie.dp.session import PrivateSession
from coterie.dp.setup import make_private, resume_session
from coterie.dp.statement import Statement
from coterie.models.trainings import Training
from coterie.training.data import Documents
from coterie.training.optim import AdamW, lr_at, make_optimizer
from coterie.training.prepared import Prepared
from coterie.training.provenance import artefacts, originals, record_facts
from coterie.training.stepper import Step

_SPENT_SHOWN = 40
"""How often, over a run, epsilon is computed for showing; each time costs a tenth of a second."""


class PrivateStepper:
    """Rounds within a budget: lots, noise and what they cost are a `PrivateSession`'s.

    Args:
        prepared: what to train on what; its settings have a ``privacy`` block.
        documents: what the records were made from; the ledger knows their text again.
        saved: a checkpoint to go on from. Rounds released since are repeated from the spool, not redrawn.

    Raises:
        PrivacyError: anything that would make the statement untrue; nothing is trained then.
        CheckpointError: the run cannot be resumed from what is there.
        LedgerError: the ledger is damaged, behind, or in use.
    """

    def __init__(self, prepared: Prepared, documents: Documents, saved: Path | None = None) -> None:
        self.optimizer = make_optimizer(prepared.model.parameters(), prepared.config.optim)
        if saved is None:
            self._session = _begun(prepared, documents, self.optimizer)
        else:
            self._session = _resumed(prepared, documents, self.optimizer, saved)

    @property
    def round(self) -> int:
        return self._session.round

    @property
    def finished(self) -> bool:
        return self.round == self._session.settings.rounds or self._session.releases.remaining == 0

    def step(self) -> Step:
        session = self._session
        session.step(session.next_lot())
        made = session.last
        assert made is not None
        every = max(1, session.settings.rounds // _SPENT_SHOWN)
        spent = session.spent() if self.finished or self.round % every == 0 else None
        figures = {
            "loss_not_private": made.loss,
            "lot_size_not_private": made.lot_size,
            "not_finite_not_private": made.masked,
        }
        if spent is not None:
            figures["epsilon"] = spent.epsilon
        return Step(made.loss, figures, made.nothing_learnt, spent)

    def content(self) -> tuple[Content, Mapping[str, Any]]:
        return self._session.content()

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


def _begun(prepared: Prepared, documents: Documents, optimizer: AdamW) -> PrivateSession:
    config, privacy = prepared.config, _privacy(prepared.config)
    return make_private(
        prepared.model, optimizer, prepared.train, prepared.train.collate,
        budget=Budget(privacy.epsilon, privacy.delta), clip_norm=privacy.clip_norm,
        lot_size=privacy.lot_size or config.train.batch_size, rounds=config.train.rounds,
        physical_batch=privacy.physical_batch, schedule=_schedule(config), clipping=privacy.clipping,
        method=privacy.method, isolation=privacy.isolation, adaptive_quantile=privacy.adaptive_quantile,
        sampler=privacy.sampler, max_lot=privacy.max_lot, users=prepared.train.users,
        records_per_user=privacy.records_per_user, balance=_balance(privacy),
        provenance=artefacts(config.model, config.data), ledger=_ledger(config),
        digest=dataset_digest(documents.texts), originals=originals(documents, prepared.train),
        seed=config.train.seed if privacy.seeded else None, record=record_facts(config.data),
    )  # fmt: skip


def _resumed(prepared: Prepared, documents: Documents, optimizer: AdamW, saved: Path) -> PrivateSession:
    config = prepared.config
    return resume_session(
        saved, prepared.model, optimizer, prepared.train, prepared.train.collate,
        schedule=_schedule(config), users=prepared.train.users, ledger=_ledger(config),
        digest=dataset_digest(documents.texts),
    )  # fmt: skip


def _privacy(config: TrainConfig) -> PrivacySpec:
    assert config.privacy is not None
    return config.privacy


def _ledger(config: TrainConfig) -> Path:
    return _privacy(config).ledger or default_root(config.run_dir)


def _balance(privacy: PrivacySpec) -> Balance:
    return Balance(privacy.balance, privacy.balance_coefficient, privacy.load_share, privacy.load_smoothing)


def _schedule(config: TrainConfig) -> Callable[[int], float]:
    return lambda round_index: lr_at(round_index, config.optim, config.train.rounds)
