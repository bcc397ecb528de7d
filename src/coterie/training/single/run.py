"""`coterie train`: one party trains by itself, in a run folder that holds everything.

The folder: ``config.yaml`` (the settings), ``run.json`` (identity) and ``private/`` (see `coterie.training.folders`)
with ``tokenizer/``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``, at the end ``evaluation.safetensors``
(held-out loss of every sequence) and ``result.json``. The model, a Hugging Face checkpoint, follows the last round:

- without a ``privacy`` block into ``model/``;
- with `lora` into ``adapter/`` in place of ``model/``, as plain peft loads it;
- with one into ``public/``, with its card and the statement, which may be given away together. A seeded run, and one
  whose start was made from private records, has no ``public/``: there it goes into ``private/``. The ledger lies
  elsewhere. What ``metrics.jsonl`` says of losses and lots is not private, and its names say so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coterie.config import TrainConfig, due, dump_yaml
from coterie.dp.accounting.statement import Statement
from coterie.dp.checkpoint import SESSION
from coterie.errors import CheckpointError, ConfigError, as_argument
from coterie.federation.rounds.run_folder import RunFolder
from coterie.federation.wire.values import check_own
from coterie.models.spread.gathered import give_experts
from coterie.models.spread.spread import spread_of
from coterie.models.streaming.beside_adapters import without_merging
from coterie.ranks.ranks import Ranks, ranks_or_alone
from coterie.revision import software
from coterie.storage import put_away, write_json
from coterie.training.evaluate import Evaluation, evaluate
from coterie.training.folders import (
    TOKENIZER_FOLDER,
    kept_private,
    no_run,
    private_folder,
    public_folder,
    write_statement,
)
from coterie.training.loop import StopFlag
from coterie.training.metrics import MetricsWriter, read_metrics
from coterie.training.planning.forecast import Announce
from coterie.training.planning.measured import model_state_bytes, peak_rss_bytes
from coterie.training.provenance import trainings_before
from coterie.training.public_figures import figures_of_train, public_start
from coterie.training.single.prepared import MARKER, Prepared, lengthened, make_longer, prepare, read_run, run_id
from coterie.training.single.private_stepper import PrivateStepper
from coterie.training.single.result import save_result
from coterie.training.single.setup import keep
from coterie.training.single.stepper import PlainStepper, Step, Stepper
from coterie.training.trackers import Trackers, check_report, reporting

KEPT_CHECKPOINTS = 2
"""While there are rounds to come, in case the newest is torn; once they are done, the newest and the model stay."""
Watch = Callable[[int, Step, Evaluation | None], None]
"""Called after each round with the finished rounds, what the round did, and an evaluation if one was due."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        rounds: rounds that are finished.
        finished: all rounds are done; False after a clean stop.
        loss, perplexity, tokens: on the held-out text, nats per token; None without such text or before the end.
        loss_before: the same before the first round.
        model_state_bytes: parameters, gradients and optimiser state.
        peak_rss_bytes: largest resident size of the process.
        privacy: the statement as JSON, ``epsilon`` and ``delta`` of this run at its top; None without privacy.
        statement: the statement as text; empty without privacy.
    """

    run_dir: str
    rounds: int
    finished: bool
    loss: float | None
    perplexity: float | None
    tokens: int | None
    loss_before: float | None
    model_state_bytes: int
    peak_rss_bytes: int
    privacy: dict[str, Any] | None = None
    statement: str = ""

    def as_json(self) -> dict[str, Any]:
        values = {**asdict(self), **software()}
        if self.privacy is None:
            del values["privacy"], values["statement"]
        return values


def start(
    config: TrainConfig,
    *,
    stop: StopFlag | None = None,
    watch: Watch | None = None,
    ranks: Ranks | None = None,
    announce: Announce | None = None,
) -> RunResult:
    """Train from the beginning in a fresh run folder; within the budget where the settings have a ``privacy`` block.

    Args:
        config: the settings.
        stop: looked at between rounds.
        watch: hears of every round.
        ranks: that share a private run, where this is rank 0; the others `follow`.
        announce: hears what a private run will cost, before anything is spent.

    Raises:
        ConfigError: the folder holds a run already, or the settings do not fit each other or the model.
        DataError: the text cannot be used.
        PrivacyError: anything that would make a privacy statement untrue; nothing is trained then.
    """
    with RunFolder(config.run_dir, ranks):
        if (config.run_dir / MARKER).exists():
            raise ConfigError(
                f"{config.run_dir} already holds a run.",
                code="run-dir-taken",
                why="two runs in one folder would mix their checkpoints and figures",
                fix=f"`coterie resume {as_argument(config.run_dir)}` goes on with it; or choose another run_dir",
            )
        check_report(config.report_to, figures_of_train(config))
        prepared, stepper = _begun(config, ranks, announce)
        with closing(stepper), kept_private(config.run_dir) as private, _reporting(config, private) as trackers:
            dump_yaml(config.run_dir / "config.yaml", config)
            prepared.tokenizer.save_pretrained(str(private / TOKENIZER_FOLDER))
            keep(prepared.model, private)
            run = Run(prepared, stepper, stop or StopFlag(), watch, ranks, trackers)
            if config.privacy is not None:  # the ledger holds the run from now on: it cannot begin again, only go on
                run.save()
            write_json(config.run_dir / MARKER, {"run": prepared.run_id, **software(), **stepper.marker()})
            return run.go_on()


def resume(
    run_dir: Path,
    *,
    stop: StopFlag | None = None,
    watch: Watch | None = None,
    ranks: Ranks | None = None,
    rounds: int | None = None,
) -> RunResult:
    """Go on from a run's newest checkpoint. The result is that of a run that was never stopped.

    Rounds that a private run released since are repeated from the spool, not redrawn.

    Args:
        run_dir: of the run.
        stop: looked at between rounds.
        watch: hears of every round.
        ranks: as for `start`, of any number.
        rounds: make the run this long; None: as long as it is. From here on the learning rate is that of so many.

    Raises:
        ConfigError: it cannot be made so long.
        CheckpointError: no run is here, its checkpoint is damaged, or settings or text changed since it started.
        LedgerError: the ledger is damaged or behind.
    """
    if not run_dir.is_dir():  # before one is made and locked
        raise no_run(run_dir, " of `coterie train`")
    with RunFolder(run_dir, ranks):
        if rounds is not None:
            make_longer(run_dir, rounds)
        prepared, stepper = _resumed(run_dir, ranks)
        with closing(stepper), kept_private(run_dir) as private, _reporting(prepared.config, private) as trackers:
            return Run(prepared, stepper, stop or StopFlag(), watch, ranks, trackers).go_on()


def follow(config: TrainConfig, ranks: Ranks, *, resumed: bool = False) -> None:
    """Share a private run as another rank than the first: compute a part of every lot, and write no checkpoint.

    Args:
        config: the settings, of rank 0's `start` or of the run that it resumes.
        ranks: that share it.
        resumed: rank 0 calls `resume`.

    Raises:
        CoterieError: what any rank raises.
    """
    prepared, stepper = _resumed(config.run_dir, ranks) if resumed else _begun(config, ranks)
    with closing(stepper):
        while (next_step := _agreed(ranks, "", "")) != [_END, ""]:
            what, where = next_step
            if what == _ROUND:
                stepper.step()
                _check_finite(prepared, stepper)
            elif what == _SAVE:
                stepper.parts(Path(where))
                stepper.saved(Path(where))
            elif what == _EVALUATE:
                _evaluated(prepared, ranks)
            elif what == _GIVE:
                _give_experts(prepared)


def _reporting(config: TrainConfig, private: Path) -> AbstractContextManager[Trackers | None]:
    return reporting(config.report_to, figures_of_train(config), private)


_ROUND, _SAVE, _EVALUATE, _GIVE, _END = "a round", "a checkpoint", "an evaluation", "the experts", "the end"


def _agreed(ranks: Ranks | None, what: str, where: str = "") -> list[str]:
    """What comes next, as rank 0 says, and the folder of a checkpoint."""
    step: list[str] = ranks_or_alone(ranks).tell("what comes next", lambda: [what, where])
    return step


def _evaluated(prepared: Prepared, ranks: Ranks | None) -> Evaluation | None:
    """The loss of the held-out text, as all ranks compute it together; None where there is none."""
    if prepared.test is None:
        return None
    with without_merging(prepared.model):
        return evaluate(prepared.model, prepared.test, batch_size=prepared.config.train.micro_batch, ranks=ranks)


def _give_experts(prepared: Prepared) -> None:
    spread = spread_of(prepared.model)
    if spread is not None:
        give_experts(prepared.model, spread)


def _check_finite(prepared: Prepared, stepper: Stepper) -> None:
    check_own("the parameters", prepared.model.parameters(), where=f"after round {stepper.round}; it was not saved")


def _begun(config: TrainConfig, ranks: Ranks | None, announce: Announce | None = None) -> tuple[Prepared, Stepper]:
    prepared, documents = prepare(config, spread_over=_spread_over(config, ranks))
    if config.privacy is None:
        return prepared, PlainStepper(prepared)
    return prepared, PrivateStepper(prepared, documents, ranks=ranks, announce=announce)


def _spread_over(config: TrainConfig, ranks: Ranks | None) -> Ranks | None:
    return ranks_or_alone(ranks) if config.spread_over > 1 else None


def _resumed(run_dir: Path, ranks: Ranks | None) -> tuple[Prepared, Stepper]:
    started, marker = read_run(run_dir)
    run, config = run_id(started), lengthened(started, marker)
    kept, spread_over = private_folder(run_dir), _spread_over(config, ranks)
    prepared, documents = prepare(config, kept=kept, run=run, spread_over=spread_over)
    _check_unchanged(prepared, marker, run_dir)
    if config.privacy is None:
        return prepared, PlainStepper(prepared, prepared.store.newest())
    saved = ranks_or_alone(ranks).tell("the newest checkpoint", lambda: str(_session_folder(prepared)))
    return prepared, PrivateStepper(prepared, documents, Path(saved), ranks)


def _session_folder(prepared: Prepared) -> Path:
    """The newest checkpoint that holds the session of a private run."""
    newest = prepared.store.newest()
    if newest is not None and SESSION in newest.state:
        return newest.path
    return _earlier_session(prepared.config)


def _earlier_session(config: TrainConfig) -> Path:
    """Where the versions before this one kept it, apart from the weights."""
    return private_folder(config.run_dir) / "session"


def _check_unchanged(prepared: Prepared, marker: dict[str, Any], run_dir: Path) -> None:
    changed = [] if marker.get("run") == prepared.run_id else ["settings"]
    if prepared.config.privacy is None and marker.get("data") != prepared.train.digest():  # else the ledger looks
        changed.append("training text")
    if changed:
        raise CheckpointError(
            f"The {changed[0]} of {run_dir} changed since the run was started.",
            code="run-changed",
            why="the rest of the run would not continue what was begun",
            fix="put them back, or start a new run in another run_dir",
        )


class Run:
    """The rounds of a run with what belongs to each: figures, evaluations, checkpoints, and the end.

    Args:
        stop: looked at between rounds.
        watch: hears of every round.
        ranks: hear what comes next.
        trackers: hear the public figures.
    """

    def __init__(
        self,
        prepared: Prepared,
        stepper: Stepper,
        stop: StopFlag,
        watch: Watch | None,
        ranks: Ranks | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self._ranks = ranks
        self._prepared = prepared
        self._stepper = stepper
        self._stop = stop
        self._watch = watch
        self._trackers = trackers
        self._private = private_folder(prepared.config.run_dir)
        self._evaluation: Evaluation | None = None

    def go_on(self) -> RunResult:
        """Do the rounds that are left, or those until someone asks for a stop.

        Raises:
            RoundError: training has diverged.
            CheckpointError: the disk is full or broken.
        """
        stepper = self._stepper
        with MetricsWriter(self._private, finished=stepper.round, trackers=self._trackers) as metrics:
            if stepper.round == 0:
                before = self._evaluate()
                if before is not None:
                    metrics.log(0, test_loss=before.loss)
            while not stepper.finished and not self._stop.asked:
                self._round(metrics)
        if stepper.finished and self._evaluation is None:  # resumed when all was done, or all was released
            self._evaluation = self._evaluate()
            if self._prepared.store.rounds()[-1:] != [stepper.round]:
                self.save()
        outcome = self._outcome()
        if outcome.finished:
            self._finish(outcome)
        _agreed(self._ranks, _END)
        return outcome

    def _round(self, metrics: MetricsWriter) -> None:
        stepper, spec = self._stepper, self._prepared.config.train
        _agreed(self._ranks, _ROUND)
        step = stepper.step()
        done = stepper.round
        _check_finite(self._prepared, stepper)
        metrics.log(done, **step.metrics)
        self._evaluation = self._evaluate() if stepper.finished or due(done, spec.eval_every) else None
        if self._evaluation is not None:
            metrics.log(done, test_loss=self._evaluation.loss)
        if self._watch is not None:
            self._watch(done, step, self._evaluation)
        if stepper.finished or self._stop.asked or due(done, spec.checkpoint_every):
            self.save()

    def save(self) -> None:
        """Write a checkpoint; only the newest stay.

        Raises:
            CheckpointError: the disk is full or broken.
        """
        store, stepper = self._prepared.store, self._stepper
        path = store.path(stepper.round)
        _agreed(self._ranks, _SAVE, str(path))
        parts = stepper.parts(path)
        lora = self._prepared.config.lora
        store.write(
            stepper.round,
            *stepper.content(),
            parts=parts,
            lora=None if lora is None else lora.model_dump(mode="json"),
            bases={"weights": self._prepared.base},
        )
        stepper.saved(path)
        store.keep_last(1 if stepper.finished else KEPT_CHECKPOINTS)
        put_away(_earlier_session(self._prepared.config))

    def _evaluate(self) -> Evaluation | None:
        _agreed(self._ranks, _EVALUATE)
        return _evaluated(self._prepared, self._ranks)

    def _outcome(self) -> RunResult:
        stepper, statement = self._stepper, self._stepper.statement()
        measured = self._evaluation if stepper.finished else None
        facts = statement.to_json() if statement is not None else None
        return RunResult(
            run_dir=str(self._prepared.config.run_dir),
            rounds=stepper.round,
            finished=stepper.finished,
            loss=measured.loss if measured else None,
            perplexity=measured.perplexity if measured else None,
            tokens=measured.tokens if measured else None,
            loss_before=self._loss_before() if measured else None,
            model_state_bytes=model_state_bytes(self._prepared.model, stepper.optimizer),
            peak_rss_bytes=peak_rss_bytes(),
            privacy={**facts["spent"], **facts} if facts is not None else None,
            statement=str(statement) if statement is not None else "",
        )

    def _loss_before(self) -> float | None:
        """From the figures, since an earlier process may have begun the run."""
        return next((row.get("test_loss") for row in read_metrics(self._private) if row["round"] == 0), None)

    def _finish(self, outcome: RunResult) -> None:
        prepared, stepper = self._prepared, self._stepper
        if self._evaluation is not None:
            self._evaluation.save(self._private / "evaluation.safetensors")
        place = self._place(stepper.statement())
        _agreed(self._ranks, _GIVE)
        start = prepared.config
        run = prepared.run_id[:12]
        before = trainings_before(start.model, start.data, run, preconditioner=start.preconditioner)
        save_result(prepared, place, (*before, stepper.training()))
        if outcome.statement:
            write_statement(place, outcome.statement)
        write_json(self._private / "result.json", outcome.as_json())

    def _place(self, statement: Statement | None) -> Path:
        """The folder for the model."""
        run_dir = self._prepared.config.run_dir
        if statement is None:
            return run_dir
        start = self._prepared.config
        given_away = statement.private and public_start(start.model, start.data, start.preconditioner)
        return public_folder(run_dir) if given_away else self._private
