"""Shared trunk parameters at their host: master weights and optimiser, beside the hosted experts.

Public statistics that all parties' releases add up to, and that all parties compute the next round with, have a host
in the same way: served, pinned, pushed, summed and saved like a parameter, but moved by a rule of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from coterie.errors import CheckpointError
from coterie.federation.shard import HostOptimizer, NothingHosted, OptimizerFactory

_STATE = "//"
"""Between a statistic's name and its state's in a checkpoint; one slash stands before an optimiser's."""


class Statistic(Protocol):
    """What is made of one tensor of the parties' sums instead of an optimiser step."""

    def value(self) -> Tensor:
        """What is served, float32."""
        ...

    def take(self, mean: Tensor) -> None:
        """A committed round: the parties' sums over the sum of their weights."""
        ...

    def state(self) -> Mapping[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; nothing before the first round."""
        ...


class TrunkHost:
    """The share of a shared trunk that one party stores.

    Args:
        weights: by parameter name; kept in float32.
        make_optimizer: as for the hosted experts.
        statistics: by the name of the tensor that is pushed for them.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        make_optimizer: OptimizerFactory,
        statistics: Mapping[str, Statistic] | None = None,
    ) -> None:
        self._stored = {
            name: nn.Parameter(value.detach().to("cpu", torch.float32, copy=True)) for name, value in weights.items()
        }
        stored = list(self._stored.values())
        self._optimizer: HostOptimizer = make_optimizer(stored) if stored else NothingHosted()
        self._statistics = dict(statistics or {})
        self._means = {name: torch.zeros_like(each.value()) for name, each in self._statistics.items()}

    def weights(self) -> dict[str, Tensor]:
        """The stored weights and statistics by name, float32. Read only."""
        return {name: param.detach() for name, param in self._stored.items()} | {
            name: each.value() for name, each in self._statistics.items()
        }

    def gradient(self, name: str) -> Tensor:
        """The float32 gradient of a parameter, or the mean of a statistic, to be filled before `step`."""
        if name in self._means:
            return self._means[name]
        return self._optimizer.gradient(self._stored[name])

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every stored parameter and let the gradients go; statistics take their means."""
        for name, each in self._statistics.items():
            each.take(self._means[name])
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by name, optimiser state by ``{name}/{part}``, statistics by ``{name}//{part}``."""
        state: dict[str, Tensor] = {name: param.detach() for name, param in self._stored.items()}
        state |= self._optimizer.tensors(dict(self._stored))
        for name, each in self._statistics.items():
            state |= {f"{name}{_STATE}{part}": value for part, value in each.state().items()}
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
                "The saved trunk share is not the one that this party hosts.",
                code="checkpoint-trunk-home",
                fix="resume with the roster that the checkpoint was written under",
            )
        parts = {k: v for k, v in state.items() if "/" in k and _STATE not in k}
        self._optimizer.load_tensors(dict(self._stored), parts)
        for name, param in self._stored.items():
            param.copy_(plain[name])
        for name, each in self._statistics.items():
            prefix = f"{name}{_STATE}"
            each.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
