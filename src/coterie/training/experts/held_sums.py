"""Where a party's sums lie until they are pushed: in this process, or each at one of the ranks of the party.

Nobody needs all of them at once. Whoever pushes asks for one part, and lets it go before it asks for the next.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from coterie.dp.ownership import Ownership
from coterie.errors import RankError
from coterie.federation.experts.parts import Part
from coterie.models.seam import ExpertLayer
from coterie.models.spread.cuts import Cut
from coterie.models.spread.holdings import Holdings
from coterie.ranks.ranks import Ranks

TRUNK = -1
"""In place of a layer, as in `Part`."""


DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.int64)}
"""What sums are, by the names that ranks tell each other."""


class SumValues(Protocol):
    """Sums of a round, of the experts' stacked parameters and the trunk's."""

    def of(self, part: Part) -> dict[str, Tensor]:
        """Those of one part, by the names and in the shapes that it has. Any thread may ask."""
        ...

    def trunk(self, name: str) -> Tensor:
        """Those of a trunk parameter."""
        ...


class Piece(NamedTuple):
    """A parameter, or what one rank has of it.

    Attributes:
        layer, name: as in `Part`; a trunk parameter is of `TRUNK`.
        start, stop: the experts that it is of; none where the parameter holds something of none.
    """

    layer: int
    name: str
    start: int = 0
    stop: int = 0

    @property
    def experts(self) -> range:
        return range(self.start, self.stop)


class Asked(NamedTuple):
    """Rows of one piece that a rank is asked for.

    Attributes:
        owner: the rank.
        layer, name, start, stop: see `Piece`.
        experts: whose rows; none: all of it.
        size: values.
    """

    owner: int
    layer: int
    name: str
    start: int
    stop: int
    experts: Sequence[int]
    size: int

    @property
    def piece(self) -> Piece:
        return Piece(self.layer, self.name, self.start, self.stop)


class _Place(NamedTuple):
    """Where the sum of a piece lies, and what it is."""

    rank: int
    dtype: torch.dtype
    shape: Sequence[int]


class JoinedSums(ABC):
    """`SumValues` that are put together from pieces.

    Args:
        listed: `HeldSums.listed` of every rank; where several have the same piece, the first is asked.
        cuts: of trunk parameters that hold something of every expert.
    """

    def __init__(self, listed: Iterable[Iterable[Sequence[Any]]], cuts: Mapping[str, Cut]) -> None:
        self.cuts = cuts
        self._at: dict[tuple[int, str], dict[Piece, _Place]] = {}
        for rank, each in enumerate(listed):
            for layer, name, start, stop, dtype, shape in each:
                places = self._at.setdefault((layer, name), {})
                places.setdefault(Piece(layer, name, start, stop), _Place(rank, DTYPES[dtype], shape))

    def of(self, part: Part) -> dict[str, Tensor]:
        """See `SumValues`.

        Raises:
            RankError: a rank is gone, or none has them.
        """
        return self._joined(part.layer, [name for name, _ in part.shapes], part.experts)

    def trunk(self, name: str) -> Tensor:
        return self._joined(TRUNK, [name], ())[name]

    @abstractmethod
    def _bring(self, asked: Sequence[Asked], dtype: torch.dtype) -> Sequence[Tensor]:
        """The values of each, whatever their shape."""

    def _joined(self, layer: int, names: Sequence[str], experts: Sequence[int]) -> dict[str, Tensor]:
        # What one rank has comes in the order in which it was asked for, one rank after the other.
        asked = sorted(
            (each for name in names for each in self._asked(layer, name, experts)), key=lambda each: each.owner
        )
        (dtype,) = {self._at[layer, each.name][each.piece].dtype for each in asked}
        found: dict[str, dict[Piece, Tensor]] = {name: {} for name in names}
        for each, values in zip(asked, self._bring(asked, dtype), strict=True):
            found[each.name][each.piece] = values
        return {name: self._whole(layer, name, len(experts), found[name]) for name in names}

    def _asked(self, layer: int, name: str, experts: Sequence[int]) -> list[Asked]:
        """Rows of some experts, or all of a trunk parameter."""
        cut = self.cuts.get(name) if layer == TRUNK else None
        places = self._at.get((layer, name), {})
        if layer != TRUNK:
            rows = {piece: [expert for expert in experts if expert in piece.experts] for piece in places}
            sizes = {piece: math.prod(place.shape[1:]) for piece, place in places.items()}
            asked = [
                Asked(places[piece].rank, *piece, some, len(some) * sizes[piece])
                for piece, some in rows.items()
                if some
            ]
            whole = sum(map(len, rows.values())) == len(experts)
        else:
            asked = [Asked(place.rank, *piece, (), math.prod(place.shape)) for piece, place in places.items()]
            whole = len(asked) == 1 if cut is None else sum(len(piece.experts) for piece in places) == cut.experts
        if not whole:
            raise RankError(
                f"no rank of this party has the sum of `{name}`.",
                code="ranks-part-gone",
                why="only the bytes that the ledger counted may be used",
                fix="resume the run: what was counted is pushed from the spool",
            )
        return asked

    def _whole(self, layer: int, name: str, experts: int, found: Mapping[Piece, Tensor]) -> Tensor:
        shapes = {piece: tuple(self._at[layer, name][piece].shape) for piece in found}
        if layer != TRUNK:
            rows = [found[piece].reshape(-1, *shapes[piece][1:]) for piece in sorted(found)]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        if len(found) == 1:
            ((piece, values),) = found.items()
            return values.reshape(shapes[piece])
        cut = self.cuts[name]
        whole = next(iter(found.values())).new_empty(cut.shape())
        for piece, values in found.items():
            cut.put(values, piece.experts, whole, range(cut.experts))
        return whole


class HeldSums(JoinedSums):
    """Sums in this process's memory.

    Args:
        values: by piece, each in the shape of its parameter with these experts.
        cuts: see `JoinedSums`.
    """

    def __init__(self, values: Mapping[Piece, Tensor], cuts: Mapping[str, Cut] = MappingProxyType({})) -> None:
        self._values = dict(values)
        super().__init__([_listed(self._values)], cuts)

    def rows(self, piece: Piece, experts: Sequence[int]) -> Tensor:
        """Those of some experts, ascending; of none: all."""
        value = self._values[piece]
        if not experts:
            return value
        first, last = experts[0] - piece.start, experts[-1] - piece.start
        neighbours = last - first == len(experts) - 1  # then they are a view
        return value[first : last + 1] if neighbours else value[[expert - piece.start for expert in experts]]

    def listed(self) -> list[list[Any]]:
        """What there is, as JSON values: a `Piece`, one of `DTYPES`, shape."""
        return _listed(self._values)

    def _bring(self, asked: Sequence[Asked], dtype: torch.dtype) -> Sequence[Tensor]:
        return [self.rows(each.piece, each.experts) for each in asked]


def _listed(values: Mapping[Piece, Tensor]) -> list[list[Any]]:
    return [[*piece, str(value.dtype), list(value.shape)] for piece, value in values.items()]


class SumsAtOwners(JoinedSums):
    """Sums that lie at the ranks of a party, as its gateway sees them.

    Args:
        own: the gateway's.
        ranks: of the party.
        listed: see `JoinedSums`.
        telling: inside, the other ranks `bring` what is asked for here.
    """

    def __init__(
        self,
        own: HeldSums,
        ranks: Ranks,
        listed: Sequence[Iterable[Sequence[Any]]],
        telling: Callable[[Sequence[Asked], torch.dtype], AbstractContextManager[None]],
    ) -> None:
        super().__init__(listed, own.cuts)
        self._own, self._ranks, self._telling = own, ranks, telling
        self._lock = threading.Lock()

    def _bring(self, asked: Sequence[Asked], dtype: torch.dtype) -> Sequence[Tensor]:
        with self._lock, self._telling(asked, dtype):
            flat = bring(self._own, self._ranks, asked, dtype)
        return torch.split(flat, [each.size for each in asked])


def bring(own: HeldSums, ranks: Ranks, asked: Sequence[Asked], dtype: torch.dtype) -> Tensor:
    """Bring what is asked for to rank 0; all ranks call this.

    Args:
        own: what this rank has.
        ranks: of the party.
        asked: the same at all of them.
        dtype: of all that is asked for.

    Returns:
        At rank 0 all values, those of rank 0 first; elsewhere nothing.
    """
    mine = [own.rows(each.piece, each.experts).reshape(-1) for each in asked if each.owner == ranks.rank]
    there = [sum(each.size for each in asked if each.owner == rank) for rank in range(ranks.world)]
    nothing = [0] * ranks.world
    flat = mine[0] if len(mine) == 1 else torch.cat([torch.empty(0, dtype=dtype), *mine])
    return ranks.exchange(flat, [there[ranks.rank], *nothing[1:]], there if ranks.rank == 0 else nothing)


def expert_names(layers: Iterable[ExpertLayer]) -> dict[str, tuple[int, str]]:
    """Layer and name of every expert parameter that is trained, by its name in the model."""
    return {
        f"{layer.name}.{name}": (layer.index, name)
        for layer in layers
        for name, param in layer.parameters().items()
        if param.requires_grad
    }


def held(totals: Mapping[str, Tensor], experts: Mapping[str, tuple[int, str]], holdings: Holdings) -> HeldSums:
    """Sums by the names that they have in files.

    Args:
        totals: sums.
        experts: see `expert_names`.
        holdings: of the model that they are of.
    """
    values: dict[Piece, Tensor] = {}
    for stored, value in totals.items():
        name, some = holdings.part_of(stored)
        values[Piece(*experts.get(name, (TRUNK, name)), some.start, some.stop)] = value
    return HeldSums(values, holdings.cuts)


def to_owners(owners: Ownership, totals: dict[str, Tensor]) -> None:
    """Add every rank's sums up at their owners; what is left at the others is forgotten.

    Args:
        owners: of all that is summed.
        totals: of this rank, by name.
    """
    for sharing, owner, names in owners.by_owner(tuple(totals)):
        for name in names:
            sharing.add_up([totals[name]], owner)
            if sharing.rank != owner:
                del totals[name]
