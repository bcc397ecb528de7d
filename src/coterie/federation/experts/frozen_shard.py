"""Hosted experts that nobody trains: they stay where they lie, and are read a piece at a time for who fetches them.

Where adapters alone are trained, a party needs its own experts as it needs everybody's, in the cache that it computes
from. A second copy in memory for serving them would be read once in a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coterie.federation.experts.parts import Part
from coterie.federation.shard import checked, hosted_experts
from coterie.models.seam import ExpertLayer
from coterie.models.split.shards import expert_key


class FrozenShard:
    """Hosted experts as they are from the first round to the last.

    Args:
        layers: the model's MoE layers; their modules may be on the meta device.
        weights: hosted experts only, by `expert_key`; asked for a tensor whenever a piece of it is needed.

    Raises:
        ModelError: a key that is no expert parameter of this model, a missing parameter, or one of another shape.
    """

    def __init__(self, layers: Sequence[ExpertLayer], weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        hosted = hosted_experts(weights, layers)
        for layer in layers:
            for expert in hosted.get(layer.index, ()):
                for name, param in layer.parameters().items():
                    checked(weights, expert_key(layer.index, expert, name), param.shape[1:])

    def values(self, part: Part, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The values from ``start`` to ``stop`` of a part in ``dtype``, in the order of its shapes."""
        out = torch.empty(stop - start, dtype=dtype)
        at = 0
        for name, shape in part.shapes:
            count = math.prod(shape[1:])
            for expert in part.experts:
                first, last = max(start - at, 0), min(stop - at, count)
                if first < last:
                    tensor = self._weights[expert_key(part.layer, expert, name)].detach()
                    out[at + first - start : at + last - start] = tensor.reshape(-1)[first:last]
                at += count
        return out
