"""Everything a run of `coterie train` works with, read from its settings and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from coterie.checkpoints import CheckpointStore, frozen_digest
from coterie.config import TrainConfig, content_hash, load_yaml
from coterie.errors import CheckpointError, ConfigError
from coterie.ranks.ranks import Ranks
from coterie.storage import check_keys, json_object, write_json
from coterie.training.data.documents import Documents, read_documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import get_tokenizer, load_tokenizer_from, tokenize
from coterie.training.folders import TOKENIZER_FOLDER, no_run, private_folder
from coterie.training.single.setup import as_trained, build_for

MARKER = "run.json"
"""Names a run folder's run: the hash of its settings, and what else a resumed one is held to."""

ROUNDS = "rounds"
_NOT_OF_THE_RESULT = frozenset({"run_dir", "device", "devices", "experts_over", "layers_over", "report_to"})
_MARKED = ("run", "coterie", "revision", "data", "privacy_run", ROUNDS)
"""In the marker of a run that was made longer: how many it has now."""


@dataclass(frozen=True)
class Prepared:
    """Settings, tokenizer, model and sequences of a run, and its identity: see `run_id`.

    Attributes:
        model: what is trained; with `lora` peft's model.
        base: content digest of the frozen weights, which checkpoints leave out; empty where everything is trained.
    """

    config: TrainConfig
    run_id: str
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    train: Sequences
    test: Sequences | None
    base: str = ""

    @property
    def stepped(self) -> dict[str, nn.Parameter]:
        """What the optimiser is for, by name."""
        frozen = self.config.lora is not None
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad or not frozen}

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        return checkpoints_of(self.config.run_dir, self.run_id)


def run_id(config: TrainConfig) -> str:
    """Hash of the settings that decide the result; the folder, the devices and the trackers do not."""
    return content_hash(config, without=_NOT_OF_THE_RESULT)


def prepare(
    config: TrainConfig,
    *,
    kept: Path | None = None,
    run: str | None = None,
    spread_over: Ranks | None = None,
) -> tuple[Prepared, Documents]:
    """Read the text, make the tokenizer, build the model, and check that they fit. Writes nothing.

    Args:
        config: the settings of train.yaml.
        kept: folder in which an earlier start of this run kept tokenizer and preconditioner, which win over the
            settings.
        run: identity of an earlier start; default: that of these settings.
        spread_over: see `coterie.training.single.setup.build_for`.

    Returns:
        What the run works with, and the documents that its training sequences were made from.

    Raises:
        ConfigError, DataError, ModelError: the settings do not fit each other, the text or the model.
    """
    data, privacy = config.data, config.privacy
    documents = read_documents(data.train, data, user_column=privacy.user_column if privacy else None)
    test = read_documents(data.test, data) if data.test else None
    tokenizer = (
        load_tokenizer_from(kept / TOKENIZER_FOLDER) if kept else get_tokenizer(data.tokenizer, config.model, data)
    )
    model = as_trained(build_for(config, tokenizer, spread_over), config, kept)
    prepared = Prepared(
        config,
        run or run_id(config),
        tokenizer,
        model,
        tokenize(documents, data, tokenizer),
        tokenize(test, data, tokenizer) if test else None,
        "" if config.lora is None else frozen_digest(model),
    )
    return prepared, documents


def checkpoints_of(run_dir: Path, run: str) -> CheckpointStore:
    """The checkpoints in a run folder, of the run whose settings have the hash ``run``."""
    return CheckpointStore(private_folder(run_dir) / "checkpoints", run)


def read_config(run_dir: Path) -> TrainConfig:
    """The settings of a run, with the rounds that it was made longer by.

    Raises:
        CheckpointError: no run is here.
    """
    return lengthened(*read_run(run_dir))


def read_run(run_dir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings with which a run was started, and its marker.

    Raises:
        CheckpointError: no run is here.
    """
    try:
        marker = json_object((run_dir / MARKER).read_bytes())
    except (OSError, ValueError):
        raise no_run(run_dir, " of `coterie train`") from None
    check_keys(run_dir / MARKER, "key", marker, _MARKED, CheckpointError)
    config = load_yaml(run_dir / "config.yaml", TrainConfig)
    return config.model_copy(update={"run_dir": run_dir}), marker


def lengthened(config: TrainConfig, marker: Mapping[str, Any]) -> TrainConfig:
    """A run's settings with the number of rounds that its marker names, if it was made longer."""
    rounds = marker.get(ROUNDS, config.train.rounds)
    return config.model_copy(update={"train": config.train.model_copy(update={"rounds": rounds})})


def make_longer(run_dir: Path, rounds: int) -> None:
    """Let a run go on to more rounds than it was started for. Its folder must be held.

    Raises:
        CheckpointError: no run is here.
        ConfigError: it has a budget, or is as long already.
    """
    config, marker = read_run(run_dir)
    planned = lengthened(config, marker).train.rounds
    if config.privacy is not None:
        raise ConfigError(
            f"{run_dir} is a private run of {planned} rounds; it cannot be made longer.",
            code="run-longer",
            why="its noise was chosen for that many; more rounds would spend more than the budget",
            fix="start a new run from its model; the ledger adds up what both spend",
        )
    if rounds <= planned:
        raise ConfigError(
            f"{run_dir} has {planned} rounds already.", code="run-longer", fix=f"name more than {planned}"
        )
    write_json(run_dir / MARKER, {**marker, ROUNDS: rounds})
