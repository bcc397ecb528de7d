"""Which rank has the last word on which values: it adds them up, noises them, puts them on disk, and steps them.

A parameter has one owner, of all that several ranks have of it alike. So any optimizer that steps each parameter by
itself can be shared out, and what it keeps of a parameter lies at one rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate

from torch import Tensor

from coterie.models.spread.holdings import Holdings
from coterie.ranks.ranks import Ranks


class Ownership:
    """The owners of a run's values, as one rank sees them.

    Owners have parameters that follow each other by name, of about as many values; the rest is rank 0's.

    Args:
        ranks: that share the run.
        holdings: what this one has of the model.
        trained: parameters by name.
    """

    def __init__(self, ranks: Ranks, holdings: Holdings, trained: Mapping[str, Tensor]) -> None:
        self._ranks, self._holdings = ranks, holdings
        parts = {name: tensor.numel() for name, tensor in trained.items() if holdings.is_part(name)}
        whole = {name: tensor.numel() for name, tensor in trained.items() if name not in parts}
        self._owners = dealt(whole, ranks.world) | dealt(parts, holdings.replicas.world)

    def is_own(self, name: str) -> bool:
        """Whether this rank owns what is released under a name."""
        sharing = self._holdings.replicas if self._holdings.is_part(name) else self._ranks
        return self._owners.get(name, 0) == sharing.rank

    def own(self, names: Iterable[str]) -> list[str]:
        """Those that this rank owns."""
        return [name for name in names if self.is_own(name)]

    def by_owner(self, names: Collection[str]) -> Iterator[tuple[Ranks, int, list[str]]]:
        """Ranks that have some values alike, which of these owns them, and the names; the same order at all ranks."""
        parts = {name for name in names if self._holdings.is_part(name)}
        for sharing, shared in ((self._ranks, set(names) - parts), (self._holdings.replicas, parts)):
            for owner in range(sharing.world):
                yield sharing, owner, [name for name in sorted(shared) if self._owners.get(name, 0) == owner]

    def hand_out(self, values: Mapping[str, Tensor]) -> None:
        """Give everybody what owners have, in place; every rank takes part.

        Raises:
            RankError: a rank is gone.
        """
        for sharing, owner, names in self.by_owner(values):
            sharing.hand_out([values[name].detach() for name in names], owner)


def dealt(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """An owner for each name, by sizes."""
    names = sorted(sizes)
    ends = accumulate(sizes[name] for name in names)
    total = max(1, sum(sizes.values()))
    return {
        name: min(world - 1, (end - (sizes[name] + 1) // 2) * world // total)
        for name, end in zip(names, ends, strict=True)
    }
