"""What a finished run leaves on disk of the text itself, and removing it where text was withdrawn."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from coterie.config import PartyConfig, PartyPrivacy, TrainConfig, load_yaml
from coterie.dp.ledger import default_root
from coterie.dp.spool import Spool
from coterie.errors import CheckpointError
from coterie.federation.run_folder import is_running
from coterie.training.folders import private_folder

CACHES, TRANSCRIPTS = ("cache",), ("transcript*",)


@dataclass(frozen=True)
class Purged:
    """What `purge` removed, and what it cannot.

    Attributes:
        removed: folders and files.
        remains: in words, what no removing takes back.
    """

    removed: tuple[Path, ...]
    remains: tuple[str, ...]


def purge(run_dir: Path, *, give_up: bool = False) -> Purged:
    """Remove caches, spool and recorded transcripts of a run. The ledger keeps every entry.

    Args:
        run_dir: of `coterie train` or `coterie up`.
        give_up: also where the run is not finished; it cannot go on then.

    Raises:
        CheckpointError: no run is here, it is running, or it is not finished.
        LedgerError: another process uses the run's spool.
    """
    marker = _marker(run_dir)
    if is_running(run_dir):
        raise CheckpointError(
            f"{run_dir} is running.",
            code="purge-running",
            why="it would lose what it needs to go on",
            fix="wait until it ends, or stop it first",
        )
    private = private_folder(run_dir)
    if not give_up and not (private / "result.json").is_file():
        raise CheckpointError(
            f"{run_dir} is not finished.",
            code="purge-unfinished",
            why="its spool holds what was released already; without it the rounds count again",
            fix=f"`coterie resume {run_dir}`, or add --give-up if it is not to go on",
        )
    removed: list[Path] = []
    for folder in _spools(run_dir, marker):
        spool = Spool(folder)
        try:
            shutil.rmtree(folder)
        finally:
            spool.close()
        removed.append(folder)
    for pattern in (*CACHES, *TRANSCRIPTS):
        for path in sorted((*private.glob(pattern), *run_dir.glob(pattern))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path)
    return Purged(tuple(removed), tuple(_remains(run_dir, marker)))


def _marker(run_dir: Path) -> dict[str, str]:
    try:
        marker: dict[str, str] = json.loads((run_dir / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{run_dir} holds no run.",
            code="run-dir-none",
            fix="give the run_dir of `coterie train` or `coterie up`; it contains run.json",
        ) from None
    return marker


def _spools(run_dir: Path, marker: dict[str, str]) -> list[Path]:
    """The run's spools: one, in the ledger of its data set."""
    if (run_dir / "party.yaml").is_file():
        party = load_yaml(run_dir / "party.yaml", PartyConfig)
        own = party.privacy.ledger if isinstance(party.privacy, PartyPrivacy) else None
        root, run = own or default_root(run_dir), f"{marker.get('run', '')}-{party.party}"
    else:
        privacy = load_yaml(run_dir / "config.yaml", TrainConfig).privacy
        root, run = (privacy and privacy.ledger) or default_root(run_dir), marker.get("privacy_run", "")
    return sorted(root.expanduser().glob(f"*/spool/{run}")) if run else []


def _remains(run_dir: Path, marker: dict[str, str]) -> list[str]:
    lines = [
        "models, checkpoints and exports were trained on the text; delete them by hand, copies elsewhere too",
        "losses and evaluations of the run (private/) were computed on it",
    ]
    if "privacy_run" in marker or (run_dir / "public").is_dir():
        lines.insert(0, "released sums: what others received or could compute from them stays, within its epsilon")
        lines.append("the ledger keeps its entries and keyed hashes: what was spent stays spent")
    if (run_dir / "party.yaml").is_file():
        lines.append("what crossed to other parties is theirs; ask them to purge their folders")
    return lines
