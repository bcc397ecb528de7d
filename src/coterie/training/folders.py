"""What of a run is for people and what is for its owner: two folders that nobody can mix up.

``RUN_DIR/public/`` holds what a privacy budget allows to be given away: the model, its card, the statement. It is
there only where a budget made them. ``RUN_DIR/private/`` holds everything else that text went into: losses, lot
sizes, TensorBoard's files, checkpoints, models of private runs that no budget covers. Sending ``public/`` publishes
nothing else. A run without privacy has no ``public/``; its model lies in ``RUN_DIR/model``, closed to others as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coterie.federation.files import writing

PUBLIC, PRIVATE = "public", "private"
_CARD = """---
library_name: transformers
tags: [coterie, differential-privacy, mixture-of-experts]
---

Trained with [coterie](https://pypi.org/project/coterie/). What is promised about the text it was trained on, and
what is
not:

```
{statement}
```
"""
_FOLDER_MODE, _FILE_MODE = 0o700, 0o600


def public_folder(run_dir: Path) -> Path:
    """The run's folder for what may be given away."""
    return run_dir / PUBLIC


def private_folder(run_dir: Path) -> Path:
    """The run's folder for its owner's eyes."""
    return run_dir / PRIVATE


@contextmanager
def kept_private(run_dir: Path) -> Iterator[Path]:
    """Inside, files and folders that this process makes are readable by their owner alone, whatever the umask was.

    Yields:
        The private folder, which exists; ``run_dir`` and all that lies in it already is closed to others too.

    Raises:
        CheckpointError: the folder cannot be made or closed.
    """
    before = os.umask(0o077)
    try:
        private = private_folder(run_dir)
        with writing(private):
            private.mkdir(parents=True, exist_ok=True)
            close_to_others(run_dir)
        yield private
    finally:
        os.umask(before)


def write_statement(folder: Path, statement: str) -> None:
    """The privacy statement, and a model card that says it: what may be published with a model.

    Raises:
        CheckpointError: the disk is full or broken.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)
        (folder / "statement.txt").write_text(statement + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_CARD.format(statement=statement), encoding="utf-8")


def close_to_others(folder: Path) -> None:
    """Set the modes of ``folder`` and of everything in it to the owner's alone; links are not followed."""
    os.chmod(folder, _FOLDER_MODE)
    for place, folders, files in os.walk(folder):
        for name in folders:
            _close(Path(place, name), _FOLDER_MODE)
        for name in files:
            _close(Path(place, name), _FILE_MODE)


def _close(path: Path, mode: int) -> None:
    if not path.is_symlink():
        os.chmod(path, mode)
