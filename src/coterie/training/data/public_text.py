"""Text that is said to be public, held against the text that is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coterie.config import DataSpec
from coterie.errors import DataError
from coterie.training.data.documents import Documents, read_documents

_LONG = 100
"""Characters from which a document is no phrase that many people write."""


def read_public(files: Sequence[Path], data: DataSpec, option: str) -> Documents:
    """Public text that an option of a command names, in the form of the run's own.

    Args:
        files: to read.
        data: how; what it trains on is not read.
        option: of the command.

    Raises:
        DataError: a file is missing or unreadable.
    """
    for absent in (file for file in files if not file.exists()):
        raise DataError(
            f"There is no data file {absent}.",
            code="data-no-file",
            where=option,
            fix="check the path; a relative one starts from the current folder",
        )
    return read_documents(files, data)


def check_not_private(
    public: Documents, files: Sequence[Path], private: Documents, trained: Sequence[Path], where: str, fix: str
) -> None:
    """Refuse text that is called public and is trained on under a promise.

    The same file is refused, half of the documents, or a single one that is longer than a phrase.

    Args:
        public: what is called public.
        files: where from.
        private: the text to train on.
        trained: where from.
        where: names the public files in the message.
        fix: what to do.

    Raises:
        DataError: it is (code ``data-not-public``).
    """
    own_files = {file.resolve() for file in trained}
    own = frozenset(private.texts)
    both = [text for text in public.texts if text in own]
    same = next((file for file in files if file.resolve() in own_files), None)
    if same is None and 2 * len(both) < len(public) and all(len(text) < _LONG for text in both):
        return
    raise DataError(
        f"{same} is a file of `data.train`."
        if same is not None
        else f"{len(both)} of {len(public)} documents are in `data.train`, too.",
        code="data-not-public",
        where=where,
        why="what is made from public text or chosen by it has no noise, and tells of the text",
        fix=fix,
    )
