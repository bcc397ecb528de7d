"""Constant work: every physical batch has the same shape, and every round the same number of them.

How long a round takes otherwise tells the size of its lot. Rows that are added count for nothing: the engine gives
their gradients the factor zero, whatever the loss makes of them (a balance term is not zero), so the sums stay what
they were.

Shape letters: B records, T tokens, G gradient groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coterie.dp.clipping import Clipping
from coterie.dp.engine import Diagnostics, Engine
from coterie.dp.isolation import ExactEngine
from coterie.dp.losses import IGNORED
from coterie.errors import ConfigError


def no_whole_users() -> ConfigError:
    """Why constant work and `unit: user` exclude each other."""
    return ConfigError(
        "`push_after_s` needs `privacy.unit: record`.",
        code="config-constant-work",
        why="how many batches a user's records take would still show in the time",
        fix="leave out `push_after_s`, or protect single records",
    )


class ConstantWork:
    """A `SumEngine` whose every call costs the same.

    Args:
        engine: does the work.
        rows: records in every physical batch; 1 with `isolation: exact`.
        tokens: length of every row.
        largest_lot: most records of a lot.
        pad_id: token that fills up.
        device: where the model computes.

    Attributes:
        batches: physical batches computed in this round; set to 0 when one begins.
    """

    def __init__(
        self, engine: Engine, rows: int, tokens: int, largest_lot: int, pad_id: int, device: torch.device
    ) -> None:
        self._engine, self._rows, self._tokens, self._pad_id, self._device = engine, rows, tokens, pad_id, device
        self._each_round = math.ceil(largest_lot / rows)
        self.batches = 0

    @property
    def groups(self) -> list[str]:
        return self._engine.groups

    @property
    def thresholds(self) -> Tensor:
        return self._engine.thresholds

    @thresholds.setter
    def thresholds(self, value: Tensor) -> None:
        self._engine.thresholds = value

    def group_of(self, name: str) -> str:
        return self._engine.group_of(name)

    @property
    def eta(self) -> float:
        return self._engine.eta

    @property
    def clipping(self) -> Clipping:
        return self._engine.clipping

    @property
    def sensitivity(self) -> float:
        return self._engine.sensitivity

    def accumulate(self, batch: Mapping[str, Any]) -> Diagnostics:
        """As `Engine.accumulate`, on a batch filled up to the one shape; figures of the real rows."""
        self.batches += 1
        real = batch["input_ids"].shape[0]
        found = self._engine.accumulate(self._filled(batch), counted=real)
        return Diagnostics(
            found.losses[:real],
            found.norms[:real],
            found.group_norms[:, :real],
            found.within[:, :real],
            found.masked[:real],
        )

    def accumulate_user(self, batches: Any) -> Diagnostics:
        """Never constant work.

        Raises:
            ConfigError: always; set-up refuses it, too.
        """
        raise no_whole_users()

    def use_grid(self, step_of: Callable[[str], float]) -> None:
        """See `coterie.dp.isolation.ExactEngine`."""
        assert isinstance(self._engine, ExactEngine)
        self._engine.use_grid(step_of)

    def take(self) -> dict[str, Tensor]:
        return self._engine.take()

    def fill_up(self) -> None:
        """Compute the batches that this round's lot did not need, and forget them."""
        nothing = torch.empty(0, 0, dtype=torch.int64, device=self._device)
        empty = dict.fromkeys(("input_ids", "attention_mask", "labels"), nothing)
        for _ in range(self._each_round - self.batches):
            self._engine.accumulate(self._filled(empty), counted=0)
        self._engine.take()

    def _filled(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rows [B, T]: short ones lengthened behind their mask, missing ones made of `pad_id` without labels."""
        rows = self._rows - batch["input_ids"].shape[0]
        tokens = self._tokens - batch["input_ids"].shape[1]
        longer = {"input_ids": self._pad_id, "attention_mask": 0, "labels": IGNORED}
        more = {"input_ids": self._pad_id, "attention_mask": 1, "labels": IGNORED}
        long = {name: functional.pad(batch[name], (0, tokens), value=filler) for name, filler in longer.items()}
        return {name: functional.pad(value, (0, 0, 0, rows), value=more[name]) for name, value in long.items()}
