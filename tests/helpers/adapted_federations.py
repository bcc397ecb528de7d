"""Small federations whose parties train adapters alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from coterie.config import FederationConfig, LoraSpec
from coterie.models.lora import attach_adapters
from coterie.training.party.inputs import PartyInputs, Weights, trunk_tensors
from helpers.federations import make_parts


def adapted_parts(
    config: FederationConfig, models: Mapping[str, nn.Module], folder: Path, lora: LoraSpec
) -> dict[str, PartyInputs]:
    """Parts of every party, each with adapters around its model."""
    found = {}
    for name, each in make_parts(config, models, folder).items():
        experts = each.weights().experts
        model = attach_adapters(each.model, lora, seed=0)
        start = {key: value.detach().clone() for key, value in trunk_tensors(model).items()}
        found[name] = replace(each, model=model, weights=lambda s=start, e=experts: Weights(s, e))
    return found
