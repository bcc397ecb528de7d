"""What a checkpoint of a private session holds; see `coterie.checkpoints` for the folder.

``weights`` and ``optimizer`` are the model's and the optimizer's tensors by parameter, ``session`` further public
ones (released loads, clip norms). What is not in it: lots, random states, noise, keys, losses and norms. Who reads a
checkpoint learns what the noised results already told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from coterie.checkpoints import (
    MANIFEST,
    Checkpoint,
    Content,
    load_weights,
    model_tensors,
    read_checkpoint,
    write_checkpoint,
    write_part,
)
from coterie.dp.ownership import Ownership
from coterie.dp.saved_plan import check_saved
from coterie.errors import CheckpointError
from coterie.models.spread.holdings import Holdings
from coterie.storage import check_keys, check_known, json_object, restore

SESSION = "session"
_EARLIER = "session.json"
_FACTS = (
    "settings", "plan", "options", "run", "round", "parent", "dataset", "ledger_root", "head", "user_cap",
    "not_covered", "private",
)  # fmt: skip


def pack(
    model: nn.Module, optimizer: torch.optim.Optimizer, owners: Ownership, extra: dict[str, Tensor],
    facts: dict[str, Any],
) -> tuple[Content, dict[str, Any]]:  # fmt: skip
    """A checkpoint's tensors and JSON values.

    Args:
        model: all parameters and buffers are saved, shared ones once.
        optimizer: state tensors and settings; of parameters that other ranks own these write them, see `save_part`.
        owners: of parameters.
        extra: further tensors (public, such as released loads).
        facts: JSON values.
    """
    tensors, structure = _flatten(optimizer, model, owners)
    weights = Holdings(model).stored(model_tensors(model))
    return {"weights": weights, "optimizer": tensors, SESSION: extra}, {SESSION: facts, "optimizer": structure}


def save(folder: Path, content: Content, state: dict[str, Any], parts: Sequence[str] = ()) -> None:
    """Write a checkpoint in the place of an older one; ``parts`` as for `coterie.checkpoints.write_checkpoint`."""
    facts = state[SESSION]
    write_checkpoint(folder, facts["run"], facts["round"], content, state, parts=parts)


def save_part(
    folder: Path, rank: int, model: nn.Module, optimizer: torch.optim.Optimizer, owners: Ownership, run: str,
    round_no: int,
) -> str:  # fmt: skip
    """Write what is this rank's of a checkpoint that rank 0 writes to ``folder`` next; returns its digest."""
    holdings = Holdings(model)
    weights = {} if holdings.replicas.rank else holdings.own(model_tensors(model))
    tensors, structure = _flatten(optimizer, model, owners)
    content, state = {"weights": weights, "optimizer": tensors}, {"optimizer": structure}
    return write_part(folder, rank, run, round_no, content, state)


@dataclass(frozen=True)
class SavedSession:
    """A session's checkpoint, of this format or of the one before it.

    Attributes:
        folder: where it is.
        facts: its JSON values.
    """

    folder: Path
    facts: dict[str, Any]
    _optimizer: dict[str, Any] | None
    _checkpoint: Checkpoint | None

    def extra(self) -> dict[str, Tensor]:
        """Its further tensors."""
        if self._checkpoint is None:
            return load_file(self.folder / "state.safetensors")
        return self._checkpoint.load(SESSION)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, owners: Ownership) -> None:
        """Put model and optimizer into the saved state, the latter as far as this rank steps it.

        Raises:
            CheckpointError: the checkpoint is damaged, or is of another model or optimizer.
        """
        if self._optimizer is None:
            raise CheckpointError(
                f"{self.folder} holds no model and no optimizer.",
                code="dp-checkpoint-state-only",
                fix="restore those that were saved beside it, and resume with state_only=True",
            )
        structure = dict(self._optimizer)
        if self._checkpoint is None:
            _load_earlier(self.folder, model)
            tensors = _renamed(load_file(self.folder / "optimizer.safetensors"), _names(optimizer, model))
        else:
            load_weights(self._checkpoint, model)
            pieces = self._checkpoint.pieces("optimizer")
            tensors = Holdings(model).joined((name, own) for name, own in pieces if owners.is_own(_parameter(name)))
            for part in self._checkpoint.others():
                structure["plain"] = {**part.state.get("optimizer", {"plain": {}})["plain"], **structure["plain"]}
        _unflatten(optimizer, model, owners, tensors, structure, self.folder)


