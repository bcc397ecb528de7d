"""Where a run's weights and vocabulary came from, and what its records are, as its settings say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coterie.config import DataSpec, ModelSpec, PreconditionerSpec
from coterie.dp.accounting.provenance import Artefact
from coterie.dp.accounting.texts import Originals
from coterie.models.split.origins import origin_of
from coterie.models.split.trainings import Training, joined, read_trainings, trainings_in
from coterie.models.zoo.build import load_config
from coterie.training.data.documents import Documents
from coterie.training.data.packing import Sequences
from coterie.training.data.public_text import check_not_private
from coterie.training.data.tokenizer import read_vocabulary_text
from coterie.training.public_figures import public_start


def artefacts(
    model: ModelSpec, data: DataSpec, *near: Path, preconditioner: PreconditionerSpec | None = None
) -> tuple[Artefact, ...]:
    """Starting artefacts of a private run.

    Random weights, hub models and vocabularies made from public files are public; the rest declares itself, and what
    does not is listed as not covered. So are private ones, if the settings say whose records they were made from.
    What a saved model says of itself wins over what the settings say.

    Args:
        model: the start's settings.
        data: the text's and the tokenizer's settings.
        near: files of weights that the run starts from, beside ``model``.
        preconditioner: of the trained weights, where there is one.

    Raises:
        ProvenanceError: something has a provenance that is no known word, or the saved model says otherwise.
    """
    weights = model.provenance or ("public" if model.path is None else None)
    tokenizer = data.tokenizer
    own = tokenizer.provenance if tokenizer.path is not None else "public" if tokenizer.train is not None else weights
    whose = tokenizer.not_covered if tokenizer.path is not None else model.not_covered
    return (
        replace(Artefact.parse("weights", weights, model.not_covered), overruled=model.overrule_origin).as_saved(
            starting_trainings(model, *near)
        ),
        Artefact.parse("tokenizer", own, whose),
        *(
            ()
            if preconditioner is None
            else (Artefact.parse("preconditioner", preconditioner.provenance, preconditioner.not_covered),)
        ),
    )


def starting_trainings(model: ModelSpec, *near: Path) -> tuple[Training, ...]:
    """The trainings behind a run's starting weights, as far as these say."""
    spec = read_trainings(model.path) if model.hub is None else trainings_in(load_config(model))
    return joined(spec, *(origin_of(file).trainings for file in near))


def trainings_before(
    model: ModelSpec, data: DataSpec, run: str, *near: Path, preconditioner: PreconditionerSpec | None = None
) -> tuple[Training, ...]:
    """What is behind a run's starting weights and tokenizer: as they say, and as the settings do.

    Args:
        model: the start's settings.
        data: the tokenizer's.
        run: names a start that the settings alone call private.
        near: files of a split that hold the weights.
        preconditioner: of the trained weights, where there is one.
    """
    known = starting_trainings(model, *near)
    if public_start(model, data, preconditioner) or not all(training.protected for training in known):
        return known
    return (*known, Training(f"start-of-{run}", "none"))


def record_facts(data: DataSpec) -> dict[str, Any]:
    """What one record is, in public words and numbers, for ledger and statement.

    The same alone and in a federation, so that runs on the same text add up.
    """
    return {"packing": data.packing, "sequence_length": data.sequence_length}


def originals(documents: Documents, records: Sequences, data: DataSpec) -> Originals:
    """The documents behind the records, by which the ledger knows their text again.

    Raises:
        DataError: the vocabulary is made from them, and would be published with the model.
    """
    made = data.tokenizer.train
    files = () if made is None else tuple(file for file in made.files if file.exists())  # a resumed run has its own
    if files:
        check_not_private(
            read_vocabulary_text(files, data), files, documents, data.train, "data.tokenizer.train.files",
            "make the vocabulary from public text, or apart from the run, and name it with `path`, `provenance: "
            "private` and `not_covered`",
        )  # fmt: skip
    pieces = int(torch.bincount(records.document_S).max())
    return Originals(documents.texts, documents.users, pieces)
