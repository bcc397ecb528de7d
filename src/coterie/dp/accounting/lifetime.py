"""What all runs on some of the same text have spent together, in whichever data sets and ledgers they are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.dp.accounting.accountant import Accountant
from coterie.dp.accounting.budget import Spent
from coterie.dp.accounting.groups import Share, joint_epsilon
from coterie.dp.accounting.overlap import RecordedRun, compare, counted, overlap
from coterie.dp.accounting.texts import Fingerprints, Keyring, Originals, fingerprints, load
from coterie.dp.noise.pooled import restriction
from coterie.errors import LedgerError

if TYPE_CHECKING:
    from coterie.dp.accounting.ledger import Ledger

MERGED = "merged"
"""Folder, beside the ledgers, of copies of other places' ledgers: ``merged/PLACE/DATASET/ledger.jsonl``."""


@dataclass(frozen=True)
class Lifetime:
    """What was spent on the text of one run, for its unit.

    Attributes:
        spent: by all private runs that used some of that text; infinite once some of it was shown to others.
        lines: how many runs were counted, and by which rule where they are not simply added up.
        seeded: runs on some of it that were not private and released something.
        revealed: runs that showed some of it to others.
    """

    spent: Spent
    lines: tuple[str, ...]
    seeded: tuple[str, ...]
    revealed: tuple[str, ...]


def lifetime(ledger: Ledger, run: str, delta: float, accountant: Accountant = "pld") -> Lifetime:
    """What was spent on the text of ``run``, in all ledgers beside this one and those merged with them.

    Raises:
        LedgerError: a ledger is damaged.
    """
    runs = all_runs(ledger.folder.parent)
    own = next(recorded for recorded in runs if recorded.run == run and recorded.facts)
    shares: list[Share] = []
    rules: Counter[str] = Counter()
    seeded, revealed = [], []
    for other in runs:
        showing = not other.facts
        if not showing and not other.releases and other is not own:
            continue
        found = compare(own, other)
        if not found.same:
            rules[found.how] += bool(found.how)
        elif showing:
            revealed.append(other.run)
        elif other.seeded:
            seeded += [other.run] if other.releases else []
        else:
            counted_as = counted(own, other, found)
            shares.append(other.share(counted_as.size, counted_as.replaced))
            how = found.how if other is not own else ""
            rules["; ".join(filter(None, (counted_as.rule, how, restriction(other.facts))))] += 1
    spent = float("inf") if revealed or (own.seeded and own.releases) else joint_epsilon(shares, delta, accountant)
    lines = tuple(f"{count} run{'s' * (count > 1)} {rule or 'for the same unit'}" for rule, count in rules.items())
    return Lifetime(Spent(spent, delta), lines, tuple(seeded), tuple(revealed))


def private_runs_on(root: Path, originals: Originals, digest: str) -> list[RecordedRun]:
    """Private runs in the ledgers under ``root`` that released something about some of these documents.

    Args:
        root: folder of the privacy ledgers.
        originals: the documents.
        digest: of the documents together, by which ledgers without hashes know them.
    """
    keys = {name: fingerprints(originals, key) for name, key in Keyring(root).keys().items()}
    runs = (run for ledger in ledgers_under(root) for run in ledger.runs() if run.facts and not run.seeded)
    return [run for run in runs if run.releases and (run.dataset == digest or _touches(run, keys))]


def _touches(run: RecordedRun, keys: Mapping[str, Fingerprints]) -> bool:
    """Whether a run used some of the documents; assumed where its hashes are under a key that is not here."""
    known = [name for name in run.texts if name in keys]
    if known:
        return overlap(keys[known[0]], load(run.texts[known[0]]))
    return bool(run.texts)


def all_runs(root: Path) -> list[RecordedRun]:
    """Runs and showings in all ledgers under ``root``; one that is in several of them once, with all releases."""
    found: dict[tuple[str, bool], RecordedRun] = {}
    for ledger in ledgers_under(root):
        for run in ledger.runs():
            key = (run.run, not run.facts)
            known = found.get(key)
            if known is None:
                found[key] = run
            else:
                both = known.releases | run.releases
                found[key] = replace(known, releases=both, texts={**run.texts, **known.texts})
    return list(found.values())


def ledgers_under(root: Path) -> Iterator[Ledger]:
    """The ledgers of all data sets under ``root``, and those that were merged with them."""
    from coterie.dp.accounting.ledger import existing_ledger

    return (existing_ledger(folder) for folder in ledger_folders(root))


def ledger_folders(root: Path) -> list[Path]:
    """Folders of all data sets' ledgers under ``root``, merged ones last."""
    from coterie.dp.accounting.ledger import FILE

    own = sorted(path.parent for path in root.glob(f"*/{FILE}"))
    return own + sorted(path.parent for path in (root / MERGED).glob(f"*/*/{FILE}"))


def units_differ(ledger: Ledger) -> LedgerError:
    """Why no single figure can be given for a whole data set."""
    return LedgerError(
        "runs on this dataset protect different units.",
        code="dp-ledger-units",
        where=str(ledger.folder),
        why="an epsilon for records and one for users do not add up to either",
        fix="name a run: what was spent on its unit is then added up",
    )
