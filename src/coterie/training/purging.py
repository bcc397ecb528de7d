"""What a finished run leaves on disk of the text itself, and removing it where text was withdrawn."""

from __future__ import annotations

import glob
import shutil
from dataclasses import dataclass
from pathlib import Path

from coterie.config import PartyConfig, PartyPrivacy, TrainConfig, load_yaml
from coterie.dp.accounting.ledger import default_root
from coterie.dp.accounting.lifetime import ledgers_under
from coterie.dp.accounting.spool import Spool
from coterie.errors import CheckpointError, RoundError, as_argument
from coterie.federation.rounds.run_folder import RunFolder
from coterie.storage import json_object
from coterie.training.folders import no_run, private_folder

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
    try:
        held = RunFolder(run_dir)
    except RoundError as error:
        raise CheckpointError(
            f"{run_dir} is running.",
            code="purge-running",
            why="it would lose what it needs to go on",
            fix="wait until it ends, or stop it first",
        ) from error
    with held:  # nobody takes it up again while parts of it go
        return _purge(run_dir, marker, give_up)


def _purge(run_dir: Path, marker: dict[str, str], give_up: bool) -> Purged:
    private = private_folder(run_dir)
    if not give_up and not (private / "result.json").is_file():
        raise CheckpointError(
            f"{run_dir} is not finished.",
            code="purge-unfinished",
            why="its spool holds what was released already; without it the rounds count again",
            fix=f"`coterie resume {as_argument(run_dir)}`, or add --give-up if it is not to go on",
        )
    removed: list[Path] = []
    root, run = _ledger_of(run_dir, marker)
    recorded = (entry.run for ledger in ledgers_under(root) for entry in ledger.runs())
    if run and not give_up and run not in recorded:
        raise CheckpointError(
            f"The ledger of {run_dir} is not under {root}.",
            code="purge-no-ledger",
            why="the run's spool lies beside its ledger, and would stay",
            fix="set COTERIE_HOME or XDG_DATA_HOME as they were when the run was started",
        )
    for folder in sorted(root.glob(f"*/spool/{glob.escape(run)}")) if run else []:
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
        marker = json_object((run_dir / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise no_run(run_dir) from None
    return marker


def _ledger_of(run_dir: Path, marker: dict[str, str]) -> tuple[Path, str]:
    """The folder of the ledgers that count the run, and its name in them; empty where it has no budget."""
    if (run_dir / "party.yaml").is_file():
        party = load_yaml(run_dir / "party.yaml", PartyConfig)
        budget = isinstance(party.privacy, PartyPrivacy)
        own = party.privacy.ledger if isinstance(party.privacy, PartyPrivacy) else None
        run = f"{marker.get('run', '')}-{party.party}" if budget else ""
    else:
        privacy = load_yaml(run_dir / "config.yaml", TrainConfig).privacy
        own, run = privacy.ledger if privacy else None, marker.get("privacy_run", "")
    return (own or default_root(run_dir)).expanduser(), run


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
