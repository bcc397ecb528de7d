"""How much memory one party needs on its device and beside it, in closed form.

Counted in bytes of state: weights, gradients, AdamW's two moments, whatever crosses or is about to. What activations
take comes on top; it depends on the family and on the tokens computed at once. benchmarks/memory.py compares each
formula with what a device that counts really held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arrangement = Literal["centralised", "tokens", "experts"]
FLOAT32 = 4


@dataclass(frozen=True)
class Shape:
    """A model and who shares it.

    Attributes:
        trunk: trained parameters outside the experts.
        experts: parameters of all experts of all layers.
        layers: MoE layers.
        parties: hosts of the experts.
        matrix: parameters of the largest stacked expert matrix, all experts of a layer.
        largest_trunk: parameters of the largest trunk tensor.
        own: expert parameters that the party hosts; None: an equal share.
        compute_bytes: of one weight where it computes, and of a stored one.
        wire_bytes: of one weight on the wire and in the owner's cache.
        push_bytes: of one value of a sum on the wire.
        shared_trunk: trained together, each party hosting an equal share of it.
        factors: numbers of a preconditioner, which lie beside the trunk and are never trained.
    """

    trunk: int
    experts: int
    layers: int
    parties: int
    matrix: int = 0
    largest_trunk: int = 0
    own: int | None = None
    compute_bytes: int = FLOAT32
    wire_bytes: int = 2
    push_bytes: int = FLOAT32
    shared_trunk: bool = False
    factors: int = 0

    @property
    def kept_trunk(self) -> int:
        """Numbers of the trunk where it computes."""
        return self.trunk + self.factors

    @property
    def expert_share(self) -> float:
        """f: the experts' share of all parameters."""
        return self.experts / (self.trunk + self.experts)

    @property
    def hosted(self) -> int:
        """Expert parameters that the party hosts."""
        return self.experts // self.parties if self.own is None else self.own

    @property
    def trained_bytes(self) -> int:
        """Of one trained parameter: the weight, a float32 gradient, two moments; below float32 also a master copy."""
        master = FLOAT32 if self.compute_bytes < FLOAT32 else 0
        return self.compute_bytes + master + 3 * FLOAT32


@dataclass(frozen=True)
class Adapters:
    """Low-rank updates that are trained in place of the weights, which are frozen. All in values.

    Attributes:
        shared: that all parties train together: those of experts, and with a shared trunk those of its layers.
        own: of the trunk's layers, where each party trains its own.
        stored: of the shared ones, those that the party steps for all.
        matrix: the largest matrix of one expert; a narrower one is widened to be multiplied.
    """

    shared: int
    own: int = 0
    stored: int = 0
    matrix: int = 0

    @property
    def trained(self) -> int:
        """All that a party trains."""
        return self.shared + self.own


@dataclass(frozen=True)
class Need:
    """Bytes of one party: ``device`` where it computes, ``host`` in ordinary memory beside it."""

    device: int
    host: int


def predict(arrangement: Arrangement, shape: Shape) -> Need:
    """State of one party at its peak, without activations.

    - ``centralised``: everything on one device, and the gradient of one stacked matrix before it is added up.
    - ``tokens``: the trunk and its optimiser, a computing copy of the hosted experts, and the gradient of one layer
      of them. Beside it the hosted experts with their optimiser, and every party's staged gradient.
    - ``experts``: the trunk's weights alone, two layers' experts in the narrower of the wire's and the computing
      format, and the gradient of one matrix. Beside it masters and optimisers of hosted experts and trunk, the
      frozen bytes that are served, the cache of all layers, this party's sums three times (clipped, noised, and as
      bytes on their way to the spool), and everybody's pushes for the hosted parts.
    """
    if arrangement == "centralised":
        computing = shape.compute_bytes * (shape.matrix + shape.factors)
        return Need(shape.trained_bytes * (shape.trunk + shape.experts) + computing, 0)
    own, trained = shape.hosted, shape.trained_bytes
    if arrangement == "tokens":
        device = trained * shape.trunk + shape.compute_bytes * (own + own // shape.layers)
        return Need(device, (trained + shape.parties * FLOAT32) * own)
    narrow = min(shape.wire_bytes, shape.compute_bytes)
    largest = max(shape.matrix, shape.largest_trunk)
    device = shape.compute_bytes * shape.kept_trunk + 2 * narrow * (shape.experts // shape.layers) + FLOAT32 * largest
    trunk_share = shape.trunk // shape.parties if shape.shared_trunk else 0
    stored, stepped = own + trunk_share, own + (trunk_share if shape.shared_trunk else shape.trunk)
    host = (
        trained * stepped
        + shape.wire_bytes * (stored + shape.experts)
        + 3 * FLOAT32 * (shape.trunk + shape.experts)
        + shape.push_bytes * shape.parties * stored
    )
    return Need(device, host)


def predict_adapters(arrangement: Literal["centralised", "experts"], shape: Shape, adapters: Adapters) -> Need:
    """The same where adapters alone are trained; they, their sums and their optimiser are float32 always.

    - ``centralised``: all frozen weights, the adapters, their gradients and moments.
    - ``experts``: the frozen trunk as it is computed in (that of a narrower checkpoint takes less: a plan reads no
      weights), two layers' frozen experts in the narrower format, one expert's matrix in the wider one, the adapters
      and the gradients of one layer's. Beside it the cache of all layers, which holds the own experts, too
      (`coterie.federation.experts.frozen_shard`); of adapters what full training has of its weights: masters and
      optimisers of those stored here and the own ones, the bytes that are served, the sums three times, and
      everybody's pushes.
    """
    trained, frozen = adapters.trained, shape.trunk + shape.experts
    if arrangement == "centralised":
        return Need(shape.compute_bytes * frozen + 4 * FLOAT32 * trained, 0)
    narrow = min(shape.wire_bytes, shape.compute_bytes)
    widened = shape.compute_bytes * adapters.matrix if narrow < shape.compute_bytes else 0
    device = (
        shape.compute_bytes * shape.trunk
        + 2 * narrow * (shape.experts // shape.layers)
        + widened
        + FLOAT32 * (trained + trained // shape.layers)
    )
    host = (
        shape.wire_bytes * (shape.experts + adapters.stored)
        + 4 * FLOAT32 * (adapters.stored + adapters.own)
        + 3 * FLOAT32 * trained
        + shape.push_bytes * shape.parties * adapters.stored
    )
    return Need(device, host)


def saving(arrangement: Arrangement, shape: Shape, activations: int = 0) -> float:
    """Share of the centralised device memory that a party does without.

    Args:
        arrangement: the exchange, or ``centralised``.
        shape: sizes of model and federation.
        activations: bytes that come on top in both.
    """
    alone = predict("centralised", shape).device + activations
    return 1 - (predict(arrangement, shape).device + activations) / alone
