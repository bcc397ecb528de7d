"""Rows of local files: JSON Lines, CSV, Parquet, saved datasets, only the columns that were named, nothing guessed.

A path is a file's literal name. A JSON string is text, whatever it looks like, and a CSV field is text. Columns that
were not named are not looked at. Errors name file and line and never repeat a value; since the first line of a CSV
file may be text where a header is missing, they do not repeat that either.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coterie.errors import DataError

Row = tuple[str, list[Any]]
"""Where a row is ("line 3"), and the values of the named columns, in their order."""

_NAMED = (
    "name one of its columns with data.text, or privacy.user_column; where data.form is set, name columns as it asks"
)
_PACKED = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<bzip2>BZh[1-9]1AY&SY)|(?P<xz>\xfd7zXZ\0)|(?P<zstd>\x28\xb5\x2f\xfd)|(?P<zip>PK\3\4)"
)
_BOM = b"\xef\xbb\xbf"
_SURROGATES = re.compile("[\ud800-\udfff]")


def json_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of JSON Lines, or of a file that holds one JSON array of objects.

    Half a surrogate pair in a string (``"\\ud83d"``) becomes U+FFFD. Integers come as `IntegerText`, as written.

    Raises:
        DataError: a line is no JSON object, lacks a column or holds it twice, or is not UTF-8.
    """
    for where, made in _json_objects(path):
        if not isinstance(made, _Pairs):
            raise _unreadable(path, "jsonl", where, f"it holds {kind_of(made)} where an object is expected")
        there = {key for key, _ in made}
        yield (
            where,
            [
                None if column in optional and column not in there else _clean(_only(path, where, made, column))
                for column in columns
            ],
        )


class IntegerText(str):
    """An integer of a JSON file in the digits it was written with."""


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys as they came, repeated ones included."""


_DECODER = json.JSONDecoder(object_pairs_hook=_Pairs, parse_int=IntegerText)


def _json_objects(path: Path) -> Iterator[tuple[str, Any]]:
    lines = _lines(path)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        text = first[1] + "".join(line for _, line in lines)
        rows = _decoded(path, text, f"from line {first[0]}")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    yield f"line {first[0]}", _decoded(path, first[1], f"line {first[0]}")
    for number, line in lines:
        if line.strip():
            yield f"line {number}", _decoded(path, line, f"line {number}")


def _decoded(path: Path, text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text.strip(" \t\r\n"))
    except RecursionError:
        raise _unreadable(path, "jsonl", where, "it is nested too deeply") from None
    except json.JSONDecodeError as error:
        # `error.msg` comes from a fixed list; the text around it is not repeated.
        raise _unreadable(path, "jsonl", where, f"{error.msg} at character {error.pos + 1}") from None


def _only(path: Path, where: str, made: _Pairs, column: str) -> Any:
    found = [value for key, value in made if key == column]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{path}, {where}, holds `{column}` {len(found)} times.",
            code="data-column-twice",
            why="only one of them could be read, and nothing says which",
            fix="keep one of them",
        )
    raise no_column(path, column, [key for key, _ in made], where)


def _clean(value: Any) -> Any:
    if isinstance(value, _Pairs):  # not a list, whose first item might be taken for what was meant
        return {key: _clean(item) for key, item in value}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, str) and not isinstance(value, IntegerText):
        return _SURROGATES.sub("\ufffd", value)
    return value


def csv_rows(path: Path, columns: Sequence[str], separator: str, optional: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of a file with a header line; every field is text.

    Raises:
        DataError: a column is missing or named twice, a row has more or fewer fields than the header, quotes do not
            close, a quoted field between tabs holds what may be rows, or the file is not UTF-8.
    """
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader((line for _, line in _lines(path)), delimiter=separator, strict=True)
    numbered = _numbered(path, rows)
    _, header = next(numbered, ("", []))
    absent = set(optional) - set(header)
    places = [None if column in absent else _place(path, header, column) for column in columns]
    for where, fields in numbered:
        if len(fields) != len(header):
            raise DataError(
                f"{path}, {where}, has {len(fields)} fields, and the header has {len(header)}.",
                code="data-columns-shifted",
                why="a field could be taken for its neighbour's column",
                fix="put fields that hold the separator in double quotes, and end no line with a separator",
            )
        if separator == "\t" and any("\t" in field and "\n" in field for field in fields):
            raise DataError(
                f"{path}, {where}: a quoted field holds both a tab and a line end.",
                code="data-rows-merged",
                why="in files with tabs a quote is often a letter like any other: several rows would be read as one",
                fix="double the quotes that are letters and put the field in quotes, or write the file as jsonl",
            )
        yield where, [None if place is None else fields[place] for place in places]


