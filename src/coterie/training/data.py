"""Read documents from local files.

JSONL, CSV and Parquet go through `datasets` in streaming mode: nothing is copied into a cache folder, because the
text may be private, and nothing is asked of the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.config import DataSpec
from coterie.errors import DataError

_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Documents:
    """Texts in file order; blank ones are left out.

    Attributes:
        texts: one string per document.
        users: whose text each is, when a user column was asked for.
    """

    texts: tuple[str, ...]
    users: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def read_documents(files: Sequence[Path], spec: DataSpec, *, user_column: str | None = None) -> Documents:
    """Read all documents of some files; format, column and splitting as ``spec`` says.

    Raises:
        DataError: a file is missing, empty or unreadable, lacks the column, or the column is not text. The message
            names the file and the columns that were found.
    """
    texts: list[str] = []
    users: list[str] = []
    for path in files:
        before = len(texts)
        for text, user in _documents_of(path, spec, user_column):
            if text.strip():
                texts.append(text)
                users.append(user)
        if len(texts) == before:
            raise DataError(
                f"{path} holds no text.",
                code="data-empty",
                why="every document in it is empty or blank",
                fix="remove the file from the config, or check that it was written completely",
            )
    return Documents(tuple(texts), tuple(users) if user_column is not None else None)


def _documents_of(path: Path, spec: DataSpec, user_column: str | None) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise DataError(
            f"There is no data file {path}.",
            code="data-no-file",
            where="data.train or data.test",
            fix="check the path; a relative one starts from the settings file's folder",
        )
    kind = spec.format or _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"The format of {path} cannot be told from its suffix `{path.suffix}`.",
            code="data-format",
            fix=f"set data.format, or use one of {', '.join(_SUFFIXES)}",
        )
    if kind == "txt":
        if user_column is not None:
            raise DataError(
                f"{path} is plain text and has no column `{user_column}`.",
                code="data-no-column",
                why="without it, nobody's records can be told apart",
                fix="use jsonl, csv or parquet for user-level privacy",
            )
        yield from ((text, "") for text in _plain_documents(path, spec.split_text))
        return
    columns = (spec.text,) if user_column is None else (spec.text, user_column)
    for number, row in enumerate(_rows(path, kind), start=1):
        for column in columns:
            if column not in row:
                raise DataError(
                    f"{path} has no column `{column}`; its columns are: {', '.join(map(str, row))}.",
                    code="data-no-column",
                    fix="set data.text (or privacy.user_column) to one of them",
                )
        text = row[spec.text]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"Column `{spec.text}` of {path} holds {type(text).__name__}, not text (row {number}).",
                code="data-not-text",
                fix=f"choose the column that holds text; the columns are: {', '.join(map(str, row))}",
            )
        if user_column is not None and row[user_column] is None:
            raise DataError(
                f"Row {number} of {path} names no user in column `{user_column}`.",
                code="data-no-user",
                why="a record that belongs to nobody cannot be counted towards anybody's privacy",
                fix="fill the column, or leave such rows out",
            )
        yield text or "", str(row[user_column]) if user_column is not None else ""


def _plain_documents(path: Path, split: str) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}).",
            code="data-encoding",
            fix="convert it, for example with `iconv -t utf-8`",
        ) from None
    if split == "file":
        yield text
    elif split == "line":
        yield from text.splitlines()
    else:
        paragraph: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "\n".join(paragraph)
                paragraph = []


def _rows(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).", code="data-empty", fix="check that it was written completely")
    from datasets import Dataset  # a second to import, and only some formats need it

    name = str(path)
    try:
        if kind == "jsonl":
            rows = Dataset.from_json(name, streaming=True)
        elif kind == "csv":
            separator = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = Dataset.from_csv(name, streaming=True, sep=separator, keep_default_na=False)
        else:
            rows = Dataset.from_parquet(name, streaming=True)
        yield from rows
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets each raise their own
        cause = error.__cause__ or error
        raise DataError(
            f"{path} cannot be read as {kind}: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}.",
            code="data-unreadable",
            fix="open it and check the first rows; set data.format when the suffix misleads",
        ) from None
