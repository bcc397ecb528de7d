"""A preconditioner's factors, from the gradients of public records.

Shape letters: E experts, R rows, C columns of a matrix, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coterie.errors import ModelError
from coterie.models.preconditioner import Factors, Place, Preconditioner, places_of

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""``loss(model, batch) -> [B]``."""

POWER, DAMPING = 0.125, 0.1
LARGEST_SIDE = 2048
"""Rows or columns up to which a side gets a matrix; beyond, and for the rows of tables, a number for each."""


def measure(
    model: nn.Module,
    records: Iterable[Mapping[str, Any]],
    loss: Loss,
    power: float = POWER,
    damping: float = DAMPING,
) -> Preconditioner:
    """Factors from the gradients of public records.

    Args:
        model: without a preconditioner; only modules whose matrix requires a gradient, and is read by
            nobody else, get factors.
        records: batches of one record each, of public text; some hundred are enough.
        loss: see `coterie.dp.losses.default_loss`.
        power: of the second moments; 0 leaves everything as it is, 0.5 would make all directions equally long.
        damping: is added to each second moment, relative to the mean of its side.

    Raises:
        ModelError: no record, no module to precondition, or a gradient that is not finite.
    """
    places = [place for place in places_of(model) if place.trained]
    if not places:
        raise ModelError(
            f"{type(model).__name__} has no trainable matrix that can be preconditioned.",
            code="model-preconditioner",
            fix="leave the matrices trainable (requires_grad), and name the model itself",
        )
    moments: dict[str, _Moments] = {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    number = 0
    for number, record in enumerate(records, 1):
        if number == 1:
            elsewhere = _read_elsewhere(model, places, partial(loss, model, record))
            moments = {place.name: _Moments(place) for place in places if not elsewhere & place.weights}
        gradients = torch.autograd.grad(loss(model, record).sum(), trained, allow_unused=True)
        by_parameter = {id(p): g.float() for p, g in zip(trained, gradients, strict=True) if g is not None}
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in by_parameter.values()))
        if not math.isfinite(norm):
            raise ModelError(
                f"the gradient of public record {number} is not finite.",
                code="model-preconditioner",
                why="the second moments of all records would be",
                fix="take the record out of the public text, or start from another model",
            )
        for own in moments.values() if norm else ():  # a record without a word to predict has no direction
            own.add(by_parameter, norm)
    if not number:
        raise ModelError("there is no public record to measure.", code="model-preconditioner", fix="name public text")
    matrices = [each for own in moments.values() for each in own.matrices() if each[0] > 0.0]
    size = sum(numel for _, numel in matrices)
    middle = math.exp(sum(numel * math.log(energy / numel) for energy, numel in matrices) / max(1, size))
    found = {name: own.factors(power, damping, middle) for name, own in moments.items()}
    return Preconditioner({name: own for name, own in found.items() if own.tensors()})  # others got no gradient


def factor_values(model: nn.Module) -> int:
    """Numbers in the factors of a model, which may be on the meta device; one whose matrices are read elsewhere has
    fewer.
    """
    places = [place for place in places_of(model) if place.trained]
    return sum(side.values for place in places for side in _Moments(place).sides)


@torch.no_grad()
def _read_elsewhere(model: nn.Module, places: Sequence[Place], run: Callable[[], object]) -> set[int]:
    """Weights, by `id`, that other code than their own modules' reads, which would find them in other coordinates."""
    inside: list[nn.Module] = []
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    handles = []
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            owners[id(weight)].append(module)
    for place in places:
        for module in {id(m): m for weight in place.weights for m in owners[weight]}.values():
            handles.append(module.register_forward_pre_hook(lambda own, _: inside.append(own)))
            handles.append(module.register_forward_hook(lambda *_: inside.remove(inside[-1]), always_call=True))
    reads = _Reads({weight: owners[weight] for place in places for weight in place.weights}, inside)
    try:
        with reads:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return reads.elsewhere


class _Reads(TorchFunctionMode):
    """Who computes with which weight."""

    def __init__(self, owners: Mapping[int, Sequence[nn.Module]], inside: Sequence[nn.Module]) -> None:
        super().__init__()
        self.elsewhere: set[int] = set()
        self._owners, self._inside = owners, inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):  # not a shape, a number format or a device
            for tensor in _tensors((args, kwargs)):
                owners = self._owners.get(id(tensor))
                if owners is not None and not any(module in self._inside for module in owners):
                    self.elsewhere.add(id(tensor))
        return out


