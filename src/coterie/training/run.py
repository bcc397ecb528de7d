"""`coterie train`: one party trains by itself, in a run folder that holds everything.

The folder: ``config.yaml`` (the settings), ``run.json`` (identity), after the last round ``model/`` (a Hugging Face
checkpoint), and ``private/`` (see `coterie.training.folders`) with ``tokenizer/``, ``metrics.jsonl``,
``tensorboard/``, ``checkpoints/``, at the end ``evaluation.safetensors`` (held-out loss of every sequence) and
``result.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie import __version__
from coterie.config import TrainConfig, content_hash, dump_yaml, load_yaml
from coterie.errors import CheckpointError, ConfigError, DataError, PrivacyError
from coterie.federation.files import writing
from coterie.federation.run_folder import holding_its_folder
from coterie.federation.values import check_own
from coterie.models.saved import save_model
from coterie.models.trainings import Training
from coterie.training.checkpoint import CheckpointStore, load_model_tensors, model_tensors, write_json
from coterie.training.data import read_documents
from coterie.training.evaluate import Evaluation, evaluate
from coterie.training.folders import kept_private, private_folder
from coterie.training.loop import RoundResult, StopFlag, seed_round, train_round
from coterie.training.memory import model_state_bytes, peak_rss_bytes
from coterie.training.metrics import MetricsWriter
from coterie.training.optim import AdamW, lr_at, make_optimizer
from coterie.training.packing import RoundOrder, Sequences
from coterie.training.provenance import starting_trainings
from coterie.training.setup import build_for
from coterie.training.tokenizer import get_tokenizer, load_tokenizer_from, tokenize

KEPT_CHECKPOINTS = 2
Watch = Callable[[int, RoundResult, Evaluation | None], None]
"""Called after each round with the finished rounds, what the round did, and an evaluation if one was due."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        rounds: rounds that are finished.
        finished: all rounds are done; False after a clean stop.
        loss, perplexity, tokens: on the held-out text, nats per token; None without such text or before the end.
        model_state_bytes: parameters, gradients and optimiser state.
        peak_rss_bytes: largest resident size of the process.
    """

    run_dir: str
    rounds: int
    finished: bool
    loss: float | None
    perplexity: float | None
    tokens: int | None
    model_state_bytes: int
    peak_rss_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Prepared:
    """Everything a run works with, checked against each other."""

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    train: Sequences
    test: Sequences | None

    @property
    def run_id(self) -> str:
        """Hash of the settings that decide the result; the folder and the device do not."""
        return content_hash(self.config, without={"run_dir", "device"})


@dataclass(frozen=True)
class TrainedRun:
    """A run's settings, tokenizer and model after ``rounds`` finished rounds, in eval mode."""

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    rounds: int


@holding_its_folder
def start(config: TrainConfig, *, stop: StopFlag | None = None, watch: Watch | None = None) -> RunResult:
    """Train from the beginning in a fresh run folder.

    Raises:
        ConfigError: the folder holds a run already, or the settings do not fit each other or the model.
        DataError: the text cannot be used.
    """
    marker = config.run_dir / "run.json"
    if marker.exists():
        raise ConfigError(
            f"{config.run_dir} already holds a run.",
            code="run-dir-taken",
            why="two runs in one folder would mix their checkpoints and figures",
            fix=f"`coterie resume {config.run_dir}` goes on with it; otherwise choose another run_dir",
        )
    prepared = prepare(config)
    with kept_private(config.run_dir) as private:
        dump_yaml(config.run_dir / "config.yaml", config)
        prepared.tokenizer.save_pretrained(str(private / "tokenizer"))
        write_json(marker, {"run": prepared.run_id, "data": prepared.train.digest(), "coterie": __version__})
        optimizer = make_optimizer(prepared.model.parameters(), config.optim)
        return _train(prepared, optimizer, 0, stop or StopFlag(), watch)