def _numbered(path: Path, rows: Any) -> Iterator[tuple[str, list[str]]]:
    while True:
        before = rows.line_num + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            raise _unreadable(path, "csv", f"line {before}", _csv_reason(error)) from None
        if fields is None:
            return
        if fields:  # an empty line
            yield f"line {before}", fields


def _csv_reason(error: csv.Error) -> str:
    """The csv module's messages may quote the character that it did not expect."""
    text = str(error)
    if "expected after" in text:
        return "text follows a closing quote"
    return "a quote is not closed" if "end of data" in text else "its line ends or quotes are malformed"


def _place(path: Path, header: list[str], column: str) -> int:
    if header.count(column) == 1:
        return header.index(column)
    if column in header:
        raise DataError(
            f"The header of {path} names `{column}` {header.count(column)} times.",
            code="data-column-twice",
            fix="rename one of them",
        )
    near = difflib.get_close_matches(column.lower(), [name.strip().lower() for name in header], n=1, cutoff=0.8)
    hint = f"; `{near[0]}` is there, perhaps in other case or with spaces" if near else ""
    others = [mark for mark in ";\t|," if column in [name.strip() for part in header for name in part.split(mark)]]
    raise DataError(
        f"{path} has no column `{column}`: its first line names {len(header)} columns, none of them that{hint}.",
        code="data-no-column",
        fix="separate columns by commas (tabs in a .tsv file)"
        if others
        else f"{_NAMED}; a file without a header needs one",
    )


def parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of a Parquet file; of its columns only the named ones are read.

    Raises:
        DataError: a column is missing or there twice, or the file is damaged.
    """
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            here = _present(path, file.schema_arrow.names, columns, optional)
            batches = file.iter_batches(columns=list(dict.fromkeys(here)))
            yield from _numbered_rows(batches, columns, here)
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # their messages may quote a value
        reason = f"it is damaged, or of another format ({type(error).__name__})"
        raise _unreadable(path, "parquet", None, reason) from None


def saved_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of a folder that ``Dataset.save_to_disk`` of Hugging Face's datasets wrote.

    Raises:
        DataError: it is no such folder, holds several splits or chosen rows, or lacks a column.
    """
    import pyarrow

    if (path / "dataset_dict.json").is_file():
        raise DataError(
            f"{path} holds several splits.",
            code="data-splits",
            fix="name the folder of one of them, such as its `train`",
        )
    try:
        state = json.loads((path / "state.json").read_bytes())
        files = [path / str(entry["filename"]) for entry in state["_data_files"]]
        chosen = state.get("_indices_files") or state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} is a folder, and not one that `datasets` saved to disk.",
            code="data-format",
            fix="name files, or a folder that Dataset.save_to_disk wrote",
        ) from None
    if chosen:
        raise DataError(
            f"{path} names a choice of its rows, not the rows themselves.",
            code="data-splits",
            fix="save it again after Dataset.flatten_indices()",
        )
    number = 0
    for file in files:
        try:
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
                here = _present(path, stream.schema.names, columns, optional)
                for where, values in _numbered_rows(stream, columns, here, number):
                    number += 1
                    yield where, values
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(file, "arrow", None, f"it is damaged ({type(error).__name__})") from None


