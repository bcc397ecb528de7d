"""A dataset as private training sees it: records, their number, and a digest that names it without its text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from coterie.errors import DataError

_SEPARATOR = b"\x1f"


def checked_length(dataset: Any) -> int:
    """Number of records.

    Raises:
        DataError: the dataset has no length or cannot be indexed, is empty, or is several datasets by name.
    """
    if isinstance(dataset, Mapping):
        raise DataError(
            f"{type(dataset).__name__} is not a dataset but a mapping of {', '.join(map(str, list(dataset)[:4]))}.",
            code="dp-dataset-splits",
            why="nobody says which of its parts are the records to protect",
            fix="pass one of them, for example dataset['train']",
        )
    try:
        length = len(dataset)
        if length:
            dataset[0]
    except (TypeError, KeyError, NotImplementedError):
        length = -1
    if length < 0:
        raise DataError(
            f"{type(dataset).__name__} has no length or cannot be indexed.",
            code="dp-dataset-length",
            why="lots are drawn from all records with a known probability, which a stream does not allow",
            fix="load it into memory or a map-style dataset, for example datasets.Dataset.from_generator",
        )
    if length == 0:
        raise DataError(
            "the dataset has no records.",
            code="dp-no-data",
            why="there is nothing to train on",
            fix="check the files named under data",
        )
    return length


def dataset_digest(dataset: Any) -> str:
    """SHA-256 that names a dataset by its records' content, whatever their order. Stores nothing of them.

    Lists, arrays and tensors of the same integers count as the same; so do mappings in any key order.

    Cost: one pass over the dataset, about 20 us a record.
    """
    digests = sorted(record_digest(dataset[i]) for i in range(checked_length(dataset)))
    total = hashlib.sha256(b"coterie dataset 1")
    for digest in digests:
        total.update(digest)
    return total.hexdigest()


def record_digest(record: Any) -> bytes:
    """32 bytes that stand for one record's content."""
    state = hashlib.sha256()
    _feed(state, record)
    return state.digest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().to(torch.float32 if value.dtype == torch.bfloat16 else value.dtype).numpy()
    if isinstance(value, str):
        _leaf(state, b"s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes):
        _leaf(state, b"b", value)
    elif value is None:
        _leaf(state, b"n", b"")
    elif isinstance(value, Mapping):
        state.update(b"{")
        for key in sorted(value, key=str):
            _leaf(state, b"k", str(key).encode())
            _feed(state, value[key])
        state.update(b"}")
    elif isinstance(value, list | tuple) and not all(isinstance(item, int | float) for item in value):
        state.update(b"[")
        for item in value:
            _feed(state, item)
        state.update(b"]")
    else:
        array = np.asarray(value)
        if array.dtype.kind in "iub":
            array = array.astype(np.int64)
        elif array.dtype.kind == "f":
            array = array.astype(np.float64)
        else:
            raise DataError(
                f"a record holds a {type(value).__name__}, which has no content to name it by.",
                code="dp-record-content",
                why="the privacy ledger is kept for the dataset's content",
                fix="give records as mappings of text, numbers, lists or tensors",
            )
        _leaf(state, array.dtype.kind.encode() + str(array.shape).encode(), np.ascontiguousarray(array).tobytes())


def _leaf(state: Any, tag: bytes, content: bytes) -> None:
    # Length first, so that no two different records feed the same bytes.
    state.update(tag + _SEPARATOR + str(len(content)).encode() + _SEPARATOR)
    state.update(content)
