"""What a model keeps between one forward and the next, put back so that no record leaves a trace for another.

Rotary tables that grow with the longest sequence so far, masks and positions that are cached, lists that are
appended to: all of it would let one record decide how another is computed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.errors import PrivacyError

_COPIED = 1 << 20
"""Largest tensor, in elements, that is copied to be put back; of larger ones the version is watched."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a plain attribute, which a forward may write into."""

    where: str
    tensor: Tensor
    version: int
    kept: Tensor | None

    def changed(self) -> bool:
        return self.tensor._version != self.version


class ModelState:
    """The attributes of all modules of a model, and what the containers among them hold, at one moment.

    Buffers that are written into in place are not put back: a lot that changes one is refused when it ends.

    Args:
        model: its parameters may change their values, not their places.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module, dict(module.__dict__)) for module in model.modules()]
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: list[_Tensor] = []
        for name, module in model.named_modules():
            for key, value in module.__dict__.items():
                if isinstance(value, list | dict | set):
                    self._contents.append((value, copy.copy(value)))
                elif isinstance(value, Tensor) and not value.is_meta:
                    kept = value.detach().clone() if value.numel() <= _COPIED else None
                    self._tensors.append(_Tensor(f"{name}.{key}".lstrip("."), value, value._version, kept))

    def put_back(self) -> None:
        """Undo what a forward changed.

        Raises:
            PrivacyError: a large tensor in a plain attribute was written into.
        """
        for module, before in self._attributes:
            now = module.__dict__
            if now.keys() != before.keys() or any(now[key] is not value for key, value in before.items()):
                now.clear()
                now.update(before)
        for container, before in self._contents:
            if (container or before) and not _same(container, before):  # most are empty, and stay so
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)
        for number, seen in enumerate(self._tensors):
            if seen.changed():
                self._tensors[number] = _restored(seen)


def _same(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(key in before and value is before[key] for key, value in now.items())
    return now == before if isinstance(now, set) else all(a is b for a, b in zip(now, before, strict=True))


def _restored(seen: _Tensor) -> _Tensor:
    if seen.kept is None or seen.kept.shape != seen.tensor.shape:
        raise PrivacyError(
            f"`{seen.where}` changes when the model sees a record.",
            code="dp-isolation-state",
            why="the records after it would be computed with what it left there",
            fix="make it a buffer that no forward changes, or keep it outside the model",
        )
    with torch.no_grad():
        seen.tensor.copy_(seen.kept)
    return _Tensor(seen.where, seen.tensor, seen.tensor._version, seen.kept)
