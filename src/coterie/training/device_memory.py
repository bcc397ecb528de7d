"""How much memory one party needs on its device and beside it, in closed form.

Counted in bytes of training state: weights, gradients, AdamW's two moments (16 bytes a parameter in float32). What
activations take is measured apart, because it depends on the family and the batch and is the same in every
arrangement that computes on the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arrangement = Literal["centralised", "tokens", "experts", "experts_shared"]
FLOAT32 = 4


@dataclass(frozen=True)
class Shape:
    """A model and who shares it.

    Attributes:
        trunk: trained parameters outside the experts.
        experts: parameters of all experts of all layers.
        layers: MoE layers.
        parties: hosts of the experts.
        compute_bytes: of one weight where experts compute.
        wire_bytes: of one weight on the wire and in the owner's cache.
        push_bytes: of one value of a sum on the wire.
    """

    trunk: int
    experts: int
    layers: int
    parties: int
    largest: int = 0
    matrix: int = 0
    compute_bytes: int = FLOAT32
    wire_bytes: int = 2
    push_bytes: int = FLOAT32

    @property
    def expert_share(self) -> float:
        """f: the experts' share of all parameters."""
        return self.experts / (self.trunk + self.experts)


@dataclass(frozen=True)
class Need:
    """Bytes of one party: ``device`` where it computes, ``host`` in ordinary memory beside it."""

    device: int
    host: int


def predict(arrangement: Arrangement, shape: Shape) -> Need:
    """State of one party at its peak, without activations.

    - ``centralised``: everything on one device.
    - ``tokens``: the trunk and the hosted experts; gradients of others' tokens are staged beside the device.
    - ``experts``: the trunk, two layers' experts and the gradient of one. Master weights, moments and gradients of
      the hosted experts, the cache of all layers, this party's sums (clipped, noised and as bytes to be pushed) and
      everybody's pushes for the hosted parts are beside the device.
    """
    state = 4 * FLOAT32
    own = shape.experts // shape.parties
    if arrangement == "centralised":
        return Need(state * (shape.trunk + shape.experts), 0)
    if arrangement == "tokens":
        return Need(state * (shape.trunk + own), shape.parties * FLOAT32 * own)
    layer = shape.experts // shape.layers
    device = state * shape.trunk + (2 * shape.compute_bytes + FLOAT32) * layer
    sums = (2 * FLOAT32 + shape.push_bytes) * (shape.trunk + shape.experts)
    host = state * own + 2 * shape.wire_bytes * own + shape.wire_bytes * shape.experts
    return Need(device, host + sums + shape.push_bytes * shape.experts)


def saving(arrangement: Arrangement, shape: Shape, activations: int = 0) -> float:
    """Share of the centralised device memory that a party does without."""
    alone = predict("centralised", shape).device + activations
    return 1 - (predict(arrangement, shape).device + activations) / alone
