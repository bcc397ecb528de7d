"""Which values of a model a rank has alone, and the names that such parts have in files.

A part's name says which experts it is of, so any number of ranks can read what another number wrote: a release, a
checkpoint's weights, or the state of an optimizer beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coterie.errors import CheckpointError
from coterie.models.spread.cuts import Cut, cuts_of
from coterie.models.spread.spread import spread_of
from coterie.ranks.ranks import Alone, Ranks

_SOME = re.compile(r"(?P<name>.*)\[(?P<start>\d+):(?P<stop>\d+)\]")


class HeldPart(NamedTuple):
    """Values of a whole tensor that one rank has, and nobody else.

    Attributes:
        key: names them in files.
        total: values of the whole tensor.
        places: where in it, flattened, these values lie; ascending.
    """

    key: str
    total: int
    places: range | Tensor


class Holdings:
    """The values of one model's parameters at this rank.

    Args:
        model: whole or spread.

    Attributes:
        spread: the experts are at several ranks, of which this is one.
        cuts: how parameters that hold something of every expert are cut, by name.
        group: ranks that hold all values together, once; this process alone where the model is whole.
        replicas: ranks that hold the same parts as this one.
    """

    def __init__(self, model: nn.Module) -> None:
        spread = spread_of(model)
        self.group: Ranks = Alone() if spread is None else spread.ranks
        self.replicas: Ranks = Alone() if spread is None else spread.replicas
        self.spread = spread is not None
        self.cuts = cuts_of(model)
        self._held = {name: cut.held(self.group.rank, self.group.world) for name, cut in self.cuts.items()}

    def is_part(self, name: str) -> bool:
        """Whether other ranks have other values of a parameter."""
        return self.spread and name in self.cuts

    def size(self, name: str, own: Tensor) -> int:
        """How many values something of a parameter's shape has at all ranks together."""
        return self.cuts[name].shape().numel() if self.is_part(name) else own.numel()

    def parts(self) -> dict[str, HeldPart]:
        """The parts that this rank has of parameters, by their names."""
        return {
            name: HeldPart(self._key(name), cut.shape().numel(), cut.places(self._held[name]))
            for name, cut in self.cuts.items()
            if self.spread
        }

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names that they have in files.

        Args:
            tensors: a parameter's by its name, or by ``{parameter}/{what}``; of its shape, or something else.
        """
        return {self._key(name) if self._cut(name, own) else name: own for name, own in tensors.items()}

    def part_of(self, stored: str) -> tuple[str, range]:
        """The parameter that a name in files is of, and whose part; no experts where it holds something of none."""
        match = _SOME.fullmatch(stored)
        if match is not None and match["name"] in self.cuts:
            return match["name"], range(int(match["start"]), int(match["stop"]))
        return stored, range(self.cuts[stored].experts) if stored in self.cuts else range(0)

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors as for `stored` those that no other rank has, under their names in files."""
        return self.stored({name: own for name, own in tensors.items() if self._cut(name, own)})

    def joined(self, pieces: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """What this rank has, from everything that any number of ranks wrote; of as many values as its shapes.

        Args:
            pieces: names in files and values; several under one name are one behind the other.

        Raises:
            CheckpointError: values of some experts do not say of which, or there are none of some that it has.
        """
        rows: dict[str, list[Tensor]] = {}
        found: dict[str, Tensor] = {}
        in_parts: dict[str, set[int]] = {}
        for stored, piece in pieces:
            match = _SOME.fullmatch(stored)
            cut = None if match is None else self.cuts.get(_parameter(match["name"]))
            if match is None or cut is None:
                rows.setdefault(stored, []).append(piece)
                continue
            held, of = self._held[_parameter(match["name"])], range(int(match["start"]), int(match["stop"]))
            both = range(max(held.start, of.start), min(held.stop, of.stop))
            in_parts.setdefault(match["name"], set()).update(both)
            if both:
                empty = torch.empty(cut.shape(held), dtype=piece.dtype)
                cut.put(cut.part(piece, both, of), both, found.setdefault(match["name"], empty), held)
        for name, own in rows.items():
            whole = own[0] if len(own) == 1 else torch.cat([piece.reshape(-1) for piece in own])
            parameter = _parameter(name)
            of_all = self.is_part(parameter) and whole.numel() == self.cuts[parameter].shape().numel()
            if name in in_parts or (self.is_part(name) and not of_all):
                raise _nameless(name)
            found[name] = self.cuts[parameter].part(whole, self._held[parameter]) if of_all else whole
        for name, experts in in_parts.items():
            if lost := set(self._held[_parameter(name)]) - experts:
                raise _without(name, min(lost))
        return found

    def _cut(self, name: str, own: Tensor) -> Cut | None:
        """How a tensor is cut; None where it is the same at every rank."""
        parameter = _parameter(name)
        if not self.is_part(parameter):
            return None
        cut = self.cuts[parameter]
        return cut if own.numel() == cut.shape(self._held[parameter]).numel() else None

    def _key(self, name: str) -> str:
        held = self._held[_parameter(name)]
        return f"{name}[{held.start}:{held.stop}]"


def _nameless(name: str) -> CheckpointError:
    return CheckpointError(
        f"what was saved of `{name}` does not say of which experts it is.",
        code="checkpoint-experts",
        why="an earlier version wrote the parts of all ranks under one name, and one would be taken for another",
        fix="begin the run anew in another run_dir; what it spent stays counted",
    )


def _without(name: str, expert: int) -> CheckpointError:
    return CheckpointError(
        f"nothing was saved of expert {expert} in `{name}`.",
        code="checkpoint-experts",
        why="it would go on with whatever lies in memory there",
        fix="bring back the files of all ranks, or go on from an earlier checkpoint",
    )


def _parameter(name: str) -> str:
    return name.partition("/")[0]
