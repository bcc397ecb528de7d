"""Documents of local files. Nothing is copied into a cache folder, because the text may be private."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from coterie.config import DataSpec
from coterie.dp.accounting.users import user_text
from coterie.errors import DataError
from coterie.training.data.chat import COLUMNS, OPTIONAL, Conversation, conversation
from coterie.training.data.readers import (
    IntegerText,
    Row,
    check_unpacked,
    csv_rows,
    json_rows,
    kind_of,
    parquet_rows,
    plain_text,
    saved_rows,
)

_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Documents:
    """Texts in file order.

    Attributes:
        texts: one string per document.
        users: whose text each is, when a user column was asked for.
        conversations: what the texts stand for, where rows are conversations.
        classes: of each text, where they are learnt by label words; empty where none was read.
        places: file and row of each text, there.
        blank: how many said nothing and were left out.
    """

    texts: tuple[str, ...]
    users: tuple[str, ...] | None = None
    conversations: tuple[Conversation, ...] | None = None
    classes: tuple[str, ...] | None = None
    places: tuple[tuple[Path, str], ...] | None = None
    blank: int = 0

    def __len__(self) -> int:
        return len(self.texts)


def read_documents(
    files: Sequence[Path], spec: DataSpec, *, user_column: str | None = None, classes_needed: bool = True
) -> Documents:
    """Read all documents of some files; format, column and splitting as ``spec`` says.

    Args:
        files: to read.
        spec: how.
        user_column: names whose text each is.
        classes_needed: where texts are learnt by label words, every row has to name its class; else none is read.

    Raises:
        DataError: a file is missing, empty or unreadable, lacks the column, or the column is not text. The message
            names the file and the columns that were found.
    """
    texts: list[str] = []
    users: list[str] = []
    talks: list[Conversation] = []
    classes: list[str] = []
    places: list[tuple[Path, str]] = []
    blank = 0
    _check_different(files)
    for path in files:
        before = len(texts)
        for made, user in _documents_of(path, spec, user_column, classes_needed):
            if made.blank if isinstance(made, Conversation | Classified) else not made.strip():
                blank += 1
                continue
            if isinstance(made, Classified):
                if classes_needed:
                    _check_class(made, path)
                texts.append(made.text)
                classes.append(made.of or "")
                places.append((path, made.where))
            elif isinstance(made, Conversation):
                texts.append(made.text())
                talks.append(made)
            else:
                texts.append(made)
            users.append(user)
        if len(texts) == before:
            raise DataError(
                f"{path} holds no text.",
                code="data-empty",
                why="every document in it is empty or blank",
                fix="remove the file from the config, or check that it was written completely",
            )
    by_words = spec.label_words is not None
    return Documents(
        tuple(texts),
        tuple(users) if user_column is not None else None,
        tuple(talks) if spec.form != "text" else None,
        tuple(classes) if by_words else None,
        tuple(places) if by_words else None,
        blank,
    )


class Classified(NamedTuple):
    """A text and its class; None where the row names none that is known."""

    where: str
    text: str
    of: str | None

    @property
    def blank(self) -> bool:
        return not self.text.strip()


def _check_class(made: Classified, path: Path) -> None:
    if made.of is None:
        raise DataError(
            f"{path}, {made.where}, names no class of `data.label_words.words`.",
            code="data-no-class",
            why="a text without a class has no word to learn",
            fix="name the word of every class under data.label_words.words, by the values of the column",
        )


def _check_different(files: Sequence[Path]) -> None:
    """By what they are on the disk: a second name, or a link, is the same file."""
    seen: dict[tuple[int, int], Path] = {}
    for path in files:
        if not path.exists():  # said where it is read
            continue
        found = path.stat()
        place = (found.st_dev, found.st_ino)
        if place in seen:
            raise DataError(
                f"{path} is the same file as {seen[place]}.",
                code="data-file-twice",
                why="everything in it would count twice; a promise for one record would cover half of it",
                fix="name it once",
            )
        seen[place] = path


def _documents_of(
    path: Path, spec: DataSpec, user_column: str | None, classes_needed: bool
) -> Iterator[tuple[str | Conversation | Classified, str]]:
    if not path.exists():
        raise DataError(
            f"There is no data file {path}.",
            code="data-no-file",
            where="data.train or data.test",
            fix="check the path; a relative one starts from the settings file's folder",
        )
    check_unpacked(path)
    kind = "saved" if path.is_dir() else spec.format or _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"The format of {path} cannot be told from its suffix `{path.suffix}`.",
            code="data-format",
            fix=f"set data.format, or use one of {', '.join(_SUFFIXES)}",
        )
    asked = f"form: {spec.form}" if spec.form != "text" else f"task: {spec.task}"
    if kind == "txt" and (spec.form, spec.task) != ("text", "text"):
        raise DataError(
            f"{path} is plain text and holds no columns for `{asked}`.",
            code="data-not-chat",
            fix="use jsonl or parquet, or leave that setting out",
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
    if spec.form != "text":
        yield from _conversations_of(path, kind, spec.form, user_column)
        return
    columns = (spec.text,) if user_column is None else (spec.text, user_column)
    words = spec.label_words if classes_needed else None
    for where, (text, *user) in _rows(path, kind, columns if words is None else (*columns, words.column)):
        if text is not None and (not isinstance(text, str) or isinstance(text, IntegerText)):
            raise DataError(
                f"Column `{spec.text}` of {path} holds {kind_of(text)}, not text ({where}).",
                code="data-not-text",
                fix="choose the column that holds text",
            )
        owner = _user(path, where, user_column, user[0]) if user_column is not None else ""
        written = text or ""
        if spec.label_words is None:
            yield written, owner
        else:
            yield Classified(where, written, None if words is None else words.class_of(user[-1])), owner


def _conversations_of(
    path: Path, kind: str, form: str, user_column: str | None
) -> Iterator[tuple[Conversation, str]]:
    own = COLUMNS[form]
    for where, values in _rows(path, kind, (*own, *([user_column] if user_column else [])), OPTIONAL):
        user = _user(path, where, user_column, values[-1]) if user_column is not None else ""
        yield conversation(form, values[: len(own)], f"{path}, {where},"), user


def _user(path: Path, where: str, column: str, value: Any) -> str:
    """An id as it is written: 7 and "7" are one user, and so is a Parquet file's 7.0; spaces and case count."""
    text = user_text(value)
    if text:
        return text
    if text == "":
        raise DataError(
            f"{path} names no user in column `{column}` ({where}).",
            code="data-no-user",
            why="a record that belongs to nobody cannot be counted towards anybody's privacy",
            fix="fill the column, or leave such rows out",
        )
    raise DataError(
        f"Column `{column}` of {path} holds {kind_of(value)}, not a user's id ({where}).",
        code="data-user-id",
        why="two ways to write one id would make two users of one person",
        fix="write ids as text or whole numbers",
    )


def _plain_documents(path: Path, split: str) -> Iterator[str]:
    text = plain_text(path)
    if split == "file":
        yield text
    elif split == "line":
        yield from text.removesuffix("\n").split("\n")
    else:
        paragraph: list[str] = []
        for line in [*text.split("\n"), ""]:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "\n".join(paragraph)
                paragraph = []


def _rows(path: Path, kind: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    if kind == "saved":
        return saved_rows(path, columns, optional)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).", code="data-empty", fix="check that it was written completely")
    if kind == "jsonl":
        return json_rows(path, columns, optional)
    if kind == "csv":
        return csv_rows(path, columns, "\t" if path.suffix.lower() == ".tsv" else ",", optional)
    return parquet_rows(path, columns, optional)
