"""Constant work: every physical batch has the same shape, and every round the same number of them.

How long a round takes otherwise tells the size of its lot. Rows that are added count for nothing: the engine gives
their gradients the factor zero, whatever the loss makes of them (a balance term is not zero), so the sums stay what
they were.

Shape letters: B records, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coterie.dp.losses import IGNORED
from coterie.dp.per_sample.engine import Engine
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
    """Gives every batch of a lot one shape, and every round the same number of them.

    Args:
        rows: records in every physical batch; 1 with `isolation: exact`.
        tokens: length of every row.
        largest_lot: most records of a lot that are computed here.
        pad_id: token that fills up.
        device: where the model computes.

    Attributes:
        batches: physical batches filled up in this round; set to 0 when one begins.
    """

    def __init__(self, rows: int, tokens: int, largest_lot: int, pad_id: int, device: torch.device) -> None:
        self._rows, self._tokens, self._pad_id, self._device = rows, tokens, pad_id, device
        self._each_round = math.ceil(largest_lot / rows)
        self.batches = 0

    def fill(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The batch in the one shape; rows behind its own count for nothing if the engine is told how many it has."""
        self.batches += 1
        return self._filled(batch)

    def fill_up(self, engine: Engine) -> None:
        """Compute the batches that this round's lot did not need, and forget them."""
        nothing = torch.empty(0, 0, dtype=torch.int64, device=self._device)
        empty = dict.fromkeys(("input_ids", "attention_mask", "labels"), nothing)
        for _ in range(self._each_round - self.batches):
            engine.accumulate(self._filled(empty), counted=0)
        engine.take()

    def _filled(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rows [B, T]: short ones lengthened behind their mask, missing ones made of `pad_id` without labels."""
        rows = self._rows - batch["input_ids"].shape[0]
        tokens = self._tokens - batch["input_ids"].shape[1]
        longer = {"input_ids": self._pad_id, "attention_mask": 0, "labels": IGNORED}
        more = {"input_ids": self._pad_id, "attention_mask": 1, "labels": IGNORED}
        long = {name: functional.pad(batch[name], (0, tokens), value=filler) for name, filler in longer.items()}
        return {name: functional.pad(value, (0, 0, 0, rows), value=more[name]) for name, value in long.items()}
