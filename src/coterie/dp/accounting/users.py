"""Whose record is whose: ids of users, compared by one stated value whatever type they come as.

The value is the id's text as it would be written in a file: 7, numpy's 7, a tensor of 7, 7.0, "7" and b"7" are one
user, and so is "7.0", which many programs write to CSV for a whole number in a column with gaps. Other text counts as
it is written, spaces and case included, in one Unicode form: an accented letter may be one character or two. An id
that is missing is refused in every form; so is one whose text could differ between two copies, such as a number with
a fraction.
"""

from __future__ import annotations

import decimal
import math
import numbers
import re
import unicodedata
import uuid
from collections.abc import Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AnySet
from typing import Any

import numpy as np
import torch

from coterie.errors import DataError

_EXACT = 2.0**53
"""Whole numbers above it lose digits as floating-point numbers."""

_MISSING_WORDS = {"", "nan", "none", "null", "<na>", "nat", "na", "n/a", "#n/a", "\\n"}
"""What Python, numpy, pandas, JSON, R, spreadsheets and databases write for a missing value, in lower case."""

_WHOLE = re.compile(r"(-?[0-9]+)\.0+")

_MISSING_TYPES = {"NAType", "NaTType"}


def user_ids(users: Iterable[Any]) -> list[str]:
    """The stated value of each record's user.

    Args:
        users: one id a record: text, bytes, whole numbers, UUIDs, tuples of these, numpy or pandas values, tensors or
            arrays of one value.

    Raises:
        DataError: an id is missing or has no one stated value; the message names the record's index, not the id. Or
            they come without an order or a number, as a mapping, a set or a generator.
    """
    if isinstance(users, Mapping | AnySet) or not hasattr(users, "__len__"):
        raise DataError(
            f"users are given as a {type(users).__name__}, not one after the other.",
            code="dp-users",
            why="nobody could say which record is whose",
            fix="give a list with the user of each record, in the order of the records",
        )
    return [_named(index, value) for index, value in enumerate(_values(users))]


def check_one_naming(column: str | None, users: Any) -> None:
    """Refuse users that are named twice.

    Raises:
        DataError: by a column and by a list.
    """
    if column is not None and users is not None:
        raise DataError(
            f"users are named by the column `{column}` and by a list.",
            code="dp-users",
            why="the two may say that other records belong together, and only one of them could hold",
            fix="pass user_column or users, not both",
        )


def user_column(dataset: Any, column: str) -> Sequence[Hashable]:
    """The user of each record, as the column holds it; see `user_ids`.

    Columns of a `datasets.Dataset` are read without its format, which would round large numbers.

    Raises:
        DataError: the records have no such column.
    """
    if column in (getattr(dataset, "column_names", None) or ()):
        stored = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
        return list(stored[column])
    try:
        return [dataset[i][column] for i in range(len(dataset))]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"the records have no column `{column}`.",
            code="dp-user-column",
            why="without it nobody knows which records belong to the same user",
            fix="name the column that holds the user, or use record as the unit",
        ) from error


def _values(users: Iterable[Any]) -> Iterable[Any]:
    if isinstance(users, torch.Tensor):
        return users.detach().cpu()
    return users


def _named(index: int, value: Any) -> str:
    text = user_text(value)
    if text == "":
        raise DataError(
            f"record {index} names no user.",
            code="dp-no-user",
            why="a record without a user would belong to nobody's privacy unit",
            fix="fill the user column, or use record as the unit",
        )
    if text is None:
        raise DataError(
            f"record {index} names its user by a {type(value).__name__} that has no one text.",
            code="dp-user-id",
            why="ids are compared by their text, and a user whose id is written in two ways would be two users",
            fix="give ids as text or whole numbers",
        )
    return text


def user_text(value: Any) -> str | None:
    """The stated value of one id; empty where it is missing, None where there is not exactly one text for it."""
    if isinstance(value, torch.Tensor):
        value = _one(value.detach().cpu().reshape(-1).tolist())
    elif isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "mM":
            return "" if np.isnat(value).all() else None
        value = _one(np.asarray(value).reshape(-1).tolist())
    if isinstance(value, list | tuple):
        return user_text(value[0]) if len(value) == 1 else _compound(value)
    if value is None or type(value).__name__ in _MISSING_TYPES:
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, str):
        value = unicodedata.normalize("NFC", str.__str__(value))  # enumerations of text print as something else
        whole = _WHOLE.fullmatch(value)
        number = whole[1] if whole else value
        return "" if value.strip().lower() in _MISSING_WORDS else "0" if number == "-0" else number
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real | decimal.Decimal):
        return None
    if isinstance(value, numbers.Integral):
        return str(int(value))
    number = float(value)
    if math.isnan(number):
        return ""
    return str(int(number)) if number.is_integer() and abs(number) <= _EXACT else None


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _compound(parts: Sequence[Any]) -> str | None:
    texts = [user_text(part) for part in parts]
    if "" in texts or not texts:
        return ""
    return None if None in texts else repr(tuple(texts))
