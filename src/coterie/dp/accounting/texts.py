"""What a ledger remembers of texts: keyed hashes, so that the same text is known again in another data set.

One key lies beside the ledgers of one owner, readable by that owner alone. Without it nobody can test whether a text
is in a ledger; with it, whoever has the text can. Eight bytes a document (and eight for its user) are kept, sorted:
that two different texts look the same happens once in 10^6 comparisons of two data sets of 4 million documents each,
and then only makes the figure larger.
"""

from __future__ import annotations

import hashlib
import secrets
import unicodedata
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from coterie.dp.accounting.dataset import record_digest
from coterie.dp.accounting.users import user_ids
from coterie.errors import LedgerError
from coterie.storage import PRIVATE, check_keys, locked, make_private_folder, write_whole

OWN_KEY, OTHER_KEYS, FOLDER = "key", "keys", "texts"
FORMS = ("text", "ids", "item")
_KEY_BYTES = 32


@dataclass(frozen=True)
class Originals:
    """The documents that the records of a private run were made from.

    Attributes:
        texts: one item a document: text, or whatever a dataset holds.
        users: whose each document is; None where units are records.
        pieces: most records that one document became.
    """

    texts: Sequence[Any]
    users: Sequence[Hashable] | None = None
    pieces: int = 1


@dataclass(frozen=True)
class Fingerprints:
    """Keyed hashes of the documents of a run.

    Attributes:
        texts: [N] uint64, ascending; a text that is there twice counts twice.
        users: [N] uint64, whose each is; None where units are records.
        pieces: see `Originals`.
        forms: what the hashes are of, of `FORMS`. Those of two forms never agree.
    """

    texts: np.ndarray
    users: np.ndarray | None
    pieces: int
    forms: frozenset[str] = frozenset()


class Keyring:
    """The keys of a folder of ledgers: its own, made on first use, and those of ledgers that were merged into it.

    Args:
        root: the folder that holds the ledgers of all datasets.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        make_private_folder(root)
        with locked(root / "key.lock", LedgerError):
            if not (root / OWN_KEY).exists():
                write_whole(root / OWN_KEY, secrets.token_bytes(_KEY_BYTES).hex().encode() + b"\n", PRIVATE)
        self.own = read_key(root / OWN_KEY)

    def keys(self) -> dict[str, bytes]:
        """Every key by its name, the own one first."""
        others = (read_key(path) for path in sorted((self.root / OTHER_KEYS).glob("*")))
        return {key_name(key): key for key in (self.own, *others)}

    def public_name(self, dataset: str, key: str | None = None) -> str:
        """What a dataset's ledger is called in statements.

        The dataset's digest itself would let anybody who can guess the whole text test the guess.

        Args:
            dataset: its digest.
            key: name of the key of whoever counted it; the own one where it is None or not here.
        """
        secret = self.own if key is None else self.keys().get(key, self.own)
        return hashlib.blake2b(dataset.encode(), key=secret, digest_size=8, person=b"ledger").hexdigest()


def read_key(path: Path) -> bytes:
    """The key in a file.

    Raises:
        LedgerError: the file is not a key, or others may read it.
    """
    try:
        key = bytes.fromhex(path.read_text("ascii").strip())
        open_to_others = path.stat().st_mode & 0o077
    except (OSError, ValueError) as error:
        raise _bad_key(path, "cannot be read as a key") from error
    if len(key) != _KEY_BYTES:
        raise _bad_key(path, f"has {len(key)} bytes, not {_KEY_BYTES}")
    if open_to_others:
        raise _bad_key(path, "can be read by others")
    return key


def _bad_key(path: Path, problem: str) -> LedgerError:
    return LedgerError(
        f"{path} {problem}.",
        code="dp-ledger-key",
        why="with another key the text of earlier runs is not known again; with a known one, texts can be tested",
        fix=f"put the key back as it was, and `chmod 600 {path}`",
    )


def key_name(key: bytes) -> str:
    """A name that tells keys apart and tells nothing about them."""
    return hashlib.sha256(b"coterie ledger key" + key).hexdigest()[:16]


def fingerprints(originals: Originals, key: bytes) -> Fingerprints:
    """The keyed hashes of some documents.

    Cost: 3 us a short text.
    """
    forms: set[str] = set()
    hashes = (_hash(content, key, b"text") for content in _contents(originals.texts, forms))
    texts = np.fromiter(hashes, np.uint64)
    order = np.argsort(texts, kind="stable")
    if originals.users is None:
        return Fingerprints(texts[order], None, originals.pieces, frozenset(forms))
    owners = user_ids(originals.users)
    known = {user: _hash(user.encode("utf-8", "surrogatepass"), key, b"user") for user in set(owners)}
    users = np.fromiter((known[user] for user in owners), np.uint64)
    return Fingerprints(texts[order], users[order], originals.pieces, frozenset(forms))


def _hash(content: bytes, key: bytes, kind: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, key=key, digest_size=8, person=kind).digest(), "big")


def _contents(texts: Sequence[Any], forms: set[str]) -> Iterator[bytes]:
    for number in range(len(texts)):
        form, content = _content(texts[number])
        forms.add(form)
        yield form.encode() + content


def _content(item: Any) -> tuple[str, bytes]:
    """What stays the same where the same text is prepared again.

    Text: its words, whatever the spaces and line ends between them, in one Unicode form. Token ids: those that are
    attended to, without padding and without what else the item holds. Anything else: all of it.
    """
    if isinstance(item, str):
        return "text", " ".join(unicodedata.normalize("NFC", item).split()).encode("utf-8", "surrogatepass")
    if isinstance(item, Mapping) and "input_ids" in item:
        ids = np.asarray(item["input_ids"], np.int64).ravel()
        mask = np.asarray(item.get("attention_mask", ())).ravel()
        if mask.size == ids.size:
            ids = ids[mask != 0]
        return "ids", ids.tobytes()
    return "item", record_digest(item)


def store(folder: Path, found: Fingerprints) -> str:
    """Keep fingerprints in a ledger's folder; the same ones once.

    Returns:
        The name of the file, which follows from its content.
    """
    arrays = {"texts": found.texts} | ({} if found.users is None else {"users": found.users})
    content = save(arrays, metadata={"pieces": str(found.pieces), "forms": " ".join(sorted(found.forms))})
    name = hashlib.sha256(content).hexdigest()[:24]
    path = folder / FOLDER / name
    if not path.exists():
        make_private_folder(path.parent)
        write_whole(path, content, PRIVATE)
    return name


@lru_cache(maxsize=8)
def load(path: Path) -> Fingerprints:
    """What `store` kept.

    Raises:
        LedgerError: it is missing, not what was written, or says something this version does not know.
    """
    try:
        intact = hashlib.sha256(path.read_bytes()).hexdigest()[:24] == path.name
    except OSError:
        intact = False
    if not intact:
        raise LedgerError(
            f"{path} is not what the ledger wrote.",
            code="dp-ledger-texts",
            why="what was spent on the same text before could not be found",
            fix="put the ledger's folder back as it was",
        )
    with safe_open(path, framework="np") as file:
        users = file.get_tensor("users") if "users" in file.keys() else None  # noqa: SIM118 - no mapping
        facts = file.metadata()
        forms = frozenset(facts.get("forms", "").split())
        check_keys(path, "field", facts, ("pieces", "forms"), LedgerError)
        check_keys(path, "form", forms, FORMS, LedgerError)
        return Fingerprints(file.get_tensor("texts"), users, int(facts["pieces"]), forms)