def read(folder: Path) -> SavedSession:
    """The session's checkpoint in a folder.

    Raises:
        CheckpointError: there is none, or it is damaged or of another format.
    """
    restore(folder)
    if (folder / _EARLIER).is_file():
        values = json_object((folder / _EARLIER).read_bytes())
        check_known(folder, "format", values.get("format", 1), {1}, CheckpointError)
        return SavedSession(folder, values["facts"], values.get("optimizer"), None)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} holds no saved private session.",
            code="dp-no-checkpoint",
            fix="name the folder that session.save(path) was given",
        )
    found = read_checkpoint(folder)
    facts = found.state[SESSION]
    check_saved(folder, facts)
    check_keys(folder, "key of the session", facts, _FACTS, CheckpointError)
    return SavedSession(folder, facts, found.state.get("optimizer"), found)


def read_facts(folder: Path) -> dict[str, Any]:
    """The session's JSON values in a checkpoint.

    Raises:
        CheckpointError: as `read`.
    """
    return read(folder).facts


# -- optimizers ------------------------------------------------------------------------------------------------------


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The parameters of an optimizer in the order of its ``state_dict``; strangers by position."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [names.get(id(parameter), f"#{index}") for index, parameter in enumerate(stepped)]


def _flatten(
    optimizer: torch.optim.Optimizer, model: nn.Module, owners: Ownership
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is this rank's: tensors ``{parameter}/{part}``, as in a plain run's checkpoint, and what JSON can hold."""
    state, names, holdings = optimizer.state_dict(), _names(optimizer, model), Holdings(model)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        if not owners.is_own(names[index]):
            continue
        for part, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}/{part}"] = value
            else:
                plain.setdefault(str(index), {})[part] = value
    groups = json.loads(json.dumps(state["param_groups"], default=_number))
    stored = holdings.own(tensors)  # a number beside them, the same at all that have a part, comes from the first
    stored |= {} if holdings.group.rank else holdings.stored(tensors)
    stored |= {name: own for name, own in tensors.items() if not holdings.is_part(_parameter(name))}
    return stored, {"plain": plain, "groups": groups}


def _parameter(name: str) -> str:
    """Whose state is stored under a name."""
    return name.partition("/")[0]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else str(value)


def _unflatten(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    owners: Ownership,
    tensors: dict[str, Tensor],
    structure: dict[str, Any],
    folder: Path,
) -> None:
    names = _names(optimizer, model)
    index_of = {name: index for index, name in enumerate(names)}
    plain = {int(index): dict(values) for index, values in structure["plain"].items()}
    state: dict[int, dict[str, Any]] = {i: own for i, own in plain.items() if owners.is_own(names[i])}
    current = optimizer.state_dict()["param_groups"]
    groups = structure["groups"]
    saved_names = {name.rpartition("/")[0] for name in tensors}
    if [len(g["params"]) for g in current] != [len(g["params"]) for g in groups] or saved_names - index_of.keys():
        raise CheckpointError(
            f"{folder} was saved with an optimizer of other parameters.",
            code="dp-checkpoint-optimizer",
            fix="build the optimizer as it was when the checkpoint was saved",
        )
    for name, tensor in tensors.items():
        parameter, _, part = name.rpartition("/")
        state.setdefault(index_of[parameter], {})[part] = tensor
    merged = [
        {key: tuple(saved[key]) if isinstance(own[key], tuple) else saved.get(key, own[key]) for key in own}
        for own, saved in zip(current, groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


# -- the format before -----------------------------------------------------------------------------------------------


def _load_earlier(folder: Path, model: nn.Module) -> None:
    try:
        load_model(model, str(folder / "model.safetensors"))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{folder} does not fit this model: {str(error).splitlines()[0]}",
            code="dp-checkpoint-model",
            fix="build the model as it was when the checkpoint was saved",
        ) from error


def _renamed(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """``state.{index}.{part}`` as ``{parameter}/{part}``."""
    parts = {name: name.split(".", 2)[1:] for name in tensors}
    return {f"{names[int(index)]}/{part}": tensors[name] for name, (index, part) in parts.items()}
