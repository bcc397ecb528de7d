"""A run as its newest checkpoint, or a federation as its last round, left it: measured, or asked for text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.checkpoints import load_weights
from coterie.config import FederationConfig, ModelSpec, PartyConfig, TrainConfig, TrainSpec, load_yaml
from coterie.errors import CheckpointError, DataError, as_argument
from coterie.models.preconditioner import detach
from coterie.models.zoo.build import build_model
from coterie.training.data.documents import read_documents
from coterie.training.data.tokenizer import load_tokenizer_from, tokenize
from coterie.training.evaluate import Evaluation, evaluate
from coterie.training.folders import MODEL, TOKENIZER_FOLDER, private_folder, result_folder
from coterie.training.party.process import FEDERATION_FILE, PARTY_FILE
from coterie.training.single.prepared import checkpoints_of, read_run
from coterie.training.single.setup import as_trained, build_for, pick_device


@dataclass(frozen=True)
class TrainedRun:
    """A run's settings, tokenizer and model after ``rounds`` finished rounds, in eval mode, adapters merged."""

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    rounds: int


def load_trained(run_dir: Path) -> TrainedRun:
    """A run's model with the weights of its newest checkpoint, or the model that a party of a federation ended with.

    Its text is not needed.

    Raises:
        CheckpointError: no run is here, or it has no checkpoint, or no model, yet.
    """
    if (run_dir / PARTY_FILE).is_file():
        return _of_party(run_dir)
    config, marker = read_run(run_dir)
    tokenizer = load_tokenizer_from(private_folder(run_dir) / TOKENIZER_FOLDER)
    store = checkpoints_of(run_dir, str(marker["run"]))
    newest = store.newest()
    if newest is None or newest.round == 0:
        raise CheckpointError(
            f"{run_dir} has no checkpoint yet.",
            code="checkpoint-none",
            fix=f"`coterie resume {as_argument(run_dir)}` goes on with the run",
        )
    model = build_for(config, tokenizer)
    adapted: Any = as_trained(model, config, private_folder(run_dir))
    load_weights(newest, adapted)
    detach(model)
    if config.lora is not None:
        model = adapted.merge_and_unload()
    return TrainedRun(config, tokenizer, model.eval(), newest.round)


def model_of(place: Path) -> PreTrainedModel:
    """The model of a run, or of an exported checkpoint, in eval mode; on the GPU where there is one.

    Raises:
        CheckpointError: no run and no checkpoint is here, or the run has no model yet.
    """
    if not (place / "config.json").is_file():
        return load_trained(place).model
    return build_model(ModelSpec(path=place), device=pick_device("auto")).eval()


def tokenizer_of(place: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, of a party's run, or of an exported checkpoint.

    Raises:
        CheckpointError: no run and no checkpoint is here.
        DataError: it has no tokenizer.
    """
    if (place / "config.json").is_file():
        return load_tokenizer_from(place)
    if not (place / PARTY_FILE).is_file():
        read_run(place)
    return load_tokenizer_from(private_folder(place) / TOKENIZER_FOLDER)


def model_of_party(run_dir: Path) -> Path:
    """The folder of the whole model that a party of a federation ended with.

    Raises:
        CheckpointError: it has none.
    """
    folder = result_folder(run_dir, [MODEL])
    if folder is None:
        raise CheckpointError(
            f"{run_dir} holds no whole model.",
            code="run-no-model",
            why="a model is written after the last round; in `tokens` experts stay with their hosts, and a run with "
            "`lora` ends with adapters",
            fix="go on with `coterie resume`, join everybody's parts with `coterie export`, or ask through the "
            "federation with --live",
        )
    return folder


def _of_party(run_dir: Path) -> TrainedRun:
    party = load_yaml(run_dir / PARTY_FILE, PartyConfig)
    federation = load_yaml(run_dir / FEDERATION_FILE, FederationConfig)
    folder = model_of_party(run_dir)
    spec = federation.train
    config = TrainConfig(
        model=ModelSpec(path=folder, dtype=federation.model.dtype),
        data=party.data,
        train=TrainSpec(rounds=spec.rounds, batch_size=spec.batch_size, micro_batch=spec.micro_batch),
        run_dir=run_dir,
        device=party.device,
    )
    tokenizer = load_tokenizer_from(folder)
    return TrainedRun(config, tokenizer, build_for(config, tokenizer).eval(), spec.rounds)


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
    return evaluate(trained.model, sequences, batch_size=trained.config.train.micro_batch)
