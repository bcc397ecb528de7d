"""What a run of `coterie train` ends with: a model that transformers loads, or an adapter that peft does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from coterie.config import FederationConfig, load_yaml
from coterie.errors import CheckpointError, ModelError, as_argument
from coterie.models.preconditioner import detach
from coterie.models.split.adapted import AdaptedModel
from coterie.models.split.card import write_card
from coterie.models.split.exporter import write_from_checkpoint, write_from_memory
from coterie.models.split.saved import save_model
from coterie.models.split.splitter import check_vacant
from coterie.models.split.trainings import Training, read_trainings, write_trainings
from coterie.models.zoo.build import structure_of
from coterie.storage import new_folder, writing
from coterie.training.folders import ADAPTER, MODEL, result_folder
from coterie.training.party.process import FEDERATION_FILE, PARTY_FILE
from coterie.training.single.prepared import Prepared, checkpoints_of, lengthened, read_run
from coterie.training.single.trained import load_trained, model_of_party


def save_result(prepared: Prepared, place: Path, trainings: Sequence[Training]) -> None:
    """Write ``place / "model"``, or with `lora` ``place / "adapter"``; it appears whole or not at all.

    A model that was trained in other coordinates is put back into its own, and stays so.

    Args:
        prepared: of a run whose last checkpoint is written.
        place: folder in the run folder.
        trainings: what is behind the weights.

    Raises:
        CheckpointError: the disk is full or broken.
        ModelError: what was written does not read back.
    """
    lora, model = prepared.config.lora, prepared.model
    if lora is None:
        assert isinstance(model, PreTrainedModel)
        detach(model)
        with writing(place / MODEL):
            save_model(model, place / MODEL, prepared.tokenizer, trainings)
        return
    newest = prepared.store.newest()
    assert newest is not None
    adapted: Any = model
    empty = structure_of(adapted.config, adapted.dtype)
    with writing(place / ADAPTER), new_folder(place / ADAPTER) as aside:
        AdaptedModel(empty, lora.model_dump(mode="json"), newest.path / "weights.safetensors").save_adapter(aside)
        write_trainings(aside, trainings)
        write_card(aside)


def export_run(run_dir: Path, out: Path, *, adapter: bool) -> None:
    """Write a finished run's model, adapters merged if it has some, or the adapter alone, into a new folder.

    Args:
        run_dir: of a run, or of a party of a federation; its adapters are merged by `exporter.export`, which has the
            weights of all hosts.
        out: does not exist yet, or is empty.
        adapter: the adapter alone.

    Raises:
        CheckpointError: no run is here, or it is not finished.
        ModelError: the adapter is asked for and the run trained all weights; ``out`` is taken; or what was written
            does not read back.
    """
    check_vacant(out)
    of_party = (run_dir / PARTY_FILE).is_file()
    lora = load_yaml(run_dir / FEDERATION_FILE, FederationConfig).lora if of_party else read_run(run_dir)[0].lora
    if lora is None and adapter:
        raise ModelError(
            f"{run_dir} trained all weights, so it has no adapter.",
            code="model-no-adapters",
            fix="leave out --adapter to export the whole model",
        )
    found = model_of_party(run_dir) if of_party and not adapter else result_folder(run_dir)
    if found is None:
        raise CheckpointError(
            f"{run_dir} has no {MODEL if lora is None else ADAPTER} yet.",
            code="run-no-model",
            why="it is written after the last round",
            fix=f"`coterie resume {as_argument(run_dir)}` goes on with the run",
        )
    if not of_party:
        _check_not_longer(run_dir, found)
    with new_folder(out) as aside:
        if adapter:
            shutil.copytree(found, aside, dirs_exist_ok=True)
            return
        if lora is None:
            write_from_checkpoint(aside, found)
        else:
            trained = load_trained(run_dir)
            trained.tokenizer.save_pretrained(str(aside))
            write_from_memory(aside, trained.model)
        write_trainings(aside, read_trainings(found))
        write_card(aside)


def _check_not_longer(run_dir: Path, found: Path) -> None:
    """A run that was made longer keeps what the shorter one ended with until it has finished, too."""
    config, marker = read_run(run_dir)
    planned, saved = lengthened(config, marker).train.rounds, checkpoints_of(run_dir, str(marker["run"])).rounds()
    if config.privacy is None and saved and saved[-1] < planned:  # with a budget none is made longer
        raise CheckpointError(
            f"{run_dir} was made {planned} rounds long and is at {saved[-1]}.",
            code="run-no-model",
            why=f"its {found.name} is that of the shorter run; the next is written after the last round",
            fix=f"`coterie resume {as_argument(run_dir)}` goes on with the run; {found} is the earlier one",
        )
