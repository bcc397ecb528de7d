"""Shared trunk parameters at their home host: master weights and optimiser, beside the hosted experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from coterie.errors import CheckpointError
from coterie.federation.shard import HostOptimizer, OptimizerFactory


class TrunkHome:
    """The share of a shared trunk that one party stores.

    Args:
        weights: by parameter name; kept in float32.
        make_optimizer: as for the hosted experts.
    """

    def __init__(self, weights: Mapping[str, Tensor], make_optimizer: OptimizerFactory) -> None:
        self._stored = {
            name: nn.Parameter(value.detach().to("cpu", torch.float32, copy=True)) for name, value in weights.items()
        }
        self._optimizer: HostOptimizer | None = make_optimizer(list(self._stored.values())) if self._stored else None

    def weights(self) -> dict[str, Tensor]:
        """The stored weights by name, float32. Read only."""
        return {name: param.detach() for name, param in self._stored.items()}

    def gradient(self, name: str) -> Tensor:
        """The float32 gradient of a parameter, to be filled before `step`."""
        assert self._optimizer is not None
        return self._optimizer.gradient(self._stored[name])

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every stored parameter and let the gradients go."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by name, optimiser state by ``{name}/{part}``."""
        state: dict[str, Tensor] = {**self.weights()}
        if self._optimizer is not None:
            state |= self._optimizer.tensors(dict(self._stored))
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            CheckpointError: other parameters, or other shapes. Nothing is changed then.
        """
        plain = {name: value for name, value in state.items() if "/" not in name}
        shapes = {name: param.shape for name, param in self._stored.items()}
        if {name: value.shape for name, value in plain.items()} != shapes:
            raise CheckpointError(
                "The saved trunk share is not the one that this party is home to.",
                code="checkpoint-trunk-home",
                fix="resume with the roster that the checkpoint was written under",
            )
        if self._optimizer is not None:
            self._optimizer.load_tensors(dict(self._stored), {k: v for k, v in state.items() if "/" in k})
        for name, param in self._stored.items():
            param.copy_(plain[name])
