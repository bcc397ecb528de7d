"""A lot's physical batches: which records are computed at once, and with whose randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coterie.dp.accounting.lots import Lot
from coterie.dp.balance import Balancer
from coterie.dp.per_sample.gradient_groups import Diagnostics
from coterie.dp.per_sample.probe import synthetic_batch
from coterie.dp.private_data import PrivateData
from coterie.dp.sum_engine import ConstantShape, SumEngine


class LotBatches:
    """Runs lots through an engine, batch by batch.

    Args:
        model: what is trained.
        data: the records.
        engine: adds up clipped gradients.
        balancer: sees the loads of each record; None without balance.
        at_once: records in a physical batch.
        alone: every unit draws what it would draw in whatever company (`isolation: exact`).
        shape: fills every batch up to one shape; None: batches are as the collator makes them.
    """

    def __init__(
        self,
        model: nn.Module,
        data: PrivateData,
        engine: SumEngine,
        balancer: Balancer | None,
        at_once: int,
        alone: bool,
        shape: ConstantShape | None,
    ) -> None:
        self.data = data
        self._model = model
        self._engine, self._balancer, self._shape = engine, balancer, shape
        self._at_once, self._alone = at_once, alone

    def count(self, lot: Lot) -> int:
        """How many physical batches a lot has, where units are no users."""
        return -(-lot.num_units // self._at_once)

    def run(
        self, lot: Lot, device: torch.device, key: int, loads: list[Tensor], at_least: int = 0
    ) -> Iterator[Diagnostics]:
        """Run the physical batches of a lot, one unit at a time where units are users.

        Args:
            lot: may be empty.
            device: of the model.
            key: of the lot's randomness.
            loads: takes the loads of each batch's records, [B, S], where there is a balancer.
            at_least: so many batches are run, the last ones without a record, because other ranks run as many.
        """
        if self.data.units.starts is None:
            for records, _ in lot.physical_batches(self._at_once):
                self._own_randomness(key, records)
                diagnostics = self._batch_sums(self.data.batch(records, device), len(records))
                loads += self._loads(~diagnostics.masked)
                yield diagnostics
            for _ in range(self.count(lot), at_least):
                made_up = self._made_up(device)
                self._engine.accumulate(made_up if self._shape is None else self._shape.fill(made_up), counted=0)
            return
        for unit in range(lot.num_units):
            own = lot.records[lot.units == unit]
            self._own_randomness(key, own)
            yield self._engine.accumulate_user(self._user_batches(own, device, loads))

    def _made_up(self, device: torch.device) -> dict[str, Any]:
        """A batch of one record that nobody has; keys, shapes and types are those of the first one's."""
        like = self.data.batch(np.zeros(1, np.int64), device)
        ids = like.get("input_ids")
        tokens = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim > 1 else 1
        return synthetic_batch(self._model, like, 1, tokens)

    def _batch_sums(self, batch: dict[str, Any], records: int) -> Diagnostics:
        """Figures of a batch's records, whatever else it was filled up with."""
        if self._shape is None:
            return self._engine.accumulate(batch)
        return self._engine.accumulate(self._shape.fill(batch), counted=records).first(records)

    def _own_randomness(self, key: int, records: np.ndarray) -> None:
        """With `isolation: exact`, let torch draw next what this unit draws in whatever company."""
        if self._alone:
            digest = hashlib.sha256(f"{key}|{records.min()}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "little"))

    def _user_batches(
        self, records: np.ndarray, device: torch.device, loads: list[Tensor]
    ) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(records), self._at_once):
            yield self.data.batch(records[start : start + self._at_once], device)
            loads += self._loads(None)

    def _loads(self, keep: Tensor | None) -> list[Tensor]:
        if self._balancer is None or self._balancer.latest is None:
            return []
        latest = self._balancer.latest
        if keep is None:
            return [latest]
        # In constant-work mode the model saw rows behind the records that only filled up the batch.
        return [torch.where(keep[:, None], latest[: keep.shape[0]], 0.0)]
