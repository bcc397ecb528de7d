"""Where a party's sums lie until they are pushed: in this process, or each at one of the ranks of the party.

Nobody needs all of them at once. Whoever pushes asks for one part, and lets it go before it asks for the next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from coterie.dp.ownership import Ownership
from coterie.errors import RankError
from coterie.federation.experts.parts import Part
from coterie.models.seam import ExpertLayer
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


class HeldSums:
    """Sums in this process's memory.

    Args:
        values: by layer and name; of a trunk parameter, by `TRUNK` and name.
    """

    def __init__(self, values: Mapping[tuple[int, str], Tensor]) -> None:
        self._values = dict(values)

    def of(self, part: Part) -> dict[str, Tensor]:
        return {name: self.rows(part.layer, name, part.experts) for name, _ in part.shapes}

    def trunk(self, name: str) -> Tensor:
        return self._values[TRUNK, name]

    def rows(self, layer: int, name: str, experts: Sequence[int]) -> Tensor:
        """Those of some experts, ascending; of a trunk parameter all."""
        value = self._values[layer, name]
        if layer == TRUNK:
            return value
        first, last = experts[0], experts[-1]
        neighbours = last - first == len(experts) - 1  # then they are a view
        return value[first : last + 1] if neighbours else value[list(experts)]

    def listed(self) -> list[list[Any]]:
        """What there is, as JSON values: layer, name, one of `DTYPES`, shape."""
        return [[*key, str(value.dtype), list(value.shape)] for key, value in self._values.items()]


class Asked(NamedTuple):
    """Rows of one parameter that a rank is asked for.

    Attributes:
        owner: the rank.
        layer, name: of the parameter; see `HeldSums`.
        experts: whose rows; none for a trunk parameter.
        size: values.
    """

    owner: int
    layer: int
    name: str
    experts: Sequence[int]
    size: int


class _Place(NamedTuple):
    """Where the sum of a parameter lies, and what it is."""

    rank: int
    dtype: torch.dtype
    shape: Sequence[int]


class SumsAtOwners:
    """Sums that lie at the ranks of a party, as its gateway sees them.

    Args:
        own: the gateway's.
        ranks: of the party.
        listed: `HeldSums.listed` of every rank; where several have the same, the first is asked.
        telling: inside, the other ranks `bring` what is asked for here.
    """

    def __init__(
        self,
        own: HeldSums,
        ranks: Ranks,
        listed: Sequence[Iterable[Sequence[Any]]],
        telling: Callable[[Sequence[Asked], torch.dtype], AbstractContextManager[None]],
    ) -> None:
        self._own, self._ranks, self._telling = own, ranks, telling
        self._lock = threading.Lock()
        self._at: dict[tuple[int, str], _Place] = {}
        for rank, each in enumerate(listed):
            for layer, name, dtype, shape in each:
                self._at.setdefault((layer, name), _Place(rank, DTYPES[dtype], shape))

    def of(self, part: Part) -> dict[str, Tensor]:
        """See `SumValues`.

        Raises:
            RankError: a rank is gone, or none has them.
        """
        return self._brought(part.layer, part.experts, dict(part.shapes))

    def trunk(self, name: str) -> Tensor:
        return self._brought(TRUNK, (), {name: self._where(TRUNK, name).shape})[name]

    def _brought(self, layer: int, experts: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        places = {name: self._where(layer, name) for name in shapes}
        # What one rank has comes in the order in which it was asked for, one rank after the other.
        names = sorted(shapes, key=lambda name: places[name].rank)
        asked = [Asked(places[name].rank, layer, name, experts, math.prod(shapes[name])) for name in names]
        (dtype,) = {place.dtype for place in places.values()}
        with self._lock, self._telling(asked, dtype):
            flat = bring(self._own, self._ranks, asked, dtype)
        pieces = torch.split(flat, [each.size for each in asked])
        return {name: piece.view(tuple(shapes[name])) for name, piece in zip(names, pieces, strict=True)}

    def _where(self, layer: int, name: str) -> _Place:
        found = self._at.get((layer, name))
        if found is None:
            raise RankError(
                f"no rank of this party has the sum of `{name}`.",
                code="ranks-part-gone",
                why="only the bytes that the ledger counted may be used",
                fix="resume the run: what was counted is pushed from the spool",
            )
        return found


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
    mine = [own.rows(each.layer, each.name, each.experts).reshape(-1) for each in asked if each.owner == ranks.rank]
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


def held(totals: Mapping[str, Tensor], experts: Mapping[str, tuple[int, str]]) -> HeldSums:
    """Sums by the names that their parameters have in the model.

    Args:
        totals: sums.
        experts: see `expert_names`.
    """
    return HeldSums({experts.get(name, (TRUNK, name)): value for name, value in totals.items()})


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
