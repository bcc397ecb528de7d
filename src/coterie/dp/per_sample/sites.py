"""Which dimension of a tensor holds the records, learnt from probe passes instead of read off a batch's shapes.

A run's own sizes cannot tell: with 16 records, the 16 rows of a router look like one row of each. Probe passes that
differ in nothing but their number of records can: what grows in exact proportion is the records' dimension, what
stays is not, and anything else is not understood.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

Size = tuple[int, int]
"""(records, tokens) of a probe pass."""
Key = tuple[str, str, bool]
"""(parameter, operation, whether in a recompute of the backward)."""
Shapes = tuple[tuple[int, ...], ...]
"""Of all tensors of one call, in order."""


class Meaning(NamedTuple):
    """What a tensor has to do with records.

    Attributes:
        dim: its dimension that holds them, record by record; negative for `CONSTANT` and `UNKNOWN`.
        exact: the dimension is the records; otherwise it is records times rows.
    """

    dim: int
    exact: bool


CONSTANT = Meaning(-1, True)
"""No dimension depends on the number of records."""
UNKNOWN = Meaning(-2, False)
"""Several dimensions do, or one that is not proportional to it."""


def supposed(shape: Sequence[int], records: int) -> Meaning:
    """The meaning if ``records`` divides no number but its own multiples, as it should in a probe pass."""
    if records in shape:
        return Meaning(list(shape).index(records), True)
    return next((Meaning(i, False) for i, size in enumerate(shape) if size and size % records == 0), CONSTANT)


@dataclass(frozen=True)
class _ModuleCall:
    """One use: the meaning of every tensor, and the sizes that were the same in all probe passes."""

    meanings: tuple[Meaning, ...]
    fixed: tuple[tuple[int | None, ...], ...]

    def fits(self, shapes: Shapes) -> bool:
        """Whether sizes that never changed are still the same."""
        if [len(shape) for shape in shapes] != [len(fixed) for fixed in self.fixed]:
            return False
        pairs = zip(chain(*shapes), chain(*self.fixed), strict=True)
        return all(fixed is None or size == fixed for size, fixed in pairs)


@dataclass(frozen=True)
class _Site:
    """All calls of one operation on one parameter.

    Attributes:
        always: the meanings that every call has, if they are the same.
        calls: in order; none if the passes differ in how many there are.
    """

    always: tuple[Meaning, ...] | None
    calls: tuple[_ModuleCall, ...]


class Sites:
    """What was learnt of every operation on every parameter of one model in one mode.

    Args:
        sizes: of the three probe passes: the second has other records than the first, the third other tokens than
            the second.

    Attributes:
        lowered: an operation computed in lower precision under autocast.
    """

    def __init__(self, sizes: tuple[Size, Size, Size]) -> None:
        self.sizes = sizes
        self.lowered = False
        self._seen: dict[Key, dict[Size, list[Shapes]]] = defaultdict(dict)
        self._learnt: dict[Key, _Site] = {}

    def note(self, key: Key, size: Size, shapes: Shapes) -> None:
        """A call seen in a probe pass."""
        self._seen[key].setdefault(size, []).append(shapes)

    def settle(self) -> Key | None:
        """Learn from what was noted. The first key for which a probe pass went by a wrong supposition, if any."""
        wrong = None
        for key, by_size in self._seen.items():
            passes = [by_size.get(size, []) for size in self.sizes]
            columns = list(zip(*passes, strict=False))
            calls = tuple(self._call(column) for column in columns)
            if any(self._misled(column, call) for column, call in zip(columns, calls, strict=True)):
                wrong = wrong or key
            distinct = {call.meanings for call in calls}
            same_count = len({len(each) for each in passes}) == 1
            always = distinct.pop() if len(distinct) == 1 else None
            self._learnt[key] = _Site(always, calls if same_count else ())
        self._seen.clear()
        return wrong

    def meanings(self, key: Key, call: int, shapes: Shapes) -> tuple[Meaning, ...] | None:
        """Of the tensors of a call; None if the probes never saw it, or disagree about it.

        A recompute that the probes did not make is taken for one of the forward's calls.

        Args:
            key: of the operation.
            call: its number among the pass's calls of this key.
            shapes: of the tensors. They decide only between meanings that were learnt.
        """
        site = self._learnt.get(key)
        if site is None:
            return self.meanings((*key[:2], False), -1, shapes) if key[2] else None
        if site.always is not None:
            return site.always if len(site.always) == len(shapes) else None
        if 0 <= call < len(site.calls) and site.calls[call].fits(shapes):
            return site.calls[call].meanings
        fitting = {each.meanings for each in site.calls if each.fits(shapes)}
        return fitting.pop() if len(fitting) == 1 else None

    def _call(self, column: tuple[Shapes, ...]) -> _ModuleCall:
        if len({tuple(len(shape) for shape in shapes) for shapes in column}) != 1:
            return _ModuleCall(tuple(UNKNOWN for _ in column[0]), tuple((None,) * len(shape) for shape in column[0]))
        tensors = list(zip(*column, strict=True))
        fixed = [
            tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*each, strict=True)) for each in tensors
        ]
        return _ModuleCall(tuple(self._meaning(each) for each in tensors), tuple(fixed))

    def _meaning(self, shapes: tuple[tuple[int, ...], ...]) -> Meaning:
        (first, _), (second, _), _ = self.sizes
        meaning = CONSTANT
        for dim, (a, b, c) in enumerate(zip(*shapes, strict=True)):
            if a == b:
                continue
            if meaning is not CONSTANT or a * second != b * first or c % second:
                return UNKNOWN
            meaning = Meaning(dim, (a, b, c) == (first, second, second))
        return meaning

    def _misled(self, column: tuple[Shapes, ...], call: _ModuleCall) -> bool:
        return any(
            meaning != UNKNOWN and supposed(shape, records) != meaning
            for (records, _), shapes in zip(self.sizes, column, strict=True)
            for shape, meaning in zip(shapes, call.meanings, strict=False)
        )
