"""Full training or adapters (LoRA): what the choice changes, in words."""

from __future__ import annotations

import math

from coterie.config import LoraSpec
from coterie.models.seam import ExpertLayer


def usual_lora(layer: ExpertLayer) -> LoraSpec:
    """Adapters of every matrix that an expert of the family has, all else at its defaults."""
    return LoraSpec(experts=(layer.layout.up_name, "down_proj"))


def of_noise(weights: int, adapters: int) -> str:
    """What becomes of the noise of a private run.

    Args:
        weights: values that are trained in full.
        adapters: with adapters alone.
    """
    longer = math.sqrt(weights / adapters)
    return (
        "the noise multiplier, and with it epsilon, is the same for both: neither depends on how many values are "
        f"trained. {weights:,} of them instead of {adapters:,} make a round's noise as a whole {longer:.3g} times as "
        "long, beside a sum that the same clip norm bounds"
    )


SUITS = (
    "so adapters suit a model that is trained already, and all the more the smaller the budget; train in full where "
    "experts are random or freshly upcycled, since frozen ones stay as they are, or where much has to be learnt that "
    "is unlike what the model knows"
)
