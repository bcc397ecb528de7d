"""What the auditor knows and nobody who attacks may: which documents are in a run's text, and which canaries.

The key lies beside the prepared text, readable by its owner alone. A document is known by a keyed hash of its text:
scores and truth meet by content and never by order, and a document in the wrong pile is found at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from coterie.audit.model.canaries import KINDS, Canary
from coterie.errors import AuditError
from coterie.storage import PRIVATE, check_known, file_digest, json_object, write_whole, writing

KEY, TRAIN, HELD_OUT, TEST = "key.json", "train.jsonl", "held-out.jsonl", "test.jsonl"
"""Files of a prepared folder: the key, the run's text with its canaries, what coins left out, and the test text."""
_FORMAT = 1


@dataclass(frozen=True)
class Key:
    """The coins of one prepared run.

    Attributes:
        salt: key of the documents' hashes, hex.
        coins: id of a document to whether it is in the run's text. Documents that had no coin are not here.
        canaries: all of them, also those that are in no text.
        text: SHA-256 of the prepared training file.
        seeded: coins from a seed, for tests: then they are no secret, and nothing follows from guessing them.
    """

    salt: str
    coins: Mapping[str, bool]
    canaries: tuple[Canary, ...]
    text: str
    seeded: bool = False

    def id(self, text: str) -> str:
        """The id of a document."""
        return document_id(text, self.salt)

    def write(self, folder: Path) -> None:
        """Keep it in ``folder``, readable by the owner alone.

        Raises:
            CheckpointError: the disk is full or broken.
        """
        values = {"format": _FORMAT, **asdict(self)}
        with writing(folder / KEY):
            write_whole(folder / KEY, (json.dumps(values, indent=1) + "\n").encode(), PRIVATE)

    @classmethod
    def read(cls, folder: Path) -> Key:
        """The key of a prepared folder, whose training file is still what it was made with.

        Raises:
            AuditError: there is none, it is damaged, others may read it, or the training file changed.
        """
        path = folder / KEY
        try:
            values = json_object(path.read_bytes())
            check_known(path, "format", values.pop("format"), {_FORMAT}, AuditError)
            canaries = tuple(Canary(**canary) for canary in values.pop("canaries"))
            key = cls(canaries=canaries, **values)
            for canary in canaries:
                check_known(path, "kind", canary.kind, KINDS, AuditError)
            open_to_others = path.stat().st_mode & 0o077
            same = file_digest(folder / TRAIN) == key.text
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AuditError(
                f"{path} cannot be read as the key of an audit ({type(error).__name__}).",
                code="audit-key",
                why="without it nobody knows which documents are in the run's text",
                fix="name the folder that the audit's preparation wrote, whole",
            ) from None
        if open_to_others:
            raise AuditError(
                f"{path} can be read by others.",
                code="audit-key",
                why="whoever has the coins need not guess them",
                fix=f"chmod 600 {path}, and prepare anew if somebody may have read it",
            )
        if not same:
            raise AuditError(
                f"{folder / TRAIN} is not the text that the key beside it belongs to.",
                code="audit-key-foreign",
                why="the coins would be compared with another run's text",
                fix="put the file back, or prepare and train anew",
            )
        return key


def document_id(text: str, salt: str) -> str:
    """A keyed hash of a document's text, 16 hex digits."""
    return hashlib.blake2b(text.encode(), key=bytes.fromhex(salt), digest_size=8).hexdigest()


def check_piles(key: Key, inside: Iterable[str], outside: Iterable[str]) -> None:
    """Hold two piles of documents, by their ids, to the coins.

    Raises:
        AuditError: one lies in the wrong pile, or one with a coin in none.
    """
    found, left_out = set(inside), set(outside)
    wrong = sum(not key.coins.get(one, True) for one in found) + sum(key.coins.get(one, False) for one in left_out)
    lost = len(set(key.coins) - found - left_out)
    if wrong or lost:
        raise AuditError(
            f"{wrong} documents lie in another pile than their coins say, and {lost} in none.",
            code="audit-misplaced",
            why="scores would be held against the wrong truth, and finding nothing would look like safety",
            fix="put the files of the prepared folder back as they were written, or prepare and train anew",
        )