@holding_its_folder
def resume(run_dir: Path, *, stop: StopFlag | None = None, watch: Watch | None = None) -> RunResult:
    """Go on from a run's newest checkpoint. The result is that of a run that was never stopped.

    Raises:
        CheckpointError: no run is here, its checkpoint is damaged, or settings or text changed since it started.
    """
    config, marker = _read_run(run_dir)
    prepared = prepare(config, tokenizer_dir=private_folder(run_dir) / "tokenizer")
    _check_unchanged(prepared, marker, run_dir)
    optimizer = make_optimizer(prepared.model.parameters(), config.optim)
    done = _restore(prepared, optimizer)
    with kept_private(run_dir):
        return _train(prepared, optimizer, done, stop or StopFlag(), watch)


def load_trained(run_dir: Path) -> TrainedRun:
    """A run's model with the weights of its newest checkpoint. Its text is not needed.

    Raises:
        CheckpointError: no run is here, or it has no checkpoint yet.
    """
    config, marker = _read_run(run_dir)
    private = private_folder(run_dir)
    tokenizer = load_tokenizer_from(private / "tokenizer")
    store = CheckpointStore(private / "checkpoints", str(marker["run"]))
    newest = store.newest()
    if newest is None:
        raise CheckpointError(
            f"{run_dir} has no checkpoint yet.",
            code="checkpoint-none",
            fix=f"`coterie resume {run_dir}` goes on with the run",
        )
    model = build_for(config, tokenizer)
    load_model_tensors(model, store.load(newest, "weights"))
    return TrainedRun(config, tokenizer, model.eval(), newest.round)


def evaluate_run(trained: TrainedRun, files: Sequence[Path] | None = None) -> Evaluation:
    """Losses of a trained run on some files, or on its own held-out text.

    Raises:
        DataError: the text cannot be used, or the run has none and no files are given.
    """
    data = trained.config.data
    chosen = tuple(files or data.test)
    if not chosen:
        raise DataError(
            f"{trained.config.run_dir} has no held-out text.",
            code="data-no-test",
            fix="name files with --data, or set data.test before training",
        )
    sequences = tokenize(read_documents(chosen, data), data, trained.tokenizer)
    return evaluate(trained.model, sequences, micro_batch=trained.config.train.micro_batch)


def read_config(run_dir: Path) -> TrainConfig:
    """The settings of a run.

    Raises:
        CheckpointError: no run is here.
    """
    return _read_run(run_dir)[0]


def prepare(config: TrainConfig, *, tokenizer_dir: Path | None = None) -> Prepared:
    """Read the text, make the tokenizer, build the model, and check that they fit. Writes nothing.

    Args:
        tokenizer_dir: the tokenizer of an earlier start of this run, which wins over the settings.
    """
    if config.privacy is not None:
        raise PrivacyError(
            "This loop trains without privacy, but the settings have a `privacy` block.",
            code="train-privacy",
            why="going on would train without the protection you asked for",
            fix="use `coterie train`, or coterie.training.private.run_private; or remove the block",
        )
    data = config.data
    train = read_documents(data.train, data)
    test = read_documents(data.test, data) if data.test else None
    tokenizer = (
        load_tokenizer_from(tokenizer_dir) if tokenizer_dir else get_tokenizer(data.tokenizer, config.model, data)
    )
    return Prepared(
        config,
        tokenizer,
        build_for(config, tokenizer),
        tokenize(train, data, tokenizer),
        tokenize(test, data, tokenizer) if test else None,
    )


