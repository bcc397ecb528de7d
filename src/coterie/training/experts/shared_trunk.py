"""What all parties train together outside the stacked experts: its names, and this party's copy of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from coterie.config import FederationConfig
from coterie.dp.balance import Balancer
from coterie.dp.noise.joint_noise import LOAD
from coterie.federation.experts.parts import Part
from coterie.models.lora import expert_wrappers


class TrunkCopy:
    """This party's copy of the trunk that hosts store; it computes with it, and lends a share whose host is absent.

    Args:
        model: its parameters are the copy.
        balancer: is told the public loads, which travel like a parameter of the trunk.
    """

    def __init__(self, model: nn.Module, balancer: Balancer | None) -> None:
        self._model, self._balancer = model, balancer

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """What a host serves, by name."""
        own = dict(self._model.named_parameters())
        for name, value in tensors.items():
            if name == LOAD and self._balancer is not None:
                self._balancer.follow(value)
            else:
                own[name].copy_(value)

    def lend(self, part: Part) -> dict[str, Tensor]:
        """The tensors of a share, as they are here."""
        own: dict[str, Tensor] = dict(self._model.named_parameters())
        if self._balancer is not None:
            own[LOAD] = self._balancer.public()
        return {name: own[name] for name, _ in part.shapes}


def shared_names(federation: FederationConfig, model: nn.Module) -> tuple[str, ...]:
    """Trained parameters outside the stacked experts that all parties train together: a shared trunk, and adapters
    of experts in any case."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not p.is_meta]
    if federation.trunk == "shared":
        return tuple(trained)
    factors = {id(p) for wrapper in expert_wrappers(model) for p in wrapper.parameters()}
    own = dict(model.named_parameters())
    return tuple(name for name in trained if id(own[name]) in factors)