def _tensors(some: Any) -> Iterator[Tensor]:
    if isinstance(some, Tensor):
        yield some
    elif isinstance(some, Mapping):
        yield from _tensors(tuple(some.values()))
    elif isinstance(some, list | tuple):
        for each in some:
            yield from _tensors(each)


class _Moments:
    """Second moments of the sides of a module's gradient, summed over records whose whole gradient has norm one."""

    def __init__(self, place: Place) -> None:
        self._one = place.inner is place.outer
        self._inner = _Side(place.inner, turned=place.turned, rows=False)
        self._outer = _Side(place.outer, turned=place.turned, rows=True, diagonal=place.is_table)

    def add(self, gradients: Mapping[int, Tensor], norm: float) -> None:
        for side in self.sides:
            side.add(gradients, norm)

    @property
    def sides(self) -> tuple[_Side, _Side]:
        return self._inner, self._outer

    def matrices(self) -> list[tuple[float, int]]:
        """Squared norm and entries of each matrix."""
        sides = [self._inner] if self._one else [self._inner, self._outer]
        return [(side.energy, side.entries) for side in sides]

    def factors(self, power: float, damping: float, middle: float) -> Factors:
        """The two powers.

        Args:
            power: see `measure`.
            damping: see `measure`.
            middle: geometric mean of all entries' second moments, by which factors are scaled: a learning rate then
                means what it meant.
        """
        inner, outer = self._inner, self._outer
        if self._one:
            # An entry's second moment is taken for the product of its row's and its column's over the whole.
            return Factors(
                inner.power(power, damping, inner.energy * middle), outer.power(power, damping, 1.0)
            )  # fmt: skip
        return Factors(*(side.power(power, damping, side.others * middle) for side in (inner, outer)))


class _Side:
    """One side of a matrix, or of all experts' together.

    Attributes:
        entries: of the matrix.
        energy: its squared norm.
    """

    def __init__(self, weight: nn.Parameter | None, *, turned: bool, rows: bool, diagonal: bool = False) -> None:
        self.entries = 0 if weight is None else weight.numel()
        self.energy = 0.0
        self._weight, self._turned, self._rows, self._diagonal = weight, turned, rows, diagonal
        self._sum: Tensor | None = None

    def add(self, gradients: Mapping[int, Tensor], norm: float) -> None:
        """A record's gradients, by the parameters' `id`, and its norm."""
        gradient = None if self._weight is None else gradients.get(id(self._weight))
        if gradient is None:
            return
        g_ERC = gradient.reshape(-1, *gradient.shape[-2:]) / norm
        if self._turned is self._rows:  # so that the side's own entries are the rows
            g_ERC = g_ERC.mT
        if self._is_diagonal(g_ERC.shape[1]):
            moment = g_ERC.double().pow(2).sum((0, 2))
        else:
            flat = g_ERC.transpose(0, 1).flatten(1)
            moment = (flat @ flat.mT).double()
        self._sum = moment if self._sum is None else self._sum + moment
        self.energy += float(g_ERC.double().pow(2).sum())

    @property
    def values(self) -> int:
        """Numbers in its factor."""
        if self._weight is None:
            return 0
        size = self._weight.shape[-2 if self._turned is not self._rows else -1]
        return size if self._is_diagonal(size) else size * size

    def _is_diagonal(self, size: int) -> bool:
        return self._diagonal or size > LARGEST_SIDE

    @property
    def others(self) -> int:
        """How many entries share each of the side's."""
        return 1 if self._sum is None else self.entries // self._sum.shape[0]

    def power(self, power: float, damping: float, scale: float) -> Tensor | None:
        """``(moment / scale + damping * its mean) ** -power``; None where nothing was seen."""
        if self._sum is None or self.energy == 0.0:
            return None
        if self._sum.dim() == 1:
            side: Tensor = ((self._sum + damping * self._sum.mean()) / scale).pow(-power)
            return side.float()
        values, vectors = torch.linalg.eigh(self._sum)
        values = values.clamp_min(0.0)
        powers: Tensor = ((values + damping * values.mean()) / scale).pow(-power)
        matrix: Tensor = vectors * powers @ vectors.mT
        return matrix.float()
