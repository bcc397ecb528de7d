"""Parts: the pieces of the model that one host stores, and their bytes on the wire.

In the `experts` exchange everything that crosses is a whole part, down as weights and up as a noised sum. The list
of parts, their order and their sizes follow from the signed configuration alone, so nothing about a party's text
can show in them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.errors import FrameError

CHUNK = 1 << 20
"""Bytes of one request; a broken transfer goes on at the chunk that is missing."""

AHEAD = 16 << 20
"""Bytes under way to or from one host at once. A line of 1 Gbit/s with 40 ms there and back holds 5 MB."""


@dataclass(frozen=True)
class Part:
    """One host's share of one layer.

    Attributes:
        number: position in the fixed order in which parts cross.
        host: party that stores it.
        layer: ordinal of the MoE layer, or -1 for a share of the trunk.
        experts: hosted experts in ascending order; empty for the trunk.
        trained: whether sums of it are pushed; frozen weights only ever go down.
        shapes: tensor shapes by name; a stacked expert parameter has one leading row per hosted expert.
    """

    number: int
    host: str
    layer: int
    experts: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    trained: bool = True

    def __str__(self) -> str:
        of = f"MoE layer {self.layer}" if self.layer >= 0 else "shared trunk"
        return f"part {self.number} of {self.host}, {of}"

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes)

    def num_bytes(self, dtype: torch.dtype) -> int:
        return self.num_values * dtype.itemsize

    def encode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The part as one uint8 tensor: the values in ``dtype``, in the order of ``shapes``.

        Raises:
            FrameError: a tensor is missing or has another shape.
        """
        return self.joined(tensors, dtype).view(torch.uint8)

    def joined(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """All values of the part in ``dtype``, in the order of ``shapes``.

        Raises:
            FrameError: as `encode`.
        """
        out = torch.empty(self.num_values, dtype=dtype)
        start = 0
        for name, shape in self.shapes:
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}, not {shape}"
                raise FrameError(f"part {self.number} of {self.host}: `{name}` {found}.", code="part-shape")
            end = start + tensor.numel()
            out[start:end] = tensor.detach().reshape(-1)
            start = end
        return out

    def decode(self, blob: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors inside a blob, as views of it.

        Raises:
            FrameError: the blob has another size.
        """
        if blob.dtype != torch.uint8 or blob.numel() != self.num_bytes(dtype):
            raise FrameError(
                f"part {self.number} of {self.host} has {blob.numel()} bytes, not {self.num_bytes(dtype)}.",
                code="part-size",
            )
        return self.split(blob.view(dtype))

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """The tensors that all values of a part are, in the order of ``shapes``, as views."""
        out, start = {}, 0
        for name, shape in self.shapes:
            end = start + math.prod(shape)
            out[name] = values[start:end].view(shape)
            start = end
        return out


def expert_parts(
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    hosts: Sequence[Sequence[str]],
    parties: Sequence[str],
    trunk: Mapping[str, tuple[int, ...]] | None = None,
    *,
    train_experts: bool = True,
) -> tuple[Part, ...]:
    """Every part of a model in the order in which parts cross: trunk first, then layer by layer, host by host.

    Args:
        shapes: for each MoE layer the full stacked shapes by parameter name, first dimension E.
        hosts: for each MoE layer the host of each expert.
        parties: names in roster order.
        trunk: shapes of the trained trunk parameters when the trunk is shared; each gets a host, so that the
            hosts' shares are of about equal size.
        train_experts: False where only adapters are trained, which are part of the trunk here.
    """
    rows: list[tuple[str, int, tuple[int, ...], tuple[tuple[str, tuple[int, ...]], ...]]] = []
    for party, names in _homes(trunk or {}, parties).items():
        if names:
            rows.append((party, -1, (), tuple((name, tuple((trunk or {})[name])) for name in names)))
    for layer, (named, host_of) in enumerate(zip(shapes, hosts, strict=True)):
        for party in parties:
            experts = tuple(expert for expert, host in enumerate(host_of) if host == party)
            if experts:
                entries = tuple((name, (len(experts), *shape[1:])) for name, shape in named.items())
                rows.append((party, layer, experts, entries))
    return tuple(Part(number, *fields, fields[1] < 0 or train_experts) for number, fields in enumerate(rows))


def present_parts(parts: Sequence[Part], active: Sequence[str]) -> tuple[Part, ...]:
    """The parts that cross while some parties are absent; each is at its host in this time.

    An absent host's experts are masked, and their parts do not cross. Its share of the trunk stands still: the first
    active party lends the copy that it has, so that all compute with the same bytes, and takes no sums for it.

    Args:
        parts: every part of the model.
        active: at least one party, in roster order.
    """
    present = []
    for part in parts:
        if part.host in active:
            present.append(part)
        elif part.layer < 0:
            present.append(replace(part, host=active[0], trained=False))
    return tuple(present)


def _homes(trunk: Mapping[str, tuple[int, ...]], parties: Sequence[str]) -> dict[str, list[str]]:
    """A host for every trunk parameter: largest first, each to the party with the least so far."""
    load = dict.fromkeys(parties, 0)
    homes: dict[str, list[str]] = {party: [] for party in parties}
    for name in sorted(trunk, key=lambda name: (-math.prod(trunk[name]), name)):
        party = min(parties, key=lambda party: (load[party], parties.index(party)))
        load[party] += math.prod(trunk[name])
        homes[party].append(name)
    return {party: sorted(names) for party, names in homes.items()}


def digest_of(blob: Tensor) -> str:
    """Hex SHA-256 of a uint8 tensor's bytes."""
    return hashlib.sha256(memoryview(blob.contiguous().numpy())).hexdigest()  # type: ignore[arg-type]


def combined_digest(digests: Iterable[str]) -> str:
    """One digest for a list of digests in order: the version of a whole model."""
    return hashlib.sha256("|".join(digests).encode()).hexdigest()


def chunks_in(num_bytes: int) -> int:
    """How many chunks a blob has."""
    return -(-num_bytes // CHUNK)


def span(num_bytes: int, chunk: int) -> slice:
    """Where one chunk of a blob lies."""
    return slice(chunk * CHUNK, min((chunk + 1) * CHUNK, num_bytes))
