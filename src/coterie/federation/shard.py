"""The experts that a party hosts: their weights, their optimiser, their part of a checkpoint.

Weights are stacked per layer, [hosted experts, ...] in the family's storage order, so that one grouped product serves
all of them. Nothing here has room for an expert that is hosted elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coterie.errors import CheckpointError, ModelError
from coterie.models.seam import ExpertLayer
from coterie.models.split.shards import expert_key, parse_expert_key


class HostOptimizer(Protocol):
    """What a host needs of an optimiser; `coterie.training.optim.AdamW` is one."""

    param_groups: list[dict[str, Any]]

    def gradient(self, param: Tensor) -> Tensor:
        """The float32 gradient of a parameter, to be changed in place."""
        ...

    def step(self) -> None:
        """Move every parameter once, also those whose gradient is zero."""
        ...

    def zero_grad(self) -> None: ...

    def tensors(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state as ``{name}/{part}``."""
        ...

    def load_tensors(self, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        ...


OptimizerFactory = Callable[[list[nn.Parameter]], HostOptimizer]


class NothingHosted:
    """The `HostOptimizer` of a party that stores no parameter; torch's optimisers refuse to have none."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []

    def gradient(self, param: Tensor) -> Tensor:
        """Raises LookupError: no parameter is its own."""
        raise LookupError("no parameter is stored here")

    def step(self) -> None:
        """There is nothing to move."""

    def zero_grad(self) -> None:
        """There is no gradient."""

    def tensors(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_tensors(self, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """There is no state to put back."""


class Shard:
    """Hosted experts and their optimiser.

    Args:
        layers: the model's MoE layers; their modules may be on the meta device.
        weights: hosted experts only, by `expert_key`. Their dtype and device are where they are stored and stepped.
        make_optimizer: called once with the stacked parameters.
        device: where experts compute. If that is not where they are stored, there is a second copy.

    Attributes:
        hosted: global ids of the hosted experts of every layer that has any, ascending.

    Raises:
        ModelError: a key that is no expert parameter of this model, a missing parameter, or one of another shape.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        weights: Mapping[str, Tensor],
        make_optimizer: OptimizerFactory,
        device: torch.device | str | None = None,
    ) -> None:
        self._layers = {layer.index: layer for layer in layers}
        self.hosted = hosted_experts(weights, layers)
        self._stored = {
            index: {name: self._stack(weights, index, name) for name in self._layers[index].layout.parameter_names}
            for index in self.hosted
        }
        stored = [param for _, _, param in self._parameters()]
        self._optimizer: HostOptimizer = make_optimizer(stored) if stored else NothingHosted()
        self._device = torch.device(device) if device is not None else None
        self._computing = {index: self._copies(stored) for index, stored in self._stored.items()}

    def weights(self, layer: int) -> dict[str, Tensor]:
        """The stacked weights of a layer, where experts compute. Read only."""
        return self._computing[layer]

    def gradient(self, layer: int, name: str) -> Tensor:
        """The float32 gradient of a stacked parameter, to be filled before `step`."""
        return self._optimizer.gradient(self._stored[layer][name])

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """Move all hosted experts, also those without a token, and let the gradients go."""
        if learning_rate is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by `expert_key`, optimiser state by ``{key}/{part}``. The tensors are views: save before a step."""
        state = {
            expert_key(layer, expert, name): param.detach()[row]
            for layer, name, param in self._parameters()
            for row, expert in enumerate(self.hosted[layer])
        }
        for full, value in self._optimizer.tensors(self._names()).items():
            name, part = full.split("/")
            layer, parameter = name.split(".")
            shape = self._stored[int(layer)][parameter].shape
            for row, expert in enumerate(self.hosted[int(layer)]):
                state[f"{expert_key(int(layer), expert, parameter)}/{part}"] = (
                    value[row] if value.shape == shape else value
                )
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave. A state without optimiser parts starts the optimiser anew.

        Raises:
            CheckpointError: an expert is missing, not hosted here, or of another shape. Nothing is changed then.
        """
        expected = {expert_key(layer, e, n) for layer, n, _ in self._parameters() for e in self.hosted[layer]}
        plain = {key for key in state if "/" not in key}
        if plain != expected:
            raise CheckpointError(
                f"The saved experts are not the hosted ones: {_first_two(expected - plain)} missing, "
                f"{_first_two(plain - expected)} not hosted here.",
                code="checkpoint-experts",
                why="training would go on from other weights than were saved",
                fix="resume with the roster and placement that the checkpoint was written under",
            )
        stacked = {
            (layer, name): [state[expert_key(layer, expert, name)] for expert in self.hosted[layer]]
            for layer, name, _ in self._parameters()
        }
        for layer, name, param in self._parameters():
            if any(value.shape != param.shape[1:] for value in stacked[layer, name]):
                raise CheckpointError(
                    f"Saved experts of layer {layer} have another shape in `{name}`.",
                    code="checkpoint-experts",
                    fix="use the run folder with the shard that it began with, or name another run_dir to begin anew",
                )
        self._optimizer.load_tensors(self._names(), self._optimizer_parts(state))
        for layer, name, param in self._parameters():
            param.copy_(torch.stack(stacked[layer, name]))
        self._refresh()

    # ----

    def _optimizer_parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts: dict[str, set[str]] = defaultdict(set)
        for key in state:
            if "/" in key:
                name, part = key.split("/", 1)
                parts[name].add(part)
        out = {}
        for layer, name, param in self._parameters():
            keys = [expert_key(layer, expert, name) for expert in self.hosted[layer]]
            for part in sorted(set.intersection(*(parts[key] for key in keys))):
                values = [state[f"{key}/{part}"] for key in keys]
                scalar = values[0].shape != param.shape[1:]
                out[f"{layer}.{name}/{part}"] = values[0] if scalar else torch.stack(values)
        return out

    def _parameters(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        for layer, stored in self._stored.items():
            for name, param in stored.items():
                yield layer, name, param

    def _names(self) -> dict[str, Tensor]:
        return {f"{layer}.{name}": param for layer, name, param in self._parameters()}

    def _stack(self, weights: Mapping[str, Tensor], layer: int, name: str) -> nn.Parameter:
        shape = self._layers[layer].parameters()[name].shape[1:]
        rows = []
        for expert in self.hosted[layer]:
            key = expert_key(layer, expert, name)
            rows.append(checked(weights, key, shape))
        return nn.Parameter(torch.stack(rows))

    def _copies(self, stored: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The same tensors, or copies on the computing device."""
        return {name: param.detach().to(self._device or param.device) for name, param in stored.items()}

    def _refresh(self) -> None:
        for layer, name, param in self._parameters():
            copy = self._computing[layer][name]
            if copy.data_ptr() != param.data_ptr():
                copy.copy_(param)


def hosted_experts(weights: Iterable[str], layers: Sequence[ExpertLayer]) -> dict[int, tuple[int, ...]]:
    """Global ids of the experts that a shard's keys are of, by layer, ascending.

    Raises:
        ModelError: a key that is no expert parameter of this model.
    """
    known = {layer.index: layer for layer in layers}
    hosted: dict[int, set[int]] = defaultdict(set)
    for key in weights:
        number, expert, name = parse_expert_key(key)
        layer = known.get(number)
        if layer is None or expert >= layer.num_experts:
            raise _unfit(key, "is no expert parameter of this model")
        if name not in layer.layout.parameter_names:
            raise _unfit(key, f"should be one of {', '.join(layer.layout.parameter_names)}")
        hosted[layer.index].add(expert)
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(hosted.items())}


def checked(weights: Mapping[str, Tensor], key: str, shape: Sequence[int]) -> Tensor:
    """One tensor of a shard.

    Raises:
        ModelError: it is missing or has another shape.
    """
    if key not in weights:
        raise _unfit(key, "is missing")
    tensor = weights[key]
    if tuple(tensor.shape) != tuple(shape):
        raise _unfit(key, f"has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    return tensor


def _first_two(keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:2]) or "none"
    return f"{shown} and {len(keys) - 2} more" if len(keys) > 2 else shown


def _unfit(key: str, problem: str) -> ModelError:
    return ModelError(
        f"The shard does not fit the model: `{key}` {problem}.",
        code="host-shard",
        why="tokens would be sent to an expert that is not there",
        fix="write the shard with `coterie split` from the same checkpoint and placement as the trunk",
    )
