"""Where a saved model comes from: ``coterie.json`` beside its weights, carried through every copy that coterie makes.

It lists the trainings behind the weights, oldest first: the run, whether its text was public, and under which budget
it was trained if under any. A model without the file was not trained by coterie, or nobody knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from coterie import __version__
from coterie.errors import ModelError

TRAININGS_FILE = "coterie.json"
_PARENTS = 4


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
    privacy: Literal["budget", "none", "seeded", "public"]
    ledger: str | None = None
    epsilon: float | None = None
    delta: float | None = None

    @property
    def protected(self) -> bool:
        """Whether what it made may be called public or differentially private."""
        return self.privacy in ("budget", "public")


def write_trainings(folder: Path, trainings: Iterable[Training]) -> None:
    """Put the file beside a model's weights; nothing where there was no training."""
    listed = [asdict(training) for training in dict.fromkeys(trainings)]
    if listed:
        content = {"format": 1, "coterie": __version__, "trainings": listed}
        (folder / TRAININGS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_trainings(folder: Path | str | None) -> tuple[Training, ...]:
    """The trainings behind the model in a folder; none where nothing says.

    Raises:
        ModelError: the file is there and cannot be read.
    """
    path = Path(folder or ".") / TRAININGS_FILE
    if folder is None or not path.is_file():
        return ()
    try:
        listed: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["trainings"]
        return tuple(Training(**training) for training in listed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read.",
            code="model-trainings",
            why="it says whether the model was trained on private text without privacy",
            fix="put it back as it was written, or use the model as it was saved",
        ) from error


def trainings_of(model: object) -> tuple[Training, ...]:
    """The trainings behind a model of transformers, from the folder that it was loaded from."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    return read_trainings(folder) if folder and Path(folder).is_dir() else ()


def trainings_near(file: Path) -> tuple[Training, ...]:
    """The trainings behind a file of weights: from its folder, or the nearest one above it that says."""
    for folder in list(file.resolve().parents)[:_PARENTS]:
        found = read_trainings(folder)
        if found:
            return found
    return ()


def joined(*histories: Sequence[Training]) -> tuple[Training, ...]:
    """Several histories as one, each training once."""
    return tuple(dict.fromkeys(training for history in histories for training in history))
