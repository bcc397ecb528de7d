"""Where a saved model comes from: the trainings behind its weights, oldest first.

Each names the run, whether its text was public, and under which budget it was trained if under any. The list lies in
``coterie.json`` beside the weights and in the model's own ``config.json``, which transformers carries from one
`save_pretrained` to the next; files of trunks and shards have it in their headers (`coterie.models.split.origins`). A
model without one was not trained by coterie, or nobody knows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from coterie.errors import ModelError
from coterie.revision import software
from coterie.storage import check_keys, check_known, json_object, write_json

TRAININGS_FILE = "coterie.json"
_FORMAT = 1
_CONFIG_FILE, _CONFIG_KEY = "config.json", "coterie_trainings"

Protection = Literal["budget", "none", "seeded", "public"]


@dataclass(frozen=True)
class Training:
    """One training behind a model.

    Attributes:
        run: its identifier.
        privacy: ``budget``; ``none``; ``seeded`` (a budget whose noise was not secret); ``public`` (no text that
            needs
            protection).
        ledger: where a budget was counted, by the name that statements use.
        epsilon, delta: planned for the run.
    """

    run: str
    privacy: Protection
    ledger: str | None = None
    epsilon: float | None = None
    delta: float | None = None

    @property
    def protected(self) -> bool:
        """Whether what it made may be called public or differentially private."""
        return self.privacy in ("budget", "public")


def write_trainings(folder: Path, trainings: Iterable[Training]) -> None:
    """Put the list beside a model's weights and into its config; nothing where there was no training."""
    listed = [asdict(training) for training in dict.fromkeys(trainings)]
    if not listed:
        return
    content = {"format": _FORMAT, **software(), "trainings": listed}
    write_json(folder / TRAININGS_FILE, content)
    if (folder / _CONFIG_FILE).is_file():
        config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
        write_json(folder / _CONFIG_FILE, dict(sorted({**config, _CONFIG_KEY: listed}.items())))


def read_trainings(folder: Path | str | None) -> tuple[Training, ...]:
    """The trainings behind the model in a folder; none where nothing says.

    Raises:
        ModelError: a file that says it is there and cannot be read, or says something this version does not know.
    """
    if folder is None:
        return ()
    beside, config = Path(folder, TRAININGS_FILE), Path(folder, _CONFIG_FILE)
    return joined(_listed(beside, "trainings", needed=True), _listed(config, _CONFIG_KEY, needed=False))


def _listed(path: Path, key: str, *, needed: bool) -> tuple[Training, ...]:
    if not os.path.lexists(path):  # a link to nowhere, or a folder, is there and cannot be read
        return ()
    try:
        content = json_object(path.read_bytes())
        if needed:
            check_known(path, "format", content["format"], {_FORMAT}, ModelError)
        listed = content[key] if needed else content.get(key, ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(str(path)) from error
    return trainings_from(listed, str(path))


def trainings_of(model: object) -> tuple[Training, ...]:
    """The trainings behind a model of transformers: what its config says, and the folder that it was loaded from.

    Raises:
        ModelError: what says it cannot be read.
    """
    config = getattr(model, "config", None)
    folder = getattr(config, "_name_or_path", None)
    return joined(trainings_in(config), read_trainings(folder) if folder and Path(folder).is_dir() else ())


def trainings_in(config: object) -> tuple[Training, ...]:
    """The trainings that a config of transformers brings along.

    Raises:
        ModelError: they cannot be read.
    """
    return trainings_from(getattr(config, _CONFIG_KEY, ()), f"`{_CONFIG_KEY}` in the model's config")


def trainings_from(listed: Iterable[Mapping[str, Any]], where: str) -> tuple[Training, ...]:
    """From what ``asdict`` made of each.

    Args:
        listed: mappings that a file or header holds.
        where: names what holds them, for error texts.

    Raises:
        ModelError: it is something else, or a word is among them that this version does not know.
    """
    known = [field.name for field in fields(Training)]
    try:
        if not isinstance(listed, list | tuple):
            raise TypeError("no list")
        for training in listed:
            check_keys(where, "field of a training", training.keys(), known, ModelError)
            check_known(where, "privacy", training["privacy"], get_args(Protection), ModelError)
        trainings = tuple(Training(**training) for training in listed)
        hash(trainings)  # every value is a plain one
        return trainings
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(where) from error


def _unreadable(what: str) -> ModelError:
    return ModelError(
        f"{what} cannot be read.",
        code="model-trainings",
        why="it says whether the model was trained on private text without privacy",
        fix="put it back as it was written, or use the model as it was saved",
    )


def joined(*histories: Sequence[Training]) -> tuple[Training, ...]:
    """Several histories as one, each training once."""
    return tuple(dict.fromkeys(training for history in histories for training in history))
