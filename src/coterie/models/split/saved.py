"""Save a whole model for transformers, and read it back before anybody is told that it is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from coterie.errors import ModelError
from coterie.models.split.card import write_card
from coterie.models.split.read_checkpoint import stream_checkpoint
from coterie.models.split.trainings import Training, write_trainings
from coterie.models.spread.gathered import write_gathered
from coterie.models.spread.spread import spread_of
from coterie.models.zoo.build import check_keys
from coterie.storage import new_folder


def save_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    origin: Sequence[Training] = (),
) -> None:
    """Write ``folder``, which `from_pretrained` loads as the same model; it appears whole or not at all.

    Beside the weights lie a card and a privacy statement for programs; see `card.write_card`.

    Args:
        model: on any device.
        folder: made, or replaced whole.
        tokenizer: written beside the weights.
        origin: the trainings behind the model, for whoever starts from it.

    Where experts are spread over ranks, rank 0 calls this while the others
    `coterie.models.spread.gathered.give_experts`; a layer's experts are gathered at a time.

    Raises:
        ModelError: what was written does not read back as this model.
        OSError: the disk is full or broken.
    """
    spread = spread_of(model)
    with new_folder(folder) as aside:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(aside))
        if spread is None:
            model.save_pretrained(str(aside))
        else:
            write_gathered(aside, model, spread)
        write_trainings(aside, origin)  # into the config that now lies there, too
        write_card(aside)
        if spread is None:
            check_saved(model, aside)


@torch.no_grad()
def check_saved(model: PreTrainedModel, folder: Path) -> None:
    """Read a saved model again as its class would, and compare every tensor with the one in memory.

    Cost: one pass over the files, a decoder layer in memory at a time.

    Raises:
        ModelError: a tensor is missing, too much, of another shape or of other values.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise _differs(folder, "its config says that it is quantised, and its weights are not")
    with torch.device("meta"):
        again = type(model)._from_config(config, dtype=model.dtype)
    own = model.state_dict()
    tied = model.all_tied_weights_keys
    for group in stream_checkpoint(folder, again):
        for name, tensor in group.items():
            mine = own.get(name, own.get(tied.get(name, name)))
            if mine is None or mine.shape != tensor.shape:
                check_keys(str(folder), set(), {name} if mine is None else set(), set() if mine is None else {name})
            elif not torch.equal(mine.detach().cpu().to(tensor.dtype).nan_to_num(), tensor.nan_to_num()):
                raise _differs(folder, f"`{name}` has other values than in memory")


def _differs(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"The model that was written to {folder} does not read back: {what}.",
        code="model-saved-differs",
        why="whoever loads it would get other weights than were trained, some of them random",
        fix="report this with the model's family and the version of transformers; the run's checkpoints are whole",
    )
