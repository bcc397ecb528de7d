"""What of a run is for people and what is for its owner: two folders that nobody can mix up.

``RUN_DIR/public/`` holds what a privacy budget allows to be given away: the model, its card, the statement. It is
there only where a budget made them. ``RUN_DIR/private/`` holds everything else that text went into: losses, lot
sizes, TensorBoard's files, checkpoints, models of private runs that no budget covers. Sending ``public/`` publishes
nothing else. A run without privacy has no ``public/``; its model lies in ``RUN_DIR/model``, closed to others as well.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from coterie.errors import CheckpointError, ConfigError
from coterie.storage import write_whole, writing

PUBLIC, PRIVATE = "public", "private"
MODEL, ADAPTER = "model", "adapter"
TOKENIZER_FOLDER = "tokenizer"
"""In the private folder of a run."""
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
_OWNERS = 0o700


def ledger_run(run: str, party: str) -> str:
    """What a party's run of a federation is called in the party's ledger, the same after a restart."""
    return f"{run}-{party}"


def public_folder(run_dir: Path) -> Path:
    """The run's folder for what may be given away."""
    return run_dir / PUBLIC


def private_folder(run_dir: Path) -> Path:
    """The run's folder for its owner's eyes."""
    return run_dir / PRIVATE


def result_folder(run_dir: Path, names: Sequence[str] = (MODEL, ADAPTER)) -> Path | None:
    """The model or adapter, of these names, that a run or a party ended with; None where there is none (yet)."""
    places = (
        folder / name for folder in (run_dir, public_folder(run_dir), private_folder(run_dir)) for name in names
    )
    return next((place for place in places if place.is_dir()), None)


def no_run(run_dir: Path, of: str = "") -> CheckpointError:
    """The error of a command that was given a folder with no run in it, or one that is not there.

    Args:
        run_dir: that folder.
        of: what would have made the run, `` of `coterie up` ``.
    """
    there = os.path.lexists(run_dir)
    return CheckpointError(
        f"{run_dir} holds no run{of}." if there else f"There is no folder {run_dir}.",
        code="run-dir-none",
        fix="give the run_dir of `coterie train`, or of a party of `coterie up`, which contains run.json; `generate` "
        "and `eval --tasks` also take a folder that `coterie export` wrote",
    )


@contextmanager
def kept_private(run_dir: Path) -> Iterator[Path]:
    """Inside, files and folders that this process makes are readable by their owner alone, whatever the umask was.

    Yields:
        The private folder, which exists; ``run_dir`` and all that lies in it already is closed to others too.

    Raises:
        ConfigError: ``run_dir`` is the home folder or the root of all folders.
        CheckpointError: the folder cannot be made or closed.
    """
    _check_own(run_dir)
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
        write_whole(folder / "statement.txt", f"{statement}\n".encode())
        write_whole(folder / "README.md", _CARD.format(statement=statement).encode())


def close_to_others(folder: Path) -> None:
    """Take what others may do with ``folder`` and everything in it; links are not followed.

    What the owner may do stays as it was: a program that lies there can still be run. What belongs to another user (a
    volume that is mounted there) keeps its mode, since only that user can change it.
    """
    _close(folder.resolve())
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            _close(Path(place, name))


def _close(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid():
        os.chmod(path, found.st_mode & _OWNERS)


def _check_own(run_dir: Path) -> None:
    """A run folder is closed to others with all that lies in it, which these two must not be."""
    place = run_dir.resolve()
    if place == Path(place.anchor) or str(place) == os.path.realpath(os.path.expanduser("~")):
        raise ConfigError(
            f"`run_dir` is {place}, which is no folder of a run's own.",
            code="run-dir-shared",
            why="a run folder is closed to other users, with everything that lies in it",
            fix="name a folder inside it",
        )
