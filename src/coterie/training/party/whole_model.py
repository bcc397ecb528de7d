"""The model that a party ends with: in `experts` everybody has fetched all of it, so everybody may keep it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.config import PrivacyRules
from coterie.models.split.adapted import AdaptedModel
from coterie.models.split.card import write_card
from coterie.models.split.exporter import write_from_layers
from coterie.models.split.splitter import copy_beside_weights
from coterie.models.split.trainings import Training, write_trainings
from coterie.models.streaming.cache import LayerWeights
from coterie.models.zoo.build import structure_of
from coterie.storage import new_folder, writing
from coterie.training.data.tokenizer import load_tokenizer_from
from coterie.training.folders import ADAPTER, MODEL, private_folder, public_folder
from coterie.training.party.inputs import PartyInputs


def save_whole(inputs: PartyInputs, trunk_file: Path, layer: Callable[[int], LayerWeights]) -> Path:
    """Write this party's model as transformers loads it; where adapters were trained, those, as plain peft does.

    Args:
        inputs: of the party.
        trunk_file: of its last checkpoint.
        layer: the experts of a layer, stacked, as all hosts have them now.

    Returns:
        The folder, ``model`` or ``adapter``: in ``public`` where every party has a budget, else in ``private``.

    Raises:
        CheckpointError: the disk is full or broken.
        ModelError: what was written does not read back.

    Cost: a decoder layer in memory at a time. Experts come in the number format in which weights travel.
    """
    trained: Any = inputs.model
    model, lora = structure_of(trained.config, trained.dtype), inputs.federation.lora
    folder = ending_place(inputs) / (MODEL if lora is None else ADAPTER)
    with writing(folder), new_folder(folder) as aside:
        if lora is not None:
            AdaptedModel(model, lora.model_dump(mode="json"), trunk_file).save_adapter(aside)
        else:
            if inputs.federation.model.path is not None:
                copy_beside_weights(inputs.federation.model.path, aside)  # generation settings, as an export has them
            write_from_layers(aside, model, trunk_file, layer)
            tokenizer = private_folder(inputs.run_dir) / "tokenizer"
            if tokenizer.is_dir():
                load_tokenizer_from(tokenizer).save_pretrained(str(aside))
        write_trainings(aside, (*inputs.trainings, *_others(inputs)))
        write_card(aside)
    return folder


def _others(inputs: PartyInputs) -> list[Training]:
    """What the other parties' rounds were made under: at most what was agreed on."""
    federation = inputs.federation
    others = [f"{federation.name}-{name}" for name in federation.parties if name != inputs.party]
    rules = federation.privacy
    if not isinstance(rules, PrivacyRules) or federation.mixed_privacy:
        return [Training(name, "none") for name in others]
    return [Training(name, "budget", epsilon=rules.epsilon, delta=rules.delta) for name in others]


def ending_place(inputs: PartyInputs) -> Path:
    """Where the model goes: it may be given away if all that went into it is public or under a budget."""
    federation, privacy = inputs.federation, inputs.privacy
    private, public = private_folder(inputs.run_dir), public_folder(inputs.run_dir)
    if not isinstance(federation.privacy, PrivacyRules) or federation.mixed_privacy:
        return private
    if privacy is None or privacy.seed is not None:
        return private
    tainted = any(artefact.origin == "private" or artefact.overruled for artefact in privacy.artefacts)
    return private if tainted else public
