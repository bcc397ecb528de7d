"""Records that are padded to the longest beside them, for the self-check: padding must not change what they compute.

A mean over the padded length, or positions counted from padding on the left, make a record's gradient depend on how
long the records beside it are. Two records of one length never show that.

Shape letters: B records (2: a full one and a short one), T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from coterie.dp.losses import IGNORED, Batch
from coterie.dp.probe import vocabulary_of
from coterie.dp.refusals import check_rows

Pair = tuple[Batch, Batch]
"""A full record with a short one padded beside it, and the short one alone."""

_FULL, _SHORT = 11, 6


class CollatedPairs:
    """Pairs as the user's collator makes them, of made-up records with the keys and types of a real item.

    Args:
        model: its config names the vocabulary.
        collate: list of items to a batch.
        item: a record; its values are not used.
    """

    def __init__(self, model: Any, collate: Callable[[list[Any]], Mapping[str, Any]], item: Any) -> None:
        self._vocabulary = vocabulary_of(model)
        self._collate = collate
        self._item = item

    def usable(self) -> bool:
        """Whether made-up records of one length go through the collator.

        Raises:
            PrivacyError: it packs them into one row.
        """
        ids = self._item.get("input_ids") if isinstance(self._item, Mapping) else None
        if not isinstance(ids, list | Tensor) or (isinstance(ids, Tensor) and ids.ndim != 1):
            return False
        return self._collated([_FULL, _FULL], 0) is not None

    def pair(self, seed: int) -> Pair | None:
        """None where the collator takes records of one length only: nothing is ever padded then."""
        beside, alone = self._collated([_FULL, _SHORT], seed), self._collated([_SHORT], seed)
        return None if beside is None or alone is None else (beside, alone)

    def _collated(self, lengths: list[int], seed: int) -> Batch | None:
        try:
            batch = self._collate([self._made(length, seed + length) for length in lengths])
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
            return None
        check_rows(batch, len(lengths))
        return batch

    def _made(self, length: int, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, max(self._vocabulary, 2), (length,), generator=generator)
        whole = len(self._item["input_ids"])
        return {name: _like(name, value, whole, tokens) for name, value in self._item.items()}


def _like(name: str, value: Any, whole: int, tokens: Tensor) -> Any:
    sized = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim == 1)
    if not sized or len(value) != whole:
        return _plain(value)
    if "mask" in name:
        made = torch.ones_like(tokens)
    elif name in ("input_ids", "labels"):
        made = tokens
    elif name == "position_ids":
        made = torch.arange(len(tokens))
    else:
        made = torch.zeros_like(tokens)
    return made.tolist() if isinstance(value, list) else made.to(value.dtype)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.ones_like(value) if value.is_floating_point() else torch.zeros_like(value)
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return value
    return type(value)(isinstance(value, float))


def masked_pair(full: Batch, like: Batch, pad: int) -> Pair | None:
    """The same from a synthetic batch alone: the last record shortened, mask 0 and labels -100 where it is padded.

    Args:
        full: 2 records of T tokens, masks full.
        like: the example batch; the side on which it pads, else the right.
        pad: token of the padding.

    Returns:
        None where the batch has no mask [B, T] to tell padding by.
    """
    mask, example = full.get("attention_mask"), like.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not isinstance(example, Tensor):
        return None
    tokens = mask.shape[1]
    kept = tokens // 2 + 1
    left = bool((example[:, 0] == 0).any())
    beside: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    for name, value in full.items():
        beside[name] = alone[name] = value
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        alone[name] = value[1:]
        if value.ndim < 2 or value.shape[1] != tokens:
            continue
        alone[name] = value[1:, :kept]
        filler = {"labels": IGNORED, "input_ids": pad}.get(name, 0)
        gap = torch.full_like(value[1:, kept:], filler)
        row = torch.cat([gap, alone[name]] if left else [alone[name], gap], 1)
        beside[name] = torch.cat([value[:1], row])
    return beside, alone
