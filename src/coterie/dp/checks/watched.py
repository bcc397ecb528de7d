"""Values of a model that a forward must leave alone: parameters, buffers, and tensors kept in plain attributes.

What a forward writes into them (batch statistics, a codebook's moving average, a router's bias) comes from records
and has no noise, so it must not outlive a round. Values are compared, not version counters: a write through ``.data``
or a view of it counts no version, and a parameter may be written to although it requires a gradient.
"""

from __future__ import annotations

import functools
import secrets
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.models.narrow import Narrow

_COPIED = 1 << 16
"""Largest tensor, in elements, that is copied to be compared and put back; of larger ones a checksum is kept."""

_BLOCK = 4096
"""Elements that a checksum takes or leaves together."""

_SAMPLED = 32
"""A sampling `Watched` reads one block in this many."""

_TOGETHER = 64
_MIX = 0x1E3779B97F4A7C15
_DEPTH = 3
_OWN = frozenset(vars(nn.Module()))
_LIBRARIES = ("torch", "transformers", "coterie", "peft", "accelerate", "tokenizers")


@dataclass(frozen=True)
class _Snapshot:
    """A tensor as it was: its values, or a checksum of them, or (of tensors that show no values) the version."""

    tensor: Tensor
    version: int
    copy: Tensor | None
    checksum: Tensor | None


class Watched:
    """How a model's values were at one moment.

    Args:
        model: whatever mode it is in.
        sampled: of tensors above 2^16 elements, compare the version and one block of 4096 elements in 32, other ones
            each time. Default: every element. Either way a tensor up to 2^16 elements is compared whole.

    Cost: one pass over the model's values, or a thirty-second of it, here and in each `changed`.
    """

    def __init__(self, model: nn.Module, sampled: bool = False) -> None:
        self._model = model
        self._sampled = sampled
        self._first, self._step = (secrets.randbelow(_SAMPLED), _SAMPLED) if sampled else (0, 1)
        self._seen = {name: self._note(tensor) for name, tensor in _values(model).items()}
        self._first_seen = dict(self._seen)

    def settle(self) -> None:
        """Take tensors in plain attributes as they are now, for `changed`: a table made at first use is no record's.

        `restore` still puts back what was there before.
        """
        registered = _registered(self._model)
        for name, tensor in _values(self._model).items():
            if name not in registered:
                self._seen[name] = self._note(tensor)

    def changed(self) -> list[str]:
        """Names of those that are not as they were, new ones included."""
        now = _values(self._model)
        doubtful: dict[str, tuple[Tensor, Tensor]] = {}
        changed = []
        for name, tensor in now.items():
            seen = self._seen.get(name)
            if name in self._seen and (seen is None or tensor.is_meta):
                continue
            if seen is None or seen.tensor.shape != tensor.shape or seen.tensor.dtype != tensor.dtype:
                changed.append(name)
            elif seen.copy is not None:
                if not _same(tensor, seen.copy):
                    changed.append(name)
            elif seen.checksum is None or (self._sampled and tensor is seen.tensor):
                if _version(tensor) != seen.version or tensor is not seen.tensor:
                    changed.append(name)
                elif seen.checksum is not None:
                    doubtful[name] = (seen.checksum, self._checksum(tensor))
            else:
                doubtful[name] = (seen.checksum, self._checksum(tensor))
        return changed + _unequal(doubtful)

    def restore(self) -> list[str]:
        """Put changed ones back; returns the names of those that could not be."""
        lost = []
        now = _values(self._model)
        for name in self.changed():
            seen = self._first_seen.get(name)
            if seen is None or seen.copy is None or now[name].shape != seen.copy.shape:
                lost.append(name)
                continue
            with torch.no_grad():
                now[name].data.copy_(seen.copy)
        return lost

    def _note(self, tensor: Tensor) -> _Snapshot | None:
        """None for a tensor on meta: it is lent its values for a while, and they live elsewhere."""
        if tensor.is_meta:
            return None
        if tensor.numel() <= _COPIED:
            return _Snapshot(tensor, _version(tensor), tensor.detach().clone(), None)
        try:
            return _Snapshot(tensor, _version(tensor), None, self._checksum(tensor))
        except (RuntimeError, TypeError):  # classes of their own: quantised, sparse
            return _Snapshot(tensor, _version(tensor), None, None)

    def _checksum(self, tensor: Tensor) -> Tensor:
        """[] int64. A sum with odd factors modulo 2^64: one element that differs always changes it."""
        tensor = tensor.stored if isinstance(tensor, Narrow) else tensor
        words = _words(tensor)
        per_block = _BLOCK * tensor.element_size() // words.element_size()
        whole = words.numel() // per_block * per_block
        blocks = words[:whole].view(-1, per_block)[self._first :: self._step]
        factors = _odd(per_block, tensor.device)
        rest = words[whole:].to(torch.int64)
        total = (rest * factors[: rest.numel()]).sum()
        for start in range(0, len(blocks), _TOGETHER):
            sums = (blocks[start : start + _TOGETHER].to(torch.int64) * factors).sum(1)
            total = total * _MIX + (sums * _odd(_TOGETHER, tensor.device)[: len(sums)]).sum()
        return total


@functools.lru_cache(maxsize=16)
def _odd(count: int, device: torch.device) -> Tensor:
    """[count] int64 odd factors that differ."""
    return torch.arange(1, 2 * count, 2, device=device) * _MIX


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _words(tensor: Tensor) -> Tensor:
    """[W] a tensor's bytes as integers, as wide as they come out even; no copy where it is contiguous."""
    flat = tensor.detach()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    flat = flat.contiguous().view(-1)
    size = flat.element_size()
    if size < 8 and flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return flat.view(torch.int64)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def _same(now: Tensor, before: Tensor) -> bool:
    now, before = now.detach(), before.to(now.device)
    return torch.equal(now, before) or (now.is_floating_point() and torch.allclose(now, before, 0, 0, equal_nan=True))


def _unequal(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Names whose two checksums differ, with one transfer for each device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, (before, _) in pairs.items():
        by_device.setdefault(before.device, []).append(name)
    changed = []
    for names in by_device.values():
        before, now = (torch.stack([pairs[name][i] for name in names]) for i in (0, 1))
        changed += [name for name, other in zip(names, (before != now).tolist(), strict=True) if other]
    return changed


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, buffer and tensor in a plain attribute of a module, by name, each once."""
    tensors = _registered(model)
    known = {id(tensor) for tensor in tensors.values()}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _OWN or isinstance(value, nn.Module | str | int | float | None):
                continue
            for path, tensor in _inside(f"{prefix}.{name}".lstrip("."), value, _DEPTH):
                if id(tensor) not in known:
                    known.add(id(tensor))
                    tensors[path] = tensor
    return tensors


def _registered(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _inside(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a value: itself, in containers, and in plain objects that hold state."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth == 0:
        return
    if isinstance(value, Mapping):
        parts = [(f"{path}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, list | tuple | deque | set):
        parts = [(f"{path}[{i}]", part) for i, part in enumerate(value)]
    elif _holds_state(value):
        parts = [(f"{path}.{name}", part) for name, part in vars(value).items()]
    else:
        return
    for name, part in parts:
        if not isinstance(part, nn.Module | str | int | float | None):
            yield from _inside(name, part, depth - 1)


def _holds_state(value: Any) -> bool:
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.split(".")[0] not in _LIBRARIES
