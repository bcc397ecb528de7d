"""Pushes of text that the adversary has: what it learns its attacks on, with the defence in place.

Shape letters as in `coterie.audit.experts.reader`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.audit.experts.opened import ExpertSum, Opened
from coterie.audit.experts.reader import LayerRows, Reader

_AT_ONCE = 32
"""Texts in one pass."""


@dataclass(frozen=True)
class SimulatedRows:
    """Rows of some records of one length, layer by layer.

    Attributes:
        records_B: which records of the list they were made of.
        length: tokens of each; token n of a layer's rows is of record ``n // length``.
        layers: see `LayerRows`.
    """

    records_B: list[int]
    length: int
    layers: list[LayerRows]


def by_length(records: Sequence[Sequence[int]], at_once: int = _AT_ONCE) -> Iterator[tuple[list[int], Tensor]]:
    """Positions in the list and token ids [B, T] of records of one length, in groups."""
    of_length: dict[int, list[int]] = {}
    for number, record in enumerate(records):
        of_length.setdefault(len(record), []).append(number)
    for length in sorted(of_length):
        numbers = of_length[length]
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            yield some, torch.tensor([list(records[number]) for number in some])


def rows_of(reader: Reader, records: Sequence[Sequence[int]]) -> Iterator[SimulatedRows]:
    """The rows of every record of at least two tokens."""
    for numbers, ids_BT in by_length(records):
        if ids_BT.shape[1] > 1:
            yield SimulatedRows(numbers, ids_BT.shape[1], reader.rows(ids_BT))


def summed(
    rows: Iterable[SimulatedRows],
    visible: Collection[tuple[int, int]],
    factors: Tensor | None = None,
    noise: float = 0.0,
    rounding: float = 0.0,
    generator: torch.Generator | None = None,
) -> Opened:
    """The push that rows add up to.

    Args:
        rows: of all records in it.
        visible: (layer, expert) whose sums the adversary opens.
        factors: [records], of each record (clipping, the mean over its tokens); default 1.
        noise: standard deviation of what is added to each value.
        rounding: see `Spectrum`; nothing is rounded here.
        generator: of the noise.
    """
    first: dict[tuple[int, int], Tensor] = {}
    second: dict[tuple[int, int], Tensor] = {}
    for some in rows:
        for layer, each in enumerate(some.layers):
            scale_R = None
            if factors is not None:
                scale_R = factors[torch.tensor(some.records_B)[each.token_R // some.length]].unsqueeze(1)
            for expert in sorted({e for at, e in visible if at == layer}):
                of = each.expert_R == expert
                before, after = each.before_RG[of], each.after_RD[of]
                if scale_R is not None:
                    before, after = before * scale_R[of], after * scale_R[of]
                key = layer, expert
                first[key] = first.get(key, 0.0) + each.hidden_RD[of].T @ before
                second[key] = second.get(key, 0.0) + each.inner_RF[of].T @ after
    if noise:
        for sums in (first, second):
            for value in sums.values():
                value += noise * torch.randn(value.shape, generator=generator)
    experts = {key: ExpertSum(first[key], second[key], noise, rounding) for key in first}
    return Opened(experts, {}, noise)
