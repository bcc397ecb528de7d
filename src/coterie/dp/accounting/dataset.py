"""A dataset as private training sees it: records, their number, and a digest that names it without its text."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from coterie.errors import DataError

_SEPARATOR = b"\x1f"

_REREAD = 16
"""Records read again from all over the dataset, and as many of the largest."""


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

    Raises:
        DataError: a record is another one when it is read again, has no content, or is not there.

    Cost: one pass over the dataset, about 20 us a record, and a few records twice.
    """
    length = checked_length(dataset)
    digests, sizes = [], np.zeros(length, np.int64)
    for index in range(length):
        record = read_record(dataset, index)
        digests.append(record_digest(record))
        sizes[index] = _size(record)
    _check_rereads(dataset, digests, sizes)
    total = hashlib.sha256(b"coterie dataset 1")
    for digest in sorted(digests):
        total.update(digest)
    return total.hexdigest()


def ordered_digest(dataset: Any) -> str:
    """SHA-256 of the records' content in their order: which record has which number."""
    total = hashlib.sha256(b"coterie records in order 1")
    for index in range(checked_length(dataset)):
        total.update(record_digest(read_record(dataset, index)))
    return total.hexdigest()


def read_record(dataset: Any, index: int) -> Any:
    """One record.

    Raises:
        DataError: the dataset has fewer records than it said.
    """
    try:
        return dataset[index]
    except IndexError:
        raise _other_size(f"record {index} is not there") from None


def check_length(dataset: Any, records: int) -> None:
    """Hold a dataset to the number of records that the run was set up with.

    Raises:
        DataError: it has grown or shrunk.
    """
    if len(dataset) != records:
        raise _other_size(f"it had {records} records and now has {len(dataset)}")


def _other_size(what: str) -> DataError:
    return DataError(
        f"the dataset changed after it was looked at: {what}.",
        code="dp-dataset-size",
        why="the number of records decides the sampling rate, and with it epsilon",
        fix="train on a dataset that stays as it is; start a new run for another one",
    )


def _check_rereads(dataset: Any, digests: Sequence[bytes], sizes: np.ndarray) -> None:
    """Read some records again under other random numbers: over the whole dataset, and the largest, which are cropped.

    Raises:
        DataError: a record is not what it was.
    """
    spread = np.linspace(0, len(digests) - 1, min(_REREAD, len(digests)), dtype=np.int64)
    largest = np.argsort(-sizes, kind="stable")[:_REREAD]
    with _other_randomness():
        for index in sorted({*spread.tolist(), *largest.tolist()}):
            if record_digest(read_record(dataset, index)) != digests[index]:
                raise DataError(
                    f"record {index} differs each time it is read.",
                    code="dp-record-changes",
                    why="the ledger is kept for the records' content, so two runs on the same text would get two "
                    "ledgers and their costs would not be added up",
                    fix="crop, mask and augment in the collate_fn, or name the underlying data: digest=...",
                )
    check_length(dataset, len(digests))


@contextmanager
def _other_randomness() -> Iterator[None]:
    """Python's, numpy's and torch's global random states moved on, and put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            seed = secrets.randbits(31)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _size(record: Any) -> int:
    """How much a record holds, roughly: values of its largest part."""
    parts = record.values() if isinstance(record, Mapping) else [record]
    return max((part.numel() if isinstance(part, torch.Tensor) else _len(part) for part in parts), default=0)


def _len(part: Any) -> int:
    return len(part) if hasattr(part, "__len__") else 1


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
