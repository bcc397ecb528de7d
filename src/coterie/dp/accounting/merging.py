"""Ledgers of two machines of one owner, put together: runs on the same text add up wherever they were counted.

The other folder's ledgers are copied beside one's own, with hashes and keys. Nothing of one's own is changed, and a
run that is in several copies counts once, with all releases that any copy knows. Runs whose hashes are under
different keys cannot be compared and are taken to be on the same text; a run that starts after the merge is hashed
under every key, so its figure is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coterie.dp.accounting.ledger import FILE, Entry
from coterie.dp.accounting.lifetime import MERGED, ledger_folders
from coterie.dp.accounting.texts import FOLDER, OTHER_KEYS, OWN_KEY, Keyring, key_name, load, read_key
from coterie.errors import LedgerError
from coterie.storage import PRIVATE, locked, make_private_folder, write_whole


@dataclass(frozen=True)
class Merge:
    """What a merge brought.

    Attributes:
        ledgers: data sets whose ledgers were copied.
        known: data sets of which everything was here already.
    """

    ledgers: int
    known: int


def merge(other: Path, root: Path) -> Merge:
    """Copy the ledgers under ``other`` beside those under ``root``.

    Raises:
        LedgerError: ``other`` holds no ledgers, or its key or one of them is damaged: nothing is copied then; or
            a disk refuses.
    """
    sources = {folder: _checked(folder) for folder in ledger_folders(other)}
    if not sources:
        raise LedgerError(
            f"{other} holds no ledgers.",
            code="dp-ledger-none",
            why="nothing of what was spent there would be counted here",
            fix="name the other machine's folder of ledgers, or a copy: `ledger.jsonl` lies one folder below",
        )
    make_private_folder(root)
    place = _take_keys(other, root)
    copied = sum(_take_ledger(source, lines, root, place) for source, lines in sources.items())
    return Merge(copied, len(sources) - copied)


def _take_keys(other: Path, root: Path) -> str:
    """Their keys beside ours; as our own where nothing was counted here yet. The name of the other's own key."""
    theirs = [read_key(path) for path in ((other / OWN_KEY), *sorted((other / OTHER_KEYS).glob("*")))]
    with locked(root / "key.lock", LedgerError):
        if not ledger_folders(root):
            _write_key(root / OWN_KEY, theirs[0])
    own = Keyring(root).own
    make_private_folder(root / OTHER_KEYS)
    for key in theirs:
        if key != own:
            _write_key(root / OTHER_KEYS / key_name(key), key)
    return key_name(theirs[0])


def _write_key(path: Path, key: bytes) -> None:
    write_whole(path, key.hex().encode() + b"\n", PRIVATE)


def _take_ledger(source: Path, lines: bytes, root: Path, place: str) -> bool:
    """Copy one data set's ledger, unless everything in it is here. A copy is only ever replaced by a longer one."""
    here = [root / source.name, *(folder for folder in ledger_folders(root) if folder.name == source.name)]
    for folder in here:
        if _held(folder).startswith(lines):
            return False
    free = (root / MERGED / f"{place}-{number}" / source.name for number in range(len(here) + 1))
    target = next(folder for folder in free if lines.startswith(_held(folder)))
    make_private_folder(target)
    for path in sorted((source / FOLDER).glob("*")):
        make_private_folder(target / FOLDER)
        write_whole(target / FOLDER / path.name, path.read_bytes(), PRIVATE)
    write_whole(target / FILE, lines, PRIVATE)
    return True


def _checked(source: Path) -> bytes:
    """The lines of a ledger that is whole, with the hashes it names, and of which this version knows all.

    Read only: the other folder may lie on a medium that cannot be written.
    """
    lines = (source / FILE).read_bytes()
    last: Entry | None = None
    for line in lines.splitlines() or [b""]:
        try:
            last = Entry.read(line, last, source / FILE)
        except ValueError:
            raise LedgerError(
                f"{source / FILE} is not what was written: line {last.seq + 2 if last else 1} does not continue "
                "the chain.",
                code="dp-ledger-tampered",
                why="privacy already spent may be missing from it",
                fix="copy the folder again while nothing runs on the other machine",
            ) from None
        if last.kind == "texts":
            load(source / FOLDER / last.data["file"])
    return lines


def _held(folder: Path) -> bytes:
    return (folder / FILE).read_bytes() if (folder / FILE).exists() else b""