def _train(prepared: Prepared, optimizer: AdamW, done: int, stop: StopFlag, watch: Watch | None) -> RunResult:
    config, model = prepared.config, prepared.model
    spec = config.train
    order = RoundOrder(len(prepared.train), spec.batch_size, spec.seed)
    model.train()
    evaluation: Evaluation | None = None
    with MetricsWriter(private_folder(config.run_dir), first_round=done) as metrics:
        while done < spec.rounds and not stop.asked:
            began = time.monotonic()
            seed_round(spec.seed, done)
            rate = lr_at(done, config.optim, spec.rounds)
            batches = (prepared.train.batch(rows) for rows in order.micro_batches(done, spec.micro_batch))
            result = train_round(model, optimizer, batches, lr=rate)
            check_own("the parameters", model.parameters(), where=f"after round {done + 1}; it was not saved")
            seconds = time.monotonic() - began
            metrics.log(done, loss=result.loss, lr=rate, tokens=result.tokens, seconds=seconds)
            done += 1
            evaluation = None
            if prepared.test is not None and (done == spec.rounds or _due(done, spec.eval_every)):
                evaluation = evaluate(model, prepared.test, micro_batch=spec.micro_batch)
                metrics.log(done - 1, test_loss=evaluation.loss)
            if watch is not None:
                watch(done, result, evaluation)
            if done == spec.rounds or stop.asked or _due(done, spec.checkpoint_every):
                _save(prepared, optimizer, done)
    if done == spec.rounds and prepared.test is not None and evaluation is None:  # resumed when all was done
        evaluation = evaluate(model, prepared.test, micro_batch=spec.micro_batch)
    outcome = RunResult(
        run_dir=str(config.run_dir),
        rounds=done,
        finished=done == spec.rounds,
        loss=evaluation.loss if evaluation and done == spec.rounds else None,
        perplexity=evaluation.perplexity if evaluation and done == spec.rounds else None,
        tokens=evaluation.tokens if evaluation and done == spec.rounds else None,
        model_state_bytes=model_state_bytes(model, optimizer),
        peak_rss_bytes=peak_rss_bytes(),
    )
    if outcome.finished:
        private = private_folder(config.run_dir)
        if evaluation is not None:
            evaluation.save(private / "evaluation.safetensors")
        training = Training(prepared.run_id[:12], "public" if config.data.provenance == "public" else "none")
        with writing(config.run_dir / "model"):
            trainings = (*starting_trainings(config.model), training)
            save_model(model, config.run_dir / "model", prepared.tokenizer, trainings)
        write_json(private / "result.json", outcome.as_json())
    return outcome


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _store(prepared: Prepared) -> CheckpointStore:
    return CheckpointStore(private_folder(prepared.config.run_dir) / "checkpoints", prepared.run_id)


def _save(prepared: Prepared, optimizer: AdamW, done: int) -> None:
    store, model = _store(prepared), prepared.model
    tensors = {"weights": model_tensors(model), "optimizer": optimizer.tensors(dict(model.named_parameters()))}
    store.write(done, tensors, {})
    store.keep_last(KEPT_CHECKPOINTS)


def _restore(prepared: Prepared, optimizer: AdamW) -> int:
    """Load the newest checkpoint and return its finished rounds; 0 when there is none."""
    store, model = _store(prepared), prepared.model
    newest = store.newest()
    if newest is None:
        return 0
    load_model_tensors(model, store.load(newest, "weights"))
    optimizer.load_tensors(dict(model.named_parameters()), store.load(newest, "optimizer"))
    return newest.round


def _read_run(run_dir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    try:
        marker = json.loads((run_dir / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{run_dir} holds no run of `coterie train`.",
            code="run-dir-none",
            fix="give the run_dir of a run that was started; it contains run.json",
        ) from None
    config = load_yaml(run_dir / "config.yaml", TrainConfig)
    return config.model_copy(update={"run_dir": run_dir}), marker


def _check_unchanged(prepared: Prepared, marker: dict[str, Any], run_dir: Path) -> None:
    for what, now, then in (
        ("settings", prepared.run_id, marker.get("run")),
        ("training text", prepared.train.digest(), marker.get("data")),
    ):
        if now != then:
            raise CheckpointError(
                f"The {what} of {run_dir} changed since the run was started.",
                code="run-changed",
                why="the rest of the run would not continue what was begun",
                fix="put them back, or start a new run in another run_dir",
            )
