"""Tensors of a model that training must not change: its buffers and its frozen parameters.

What a forward writes into them (batch statistics, a codebook's moving average, a router's bias) comes from records
and has no noise, so it must not outlive a round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_COPIED = 1 << 20
"""Largest tensor, in elements, that is copied to be compared and put back; of larger ones the version is watched."""


@dataclass(frozen=True)
class _Seen:
    tensor: Tensor
    version: int
    copy: Tensor | None


class Untrained:
    """How buffers and frozen parameters were at one moment.

    Args:
        model: parameters that require a gradient are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[str, _Seen | None] = {}
        for name, tensor in _untrained(model).items():
            if tensor.is_meta:  # its values are lent for a while and live elsewhere
                self._seen[name] = None
                continue
            copy = tensor.detach().clone() if tensor.numel() <= _COPIED else None
            self._seen[name] = _Seen(tensor, tensor._version, copy)

    def changed(self) -> list[str]:
        """Names of those that are not as they were, new ones included."""
        now = _untrained(self._model)
        return [name for name, tensor in now.items() if not self._as_before(name, tensor)]

    def restore(self) -> list[str]:
        """Put changed ones back; returns the names of those that could not be."""
        lost = []
        for name in self.changed():
            seen, now = self._seen.get(name), _untrained(self._model)[name]
            if seen is None or seen.copy is None or now.shape != seen.copy.shape:
                lost.append(name)
                continue
            with torch.no_grad():
                now.copy_(seen.copy)
        return lost

    def _as_before(self, name: str, now: Tensor) -> bool:
        if name not in self._seen:
            return False
        seen = self._seen[name]
        if seen is None:
            return True
        if seen.copy is None or now.is_meta:
            return now is seen.tensor and now._version == seen.version
        if now.shape != seen.copy.shape or now.dtype != seen.copy.dtype:
            return False
        old = seen.copy.to(now.device)
        return torch.equal(now, old) or (now.is_floating_point() and torch.allclose(now, old, 0, 0, equal_nan=True))


def _untrained(model: nn.Module) -> dict[str, Tensor]:
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return dict(model.named_buffers()) | frozen
