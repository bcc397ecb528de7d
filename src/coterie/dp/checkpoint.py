"""Saved state of a private session: safetensors and JSON, nothing secret.

What is not in it: lots, random states, noise, keys, losses and norms. Who reads a checkpoint learns what the noised
results already told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from coterie.errors import CheckpointError
from coterie.storage import check_known, new_folder, restore, write_json

_MODEL, _OPTIMIZER, _STATE, _SESSION = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.safetensors",
    "session.json",
)
_FORMAT = 1


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write a checkpoint aside, sync it, and put it in the place of an older one.

    Args:
        folder: becomes the checkpoint.
        model: all parameters and buffers are saved, shared ones once.
        optimizer: state tensors and settings.
        extra: further tensors (public, such as released loads).
        facts: JSON values.
    """
    tensors, structure = _flatten(optimizer)

    def write(aside: Path) -> None:
        save_model(model, str(aside / _MODEL))
        save_file(tensors, aside / _OPTIMIZER)

    _replace(folder, extra, {"facts": facts, "optimizer": structure}, write)


def save_state(folder: Path, extra: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """`save` without model and optimizer."""
    _replace(folder, extra, {"facts": facts}, lambda aside: None)


def _replace(folder: Path, extra: dict[str, Tensor], content: dict[str, Any], write: Callable[[Path], None]) -> None:
    with new_folder(folder) as aside:
        write(aside)
        save_file({name: tensor.contiguous() for name, tensor in extra.items()}, aside / _STATE)
        write_json(aside / _SESSION, {"format": _FORMAT, **content})


def read_facts(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is of another format.
    """
    facts: dict[str, Any] = _read(folder)["facts"]
    return facts


def load_extra(folder: Path) -> dict[str, Tensor]:
    """The extra tensors of a checkpoint."""
    return load_file(folder / _STATE)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put model and optimizer into the saved state.

    Raises:
        CheckpointError: the checkpoint is missing, or is of another model or optimizer.
    """
    structure = _read(folder)["optimizer"]
    try:
        load_model(model, str(folder / _MODEL))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{folder} does not fit this model: {str(error).splitlines()[0]}",
            code="dp-checkpoint-model",
            fix="build the model as it was when the checkpoint was saved",
        ) from error
    _unflatten(optimizer, load_file(folder / _OPTIMIZER), structure, folder)


def _read(folder: Path) -> dict[str, Any]:
    restore(folder)
    if (folder / _SESSION).exists():
        content: dict[str, Any] = json.loads((folder / _SESSION).read_text("utf-8"))
        # the first versions did not write it
        check_known(folder, "format", content.get("format", _FORMAT), {_FORMAT}, CheckpointError)
        return content
    raise CheckpointError(
        f"{folder} holds no saved private session.",
        code="dp-no-checkpoint",
        fix="name the folder that session.save(path) was given",
    )


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"state.{index}.{key}"] = value.contiguous()
            else:
                plain.setdefault(str(index), {})[key] = value
    groups = json.loads(json.dumps(state["param_groups"], default=_number))
    return tensors, {"plain": plain, "groups": groups}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else str(value)


def _unflatten(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], structure: dict[str, Any], folder: Path
) -> None:
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in structure["plain"].items()}
    for name, tensor in tensors.items():
        if name.startswith("state."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    current = optimizer.state_dict()["param_groups"]
    groups = structure["groups"]
    if [len(g["params"]) for g in current] != [len(g["params"]) for g in groups]:
        raise CheckpointError(
            f"{folder} was saved with an optimizer of other parameters.",
            code="dp-checkpoint-optimizer",
            fix="build the optimizer as it was when the checkpoint was saved",
        )
    merged = [
        {key: tuple(saved[key]) if isinstance(own[key], tuple) else saved.get(key, own[key]) for key in own}
        for own, saved in zip(current, groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})
