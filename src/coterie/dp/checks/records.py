"""One pass over all records before the first lot: what is wrong with one is said now, not in the round that draws it.

An error in a round tells that its record was drawn, which no noise covers. So every record goes through the collator
once, and what the batches hold is compared with what the model can take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coterie.dp.accounting.dataset import read_record
from coterie.dp.checks.made_up import Side, numbers_of, pad_token, padding_of
from coterie.dp.heads import Head, base_of, head_of, num_classes
from coterie.dp.losses import IGNORED, LossFunction
from coterie.dp.private_data import Collate, PrivateData, with_a_token
from coterie.dp.refusals import check_batch, check_rows
from coterie.errors import CoterieError, DataError

_AT_ONCE = 64


class Extent(NamedTuple):
    """What made-up records have to be like.

    Attributes:
        longest: most tokens of a record; None where there are no token ids.
        padding: where some record is padded before the collator sees it; None where none is.
        numbers: least and largest of the whole numbers that records hold under a name.
    """

    longest: int | None
    padding: Side | None
    numbers: Mapping[str, tuple[int, int]]


def check_records(data: PrivateData, model: nn.Module, loss_fn: LossFunction | None, physical_batch: int) -> Extent:
    """Refuse a data set with a record that cannot be trained on.

    Args:
        data: records and their collator.
        model: tells the vocabulary and the outputs.
        loss_fn: the caller's loss; labels are its business then. None: the default loss.
        physical_batch: records that meet in a batch.

    Returns:
        Lengths and padding of the records.

    Raises:
        DataError: a record that cannot be read or collated, a token or a label outside the model's range, no labels;
            the message names the record's index and no content. Or no record at all that has a label.
        PrivacyError: the collator packs records.

    Cost: the dataset is read and collated once, without the model.
    """
    records = data.units.records
    check = _Check(data.visible, data.collate, model, head_of(model) if loss_fn is None else None)
    with torch.random.fork_rng(devices=[]):
        for indices in _groups(records, physical_batch):
            check.group(indices)
    if check.head is not None and check.labelled == 0:
        raise DataError(
            f"none of the {records} records has a label that counts.",
            code="dp-no-labels",
            why="every gradient would be zero, and noise alone would be trained",
            fix="let the collator set labels other than -100, or pass a loss_fn that needs none",
        )
    return Extent(check.tokens or None, check.padding, check.numbers)


def _groups(records: int, physical_batch: int) -> Iterator[list[int]]:
    """Indices that go through the collator together; the first record is with all of them, where batches hold two."""
    step = min(physical_batch, _AT_ONCE)
    if step == 1:
        yield from ([index] for index in range(records))
        return
    for start in range(0, records, step - 1):
        own = list(range(start, min(start + step - 1, records)))
        yield own if 0 in own else [0, *own]


class _Check:
    def __init__(self, dataset: Any, collate: Collate, model: nn.Module, head: Head | None) -> None:
        self.head = head
        self.labelled = 0
        self.tokens = 0
        self.padding: Side | None = None
        self.numbers: dict[str, tuple[int, int]] = {}
        self._pad = pad_token(base_of(model))
        self._keys: set[str] = set()
        self._dataset = dataset
        self._collate = collate
        self._model = model
        self._tables = _tables(model)
        self._outputs = None if head is None else num_classes(model, head)

    def group(self, indices: list[int]) -> None:
        """Check records together, and one by one where something is wrong."""
        items = [read_record(self._dataset, index) for index in indices]
        self.padding = self.padding or next((side for i in items if (side := padding_of(i, self._pad))), None)
        for name, number in (pair for item in items for pair in numbers_of(item)):
            least, largest = self.numbers.get(name, (number, number))
            self.numbers[name] = min(least, number), max(largest, number)
        if self._problem(items) is None:
            return
        for index, item in zip(indices, items, strict=True):
            problem = self._problem([item])
            if problem is None and index != indices[0]:
                problem = self._problem([items[0], item])
            if problem is not None:
                raise _refusal(index, problem)
        raise DataError(
            f"records {indices[0]} to {indices[-1]} cannot be put into one batch by the collator.",
            code="dp-record",
            why="the round that draws them together would fail, which tells that they were drawn",
            fix="use a collator that pads (transformers.DataCollatorWithPadding), or make all records equally long",
        )

    def _problem(self, items: list[Any]) -> str | None:
        try:
            collated = self._collate(items)
        except CoterieError:
            raise
        except Exception as error:  # whatever a collator of the caller's raises
            return f"does not go through the collator ({type(error).__name__})"
        check_rows(collated, len(items))
        batch = {name: with_a_token(name, value) for name, value in collated.items()}
        check_batch(batch, self._model)
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2:
            self.tokens = max(self.tokens, ids.shape[1])
        if batch.keys() != (self._keys or batch.keys()):
            return "has not the parts that record 0 has"
        self._keys = set(batch)
        return self._labels(batch) or self._inputs(batch)

    def _inputs(self, batch: Mapping[str, Any]) -> str | None:
        for name, size in self._tables.items():
            value = batch.get(name)
            if isinstance(value, Tensor) and not value.is_floating_point() and _outside(value, size):
                return f"has {name} outside the model's {size}"
        return None

    def _labels(self, batch: Mapping[str, Any]) -> str | None:
        if self.head is None:
            return None
        for name in self.head.targets:
            value = batch.get(name)
            if not isinstance(value, Tensor):
                return f"has no `{name}`"
            if value.is_floating_point():
                if not bool(torch.isfinite(value).all()):
                    return f"has {name} that are not finite"
                self.labelled += value.shape[0]
                continue
            counted = value != IGNORED
            size = self._outputs if self.head.kind != "span" else _length(batch)
            if size is not None and _outside(value[counted], size):
                return f"has {name} outside the model's {size} outputs"
            if self.head.kind == "span" and not bool(counted.all()):
                return f"has no {name}"
            if self.head.kind == "next" and value.ndim == 2:
                counted = counted[:, 1:]
            self.labelled += int(counted.sum())
        return None


def _refusal(index: int, problem: str) -> DataError:
    return DataError(
        f"record {index} {problem}.",
        code="dp-record",
        why="the round that draws it would fail, which tells that it was drawn",
        fix="mend or leave out such records before training",
    )


def _outside(values: Tensor, size: int | Tensor) -> bool:
    return bool(((values < 0) | (values >= size)).any())


def _length(batch: Mapping[str, Any]) -> Any:
    """[B], positions of each record that may be an answer."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        last = (mask != 0).long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return last.amax(1)
    ids = batch.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else None


def _tables(model: nn.Module) -> dict[str, int]:
    """Keys of a batch that are looked up in a table of the model, and how many rows it has."""
    base = base_of(model)
    rows_of: dict[str, int] = {}
    try:
        words = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        words = None
    rows = getattr(getattr(words, "weight", None), "shape", (0,))[0]
    if rows:
        rows_of["input_ids"] = rows_of["decoder_input_ids"] = int(rows)
    for name, module in base.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("token_type_embeddings"):
            rows_of["token_type_ids"] = module.num_embeddings
    return rows_of
