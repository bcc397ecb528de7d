"""The records of a private run: which of them belong together, what names them, and how they become batches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.dp.accounting.dataset import check_length, checked_length, dataset_digest, read_record
from coterie.dp.accounting.lots import Units
from coterie.dp.accounting.texts import Originals
from coterie.dp.accounting.users import check_one_naming, user_ids
from coterie.dp.accounting.users import user_column as users_of
from coterie.dp.losses import IGNORED
from coterie.dp.refusals import check_rows
from coterie.errors import DataError

Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class PrivateData:
    """What a run trains on.

    Attributes:
        records: by index, with a length.
        collate: list of records to a batch of tensors [B, ...], one row a record.
        units: which records belong together.
        user_column: left out of what collator and model see.
        name: digest that names the records in the ledger; None: their content.
        texts: the documents that the records were made from; None: the records.
    """

    records: Any
    collate: Collate
    units: Units
    user_column: str | None = None
    name: str | None = None
    texts: Originals | None = None

    @classmethod
    def of(
        cls,
        records: Any,
        collate: Collate | None = None,
        *,
        user_column: str | None = None,
        users: Sequence[Hashable] | None = None,
        records_per_user: int | None = None,
        digest: str | None = None,
        originals: Originals | None = None,
    ) -> PrivateData:
        """Count the records, or the users that they belong to.

        Args:
            records: see `PrivateData`.
            collate: default: transformers' ``default_data_collator``.
            user_column: column that names a record's user.
            users: the user of each record, instead.
            records_per_user: most records of one user in a lot; None: every record is its own unit.
            digest: becomes `name`.
            originals: become `texts`.

        Raises:
            DataError: no length, no records, a record without a user.
        """
        count = checked_length(records)
        check_one_naming(user_column, users)
        if user_column is not None:
            users = users_of(records, user_column)
        units = _units(count, users, records_per_user)
        return cls(records, collate or _default_collate, units, user_column, digest, originals)

    @property
    def visible(self) -> Any:
        """The records by index as collator and model may see them: without the user column."""
        return self.records if self.user_column is None else _Without(self.records, self.user_column)

    def digest(self) -> str:
        """What names the records in the ledger."""
        return self.name or dataset_digest(self.records)

    def originals(self) -> Originals:
        """The documents behind the records."""
        return self.texts or Originals(self.records, self.units.owners())

    def check_length(self) -> None:
        """Hold the dataset to the number of records that the run was set up with.

        Raises:
            DataError: it has grown or shrunk.
        """
        check_length(self.records, self.units.records)

    def batch(self, indices: Iterable[int], device: torch.device) -> dict[str, Any]:
        """The records with these numbers, collated, on a device.

        Raises:
            PrivacyError: the collator packs records.
        """
        items = [read_record(self.visible, int(index)) for index in indices]
        collated = self.collate(items)
        check_rows(collated, len(items))
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in collated.items()}
        return {name: with_a_token(name, value) for name, value in batch.items()}


def with_a_token(name: str, value: Any) -> Any:
    """Records without any token, alone in their batch, as beside longer ones: padding. Models fail on no tokens."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] > 0:
        return value
    return value.new_full((value.shape[0], 1), IGNORED if name == "labels" else 0)


class _Without:
    """A dataset whose records lack a column, read as they are needed."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset = dataset
        self._column = column

    def __getitem__(self, index: int) -> Any:
        item = self._dataset[index]
        return {name: item[name] for name in item if name != self._column}


def _units(records: int, users: Sequence[Hashable] | None, cap: int | None) -> Units:
    if users is None or cap is None:
        return Units.of_records(records)
    names = user_ids(users)
    if len(names) != records:
        raise DataError(
            f"{len(names)} users are named for {records} records.",
            code="dp-no-user",
            why="every record must belong to one privacy unit",
            fix="give one user for each record",
        )
    return Units.of_users(names, cap)


def _default_collate(items: list[Any]) -> Mapping[str, Any]:
    from transformers import default_data_collator

    other = next((item for item in items if not isinstance(item, Mapping)), None)
    if other is not None:
        raise DataError(
            f"a record is a {type(other).__name__}, not a mapping of names to values.",
            code="dp-record-mapping",
            why="the default collator does not know what its parts are called",
            fix="give records as dicts, or pass a collate_fn that makes a dict of tensors from a list of records",
        )
    batch: Mapping[str, Any] = default_data_collator(items)
    return batch
