"""Switch-base-8, which coterie cannot train: what it would need by its dimensions all the same.

An encoder-decoder outside transformers' experts interface. Its parameters can be counted and shared out, so whoever
compares models before choosing one sees it beside the others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from coterie.training.planning.closed_form import Need, Shape, predict

NAME = "Switch-base-8"
WHY = (
    f"{NAME} cannot be trained here: it is an encoder-decoder outside transformers' experts interface, whose experts "
    "have a capacity and drop tokens beyond it; the nearest that can be is a decoder with experts of its size: "
    "`family: mixtral`, `config: {hidden_size: 768, intermediate_size: 3072, num_hidden_layers: 12, "
    "num_local_experts: 8, num_experts_per_tok: 1}`"
)
_PUBLISHED = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_decoder_layers": 12,
    "num_sparse_decoder_layers": 6,
    "num_heads": 12,
    "num_experts": 8,
}


@dataclass(frozen=True)
class OutsidePlan:
    """What it would need.

    Attributes:
        shape: of the model, its experts in equal shares.
        centralised, tokens, experts: state in one place, and of a party in each exchange; activations on top.
    """

    shape: Shape
    centralised: Need
    tokens: Need
    experts: Need

    def as_json(self) -> dict[str, Any]:
        """Plain figures."""
        return {**asdict(self), "trained_here": False, "why": WHY}


def is_outside(name: str) -> bool:
    """Whether a preset's name, in any case, is the one that is planned here."""
    return name.lower() == NAME.lower()


def plan_outside(parties: int) -> OutsidePlan:
    """Count it, in bfloat16; no weight is read.

    Args:
        parties: that would share its experts.
    """
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**_PUBLISHED))
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    experts = {name: size for name, size in sizes.items() if ".experts." in name}
    shape = Shape(
        trunk=sum(sizes.values()) - sum(experts.values()),
        experts=sum(experts.values()),
        layers=len({name.partition(".experts.")[0] for name in experts}),
        parties=parties,
        matrix=_PUBLISHED["num_experts"] * max(experts.values()),
        largest_trunk=max(size for name, size in sizes.items() if name not in experts),
        compute_bytes=2,
    )
    return OutsidePlan(shape, predict("centralised", shape), predict("tokens", shape), predict("experts", shape))