def _present(path: Path, names: Sequence[str], columns: Sequence[str], optional: Sequence[str]) -> list[str]:
    """The columns that are there, all but optional ones."""
    for column in columns:
        if names.count(column) > 1:
            raise DataError(
                f"{path} has {names.count(column)} columns `{column}`.",
                code="data-column-twice",
                fix="rename one of them",
            )
        if column not in names and column not in optional:
            raise no_column(path, column, names)
    return [column for column in columns if column in names]


def _numbered_rows(
    batches: Iterable[Any], columns: Sequence[str], here: Sequence[str], before: int = 0
) -> Iterator[Row]:
    number = before
    for batch in batches:
        read = [batch.column(name).to_pylist() if name in here else [None] * len(batch) for name in columns]
        for values in zip(*read, strict=True):
            number += 1
            yield f"row {number}", list(values)


def plain_text(path: Path) -> str:
    """The whole of a UTF-8 file, without a byte-order mark, CR LF read as LF. No other character ends a line."""
    return "".join(line for _, line in _lines(path)).replace("\r\n", "\n")


def check_unpacked(path: Path) -> None:
    """Nothing compressed is read: what its bytes are taken for would be an error far from the cause.

    Raises:
        DataError: the file begins as those of a compressing program do.
    """
    if not path.is_file():  # a folder, or a pipe, whose first bytes would be gone
        return
    try:
        with path.open("rb") as file:
            packed = _PACKED.match(file.read(16))
    except OSError:  # said where it is read
        return
    if packed:
        raise DataError(
            f"{path} is compressed ({packed.lastgroup}), and is read as it is.",
            code="data-format",
            fix="unpack it first; parquet is compressed inside and read in pieces",
        )


def _check_no_zero(path: Path, number: int, line: bytes) -> None:
    """ASCII in UTF-16 is valid UTF-8, with a zero byte beside every letter."""
    at = line.find(b"\0")
    if at >= 0:
        raise DataError(
            f"{path} holds a zero byte (line {number}, byte {at + 1}).",
            code="data-encoding",
            why="it is UTF-16 or no text at all; read as UTF-8, every letter would be trained with a zero beside it",
            fix="convert it, for example with `iconv -f utf-16 -t utf-8`",
        )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, ended by LF alone, as they are, less a byte-order mark."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_without_mark(file), 1):
                _check_no_zero(path, number, line)
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} is not UTF-8 text (line {number}, byte {error.start + 1}).",
                        code="data-encoding",
                        fix="convert it, for example with `iconv -t utf-8`",
                    ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or type(error).__name__}.",
            code="data-unreadable",
            fix="check the file's permissions and the disk",
        ) from None


def _without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        yield line.removeprefix(_BOM) if number == 0 else line


def no_column(path: Path, column: str, names: Sequence[str], where: str | None = None) -> DataError:
    """A column that is not there, with the names that are: of a schema or of JSON keys, so never a row's values."""
    shown = ", ".join(sorted(set(names))[:20]) or "none"
    return DataError(
        f"{path}{f', {where},' if where else ''} has no column `{column}`; its columns are: {shown}.",
        code="data-no-column",
        fix=_NAMED,
    )


def kind_of(value: Any) -> str:
    """A value's kind in words, for errors that must not repeat the value."""
    names = {IntegerText: "a number", int: "a number", float: "a number", bool: "true or false", _Pairs: "an object",
             list: "a list", dict: "an object", str: "text", bytes: "bytes", type(None): "nothing"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _unreadable(path: Path, kind: str, where: str | None, reason: str) -> DataError:
    return DataError(
        f"{path}{f', {where},' if where else ''} cannot be read as {kind}: {reason}.",
        code="data-unreadable",
        fix="open it and look at that place; set data.format when the suffix misleads",
    )
