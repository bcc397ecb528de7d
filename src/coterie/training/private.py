"""`coterie train` with a `privacy:` block: one party trains with differential privacy.

The run folder is that of `coterie.training.run`, plus ``private/session`` (the session's newest checkpoint) and,
after the last round, ``public/``: the model, its card and the statement, which may be given away. A seeded run, and
one whose start was made from private records, has no ``public/``. The ledger lives elsewhere. What ``metrics.jsonl``
says of losses and lots is for the owner's eyes: those figures are not private, and their names say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie import __version__
from coterie.config import PrivacySpec, TrainConfig, dump_yaml
from coterie.dp.balance import Balance
from coterie.dp.budget import Budget, Spent
from coterie.dp.dataset import dataset_digest
from coterie.dp.ledger import default_root
from coterie.dp.lot_sums import RoundFigures
from coterie.dp.session import PrivateSession
from coterie.dp.setup import make_private, resume_session
from coterie.errors import CheckpointError, ConfigError
from coterie.federation.files import writing
from coterie.federation.run_folder import holding_its_folder
from coterie.federation.values import check_own
from coterie.models.saved import save_model
from coterie.training.checkpoint import CheckpointStore, model_tensors, write_json
from coterie.training.data import Documents, read_documents
from coterie.training.evaluate import Evaluation, evaluate
from coterie.training.folders import kept_private, private_folder, public_folder, write_statement
from coterie.training.loop import StopFlag
from coterie.training.memory import model_state_bytes, peak_rss_bytes
from coterie.training.metrics import MetricsWriter
from coterie.training.optim import AdamW, lr_at, make_optimizer
from coterie.training.provenance import artefacts, originals, record_facts, starting_trainings
from coterie.training.run import KEPT_CHECKPOINTS, Prepared, RunResult, read_config
from coterie.training.setup import build_for
from coterie.training.tokenizer import get_tokenizer, load_tokenizer_from, tokenize

PrivateWatch = Callable[[int, RoundFigures, Spent | None, Evaluation | None], None]
"""Called after each round: finished rounds, owner-only figures, now and then what is spent, an evaluation if due."""

_SPENT_SHOWN = 40
"""How often, over a run, epsilon is computed for showing; each time costs a tenth of a second."""


@dataclass(frozen=True)
class PrivateRunResult(RunResult):
    """How a private run ended. ``loss`` and ``perplexity`` are of the held-out text.

    Attributes:
        privacy: the statement as JSON; ``epsilon`` and ``delta`` of this run at its top.
        statement: the statement as text.
    """

    privacy: dict[str, Any]
    statement: str


@holding_its_folder
def run_private(
    config: TrainConfig, *, stop: StopFlag | None = None, watch: PrivateWatch | None = None
) -> PrivateRunResult:
    """Train from the beginning in a fresh run folder, within the budget of ``config.privacy``.

    Raises:
        ConfigError: the folder holds a run already, or there is no privacy block.
        PrivacyError: anything that would make the statement untrue; nothing is trained then.
        DataError: the text cannot be used.
    """
    privacy = _privacy(config)
    if (config.run_dir / "run.json").exists():
        raise ConfigError(
            f"{config.run_dir} already holds a run.",
            code="run-dir-taken",
            why="two runs in one folder would mix their checkpoints and figures",
            fix=f"`coterie resume {config.run_dir}` goes on with it; otherwise choose another run_dir",
        )
    prepared, documents = _prepare(config, None)
    optimizer = make_optimizer(prepared.model.parameters(), config.optim)
    session = make_private(
        prepared.model, optimizer, prepared.train, prepared.train.collate,
        budget=Budget(privacy.epsilon, privacy.delta), clip_norm=privacy.clip_norm,
        lot_size=privacy.lot_size or config.train.batch_size, rounds=config.train.rounds,
        physical_batch=privacy.physical_batch, schedule=_schedule(config), clipping=privacy.clipping,
        method=privacy.method, isolation=privacy.isolation, adaptive_quantile=privacy.adaptive_quantile,
        sampler=privacy.sampler, max_lot=privacy.max_lot, users=prepared.train.users,
        records_per_user=privacy.records_per_user, balance=_balance(privacy),
        provenance=artefacts(config.model, config.data), ledger=privacy.ledger,
        digest=dataset_digest(documents.texts), originals=originals(documents, prepared.train),
        seed=config.train.seed if privacy.seeded else None, record=record_facts(config.data),
    )  # fmt: skip
    with session, kept_private(config.run_dir) as private:
        dump_yaml(config.run_dir / "config.yaml", config)
        prepared.tokenizer.save_pretrained(str(private / "tokenizer"))
        _save(prepared, session)
        marker = {"run": prepared.run_id, "privacy_run": session.run, "coterie": __version__}
        write_json(config.run_dir / "run.json", marker)
        return _train(prepared, optimizer, session, stop or StopFlag(), watch)


@holding_its_folder
def resume_private(
    run_dir: Path, *, stop: StopFlag | None = None, watch: PrivateWatch | None = None
) -> PrivateRunResult:
    """Go on with a private run. Rounds released since its checkpoint are repeated from the spool, not redrawn.

    Raises:
        CheckpointError: no private run is here, or settings or text changed since it started.
        LedgerError: the ledger is damaged or behind.
    """
    config = read_config(run_dir)
    private, privacy = private_folder(run_dir), _privacy(config)
    prepared, documents = _prepare(config, private / "tokenizer")
    if json.loads((run_dir / "run.json").read_text("utf-8")).get("run") != prepared.run_id:
        raise CheckpointError(
            f"The settings of {run_dir} changed since the run was started.",
            code="run-changed",
            why="noise, sampling rate and number of rounds are fixed in advance",
            fix="put them back, or start a new run in another run_dir",
        )
    optimizer = make_optimizer(prepared.model.parameters(), config.optim)
    session = resume_session(
        private / "session", prepared.model, optimizer, prepared.train, prepared.train.collate,
        schedule=_schedule(config), users=prepared.train.users, ledger=privacy.ledger,
        digest=dataset_digest(documents.texts),
    )  # fmt: skip
    with session, kept_private(run_dir):
        return _train(prepared, optimizer, session, stop or StopFlag(), watch)


def _privacy(config: TrainConfig) -> PrivacySpec:
    if config.privacy is None:
        raise ConfigError("The settings have no `privacy` block.", code="train-no-privacy", fix="add one")
    return config.privacy.model_copy(update={"ledger": config.privacy.ledger or default_root(config.run_dir)})


def _prepare(config: TrainConfig, tokenizer_dir: Path | None) -> tuple[Prepared, Documents]:
    """Text, tokenizer and model of a private run; records are sequences that hold text of one document only."""
    data, privacy = config.data, _privacy(config)
    train = read_documents(data.train, data, user_column=privacy.user_column)
    test = read_documents(data.test, data) if data.test else None
    tokenizer = (
        load_tokenizer_from(tokenizer_dir) if tokenizer_dir else get_tokenizer(data.tokenizer, config.model, data)
    )
    model = build_for(config, tokenizer)
    held_out = tokenize(test, data, tokenizer) if test else None
    return Prepared(config, tokenizer, model, tokenize(train, data, tokenizer), held_out), train


def _balance(privacy: PrivacySpec) -> Balance:
    return Balance(privacy.balance, privacy.balance_coefficient, privacy.load_share, privacy.load_smoothing)


def _schedule(config: TrainConfig) -> Callable[[int], float]:
    return lambda round_index: lr_at(round_index, config.optim, config.train.rounds)


def _train(
    prepared: Prepared, optimizer: AdamW, session: PrivateSession, stop: StopFlag, watch: PrivateWatch | None
) -> PrivateRunResult:
    config, spec = prepared.config, prepared.config.train
    evaluation: Evaluation | None = None
    every = max(1, spec.rounds // _SPENT_SHOWN)
    with MetricsWriter(private_folder(config.run_dir), first_round=session.round) as metrics:
        for lot in session:
            session.step(lot)
            done = session.round
            check_own("the parameters", prepared.model.parameters(), where=f"after round {done}; it was not saved")
            last = done == spec.rounds or session.releases.remaining == 0
            figures = session.last
            assert figures is not None
            metrics.log(
                done - 1, loss_not_private=figures.loss, lot_size_not_private=figures.lot_size,
                not_finite_not_private=figures.masked,
            )  # fmt: skip
            spent = session.spent() if last or _due(done, every) else None
            if spent is not None:
                metrics.log(done - 1, epsilon=spent.epsilon)
            evaluation = None
            if prepared.test is not None and (last or _due(done, spec.eval_every)):
                evaluation = evaluate(prepared.model, prepared.test, micro_batch=spec.micro_batch)
                metrics.log(done - 1, test_loss=evaluation.loss)
            if watch is not None:
                watch(done, figures, spent, evaluation)
            if last or stop.asked or _due(done, spec.checkpoint_every):
                _save(prepared, session)
            if stop.asked:
                break
    return _finish(prepared, optimizer, session, evaluation)


def _finish(
    prepared: Prepared, optimizer: AdamW, session: PrivateSession, evaluation: Evaluation | None
) -> PrivateRunResult:
    config, model = prepared.config, prepared.model
    finished = session.round == config.train.rounds or session.releases.remaining == 0
    if finished and prepared.test is not None and evaluation is None:
        evaluation = evaluate(model, prepared.test, micro_batch=config.train.micro_batch)
    statement = session.statement()
    spent = statement.to_json()["spent"]
    outcome = PrivateRunResult(
        run_dir=str(config.run_dir),
        rounds=session.round,
        finished=finished,
        loss=evaluation.loss if evaluation and finished else None,
        perplexity=evaluation.perplexity if evaluation and finished else None,
        tokens=evaluation.tokens if evaluation and finished else None,
        model_state_bytes=model_state_bytes(model, optimizer),
        peak_rss_bytes=peak_rss_bytes(),
        privacy={**spent, **statement.to_json()},
        statement=str(statement),
    )
    if finished:
        private = private_folder(config.run_dir)
        if evaluation is not None:
            evaluation.save(private / "evaluation.safetensors")
        place = public_folder(config.run_dir) if statement.private and _public_start(config) else private
        with writing(place / "model"):
            save_model(
                model, place / "model", prepared.tokenizer, (*starting_trainings(config.model), session.training())
            )
        write_json(private / "result.json", outcome.as_json())
        write_statement(place, outcome.statement)
    return outcome


def _public_start(config: TrainConfig) -> bool:
    """Whether nothing that the run started from was made from private records without privacy."""
    model, tokenizer = config.model, config.data.tokenizer
    return "private" not in (model.provenance, tokenizer.provenance) and model.overrule_origin is None


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _save(prepared: Prepared, session: PrivateSession) -> None:
    """The session's checkpoint, and the weights where `coterie eval` and `coterie generate` look for them."""
    private = private_folder(prepared.config.run_dir)
    session.save(private / "session")
    if session.round:
        store = CheckpointStore(private / "checkpoints", prepared.run_id)
        store.write(session.round, {"weights": model_tensors(prepared.model)}, {})
        store.keep_last(KEPT_CHECKPOINTS)
