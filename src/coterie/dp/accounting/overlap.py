"""How a run counts for the unit of another run on some of the same text.

Units nest: a chunk of a document, the document (or an item of a dataset), the user. A unit that is a part of the
other run's unit is replaced there (what remains contributes something else); a unit that is made of several of the
other run's is a group of as many. Where nobody knows how many, there is no bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coterie.dp.accounting import texts
from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.groups import LARGEST_GROUP, Share
from coterie.dp.accounting.texts import Fingerprints

_LARGEST_JOIN = 50_000_000


@dataclass(frozen=True)
class RecordedRun:
    """A run, or a showing of text, as a ledger holds it.

    Attributes:
        run: its identifier.
        dataset: digest of its data set.
        facts: what was fixed when it started; empty for a showing.
        releases: what was released, by round, draw and digest.
        texts: files with the fingerprints of its documents, by key.
        merged: from a ledger of another place.
    """

    run: str
    dataset: str
    facts: Mapping[str, Any]
    releases: frozenset[tuple[int, int, str]] = frozenset()
    texts: Mapping[str, Path] = field(default_factory=dict)
    merged: bool = False

    @property
    def seeded(self) -> bool:
        return bool(self.facts.get("seeded"))

    def share(self, size: float, replaced: bool) -> Share:
        return Share(Mechanism.from_json(self.facts["mechanism"]), len(self.releases), size, replaced)


@dataclass(frozen=True)
class Counted:
    """How a run counts: see `coterie.dp.accounting.groups.Share`; ``rule`` says why, in words for a statement."""

    size: float
    replaced: bool
    rule: str


@dataclass(frozen=True)
class ComparedRuns:
    """Whether two runs used some of the same text.

    Attributes:
        same: they did, or nobody can tell and it has to be assumed.
        how: how that is known; empty where hashes say so.
        pair: both runs' fingerprints under one key, where there are such.
    """

    same: bool
    how: str = ""
    pair: tuple[Fingerprints, Fingerprints] | None = None


def compare(own: RecordedRun, other: RecordedRun) -> ComparedRuns:
    """Whether two runs used some of the same text (or text of the same user)."""
    common = [key for key in own.texts if key in other.texts]
    pair = (texts.load(own.texts[common[0]]), texts.load(other.texts[common[0]])) if common else None
    if own.dataset == other.dataset:
        return ComparedRuns(True, "" if pair else "known by its data set's digest", pair)
    if pair is not None:
        if overlap(*pair):
            return ComparedRuns(True, "", pair)
        apart = bool(pair[0].forms and pair[1].forms) and not pair[0].forms & pair[1].forms
        return ComparedRuns(
            False, "prepared in another form (text, token ids), so not compared" if apart else "", pair
        )
    if own.texts and other.texts:
        return ComparedRuns(True, "hashed with another key, so assumed to be on the same text")
    return ComparedRuns(False, "older than text hashes, so not compared")


def counted(own: RecordedRun, other: RecordedRun, found: ComparedRuns) -> Counted:
    """How ``other`` counts for the unit of ``own``."""
    ours, theirs = _level(own.facts), _level(other.facts)
    if theirs == "user":
        if ours == "user":
            return _between_users(own, other, found.pair)
        return Counted(1, True, "for users: counts as a group of two, since a record's user remains without it")
    pieces = _pieces(other, theirs, found)
    if ours == "user":
        most = math.inf if found.pair is None else _most_records(*found.pair)
        size = most * pieces
        if size > LARGEST_GROUP:
            return Counted(math.inf, False, "for records: no bound, a user may have too many of them")
        return Counted(size, False, f"for records: counts as a group of {size:.0f}, the most that a user has")
    same = dict(own.facts.get("record") or {}) == dict(other.facts.get("record") or {})
    if ours == theirs == "chunk" and not same:
        return _pieces_of_documents(pieces, replaced=True)
    if ours == "chunk" and theirs != "chunk":
        return Counted(1, True, "for documents: counts as a group of two: its document remains without a piece")
    if theirs == "chunk" and ours != "chunk":
        return _pieces_of_documents(pieces, replaced=False)
    if "item" in (ours, theirs) and not same and not (found.pair and overlap(*found.pair)):
        return Counted(math.inf, False, "for records that were made in another way: no bound")
    return Counted(1, False, "")


def _pieces_of_documents(pieces: float, replaced: bool) -> Counted:
    rule = "for pieces of documents: "
    if pieces > LARGEST_GROUP:
        return Counted(math.inf, replaced, rule + "no bound, a document may have too many of them")
    groups = f"a group of {2 * pieces if replaced else pieces:.0f}, "
    return Counted(pieces, replaced, f"{rule}counts as {groups}the most that a document has")


def _level(facts: Mapping[str, Any]) -> str:
    if facts.get("unit") == "user":
        return "user"
    return {"records": "document", "chunks": "chunk"}.get((facts.get("record") or {}).get("packing", ""), "item")


def _pieces(other: RecordedRun, level: str, found: ComparedRuns) -> float:
    """Most records of ``other`` that one document became."""
    if level != "chunk":
        return 1
    if found.pair is not None:
        return found.pair[1].pieces
    return max((texts.load(path).pieces for path in other.texts.values()), default=math.inf)


def overlap(own: Fingerprints, other: Fingerprints) -> bool:
    """Whether they have a text in common, or a user."""
    if np.intersect1d(own.texts, other.texts).size:
        return True
    return own.users is not None and other.users is not None and bool(np.intersect1d(own.users, other.users).size)


def _most_records(own: Fingerprints, other: Fingerprints) -> float:
    """Most documents of the other run that one user may have: known ones, and all that nobody knows the user of."""
    if own.users is None:
        return math.inf
    pairs = _unique(own.texts, own.users)
    times = np.searchsorted(other.texts, pairs["text"], "right") - np.searchsorted(other.texts, pairs["text"], "left")
    _, of = np.unique(pairs["user"], return_inverse=True)
    unknown = int(np.count_nonzero(~np.isin(other.texts, own.texts)))
    return float(np.bincount(of, times).max()) + unknown


def _between_users(own: RecordedRun, other: RecordedRun, pair: tuple[Fingerprints, Fingerprints] | None) -> Counted:
    """A user of both runs goes from both. Where its text lies under other names there, these go or are replaced."""
    unknown = Counted(math.inf, False, "for users: no bound, nobody knows whether they are the same ones")
    if pair is None or pair[0].users is None or pair[1].users is None:
        grouping = own.facts.get("users")
        alike = grouping is not None and grouping == other.facts.get("users")
        return Counted(1, False, "") if alike else unknown
    touched = _users_touched(*pair)
    if touched is None:
        return unknown
    size, replaced = touched
    if size <= 1 and not replaced:
        return Counted(1, False, "")
    return Counted(size, replaced, f"for users: counts as {size} of them replaced, since texts changed users")


def _users_touched(own: Fingerprints, other: Fingerprints) -> tuple[int, bool] | None:
    """Most users of the other run that one own user's going touches, and whether some remain with other text."""
    assert own.users is not None
    assert other.users is not None
    mine, theirs = _unique(own.texts, own.users), _unique(other.texts, other.users)
    first, last = (np.searchsorted(theirs["text"], mine["text"], side) for side in ("left", "right"))
    times = last - first
    if times.sum() > _LARGEST_JOIN:
        return None
    at = np.repeat(first - np.concatenate([[0], times.cumsum()[:-1]]), times) + np.arange(times.sum())
    joined, shared = np.unique(_pairs(np.repeat(mine["user"], times), theirs["user"][at]), return_counts=True)
    users, whole = np.unique(theirs["user"], return_counts=True)
    remains = (shared < whole[np.searchsorted(users, joined["user"])]) & (joined["text"] != joined["user"])
    by_name = np.setdiff1d(np.intersect1d(own.users, other.users), joined["text"][joined["text"] == joined["user"]])
    _, counts = np.unique(np.concatenate([joined["text"], by_name]), return_counts=True)
    return int(counts.max(initial=0)), bool(remains.any())


def _unique(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.unique(_pairs(first, second))


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    pairs = np.empty(first.size, [("text", np.uint64), ("user", np.uint64)])
    pairs["text"], pairs["user"] = first, second
    return pairs
