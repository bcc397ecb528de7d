"""What one party trains by itself: the parts of its trunk that no host stores, on its own text."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from coterie.errors import CheckpointError
from coterie.models import seam
from coterie.training.data.packing import Batch, RoundOrder
from coterie.training.loop import finish_round, loss_sum, to_device
from coterie.training.optim import Float32Optimizer, make_optimizer
from coterie.training.party.inputs import (
    PartyInputs,
    Weights,
    changing_tensors,
    trunk_parameters,
    trunk_tensors,
)
from coterie.training.planning.measured import model_state_bytes


class OwnTrunk:
    """A party's model with its text and the optimiser of its own parameters.

    Args:
        inputs: what the party brings.
        weights: of the split model.
        shared: trained parameters that hosts step.
        on_host: keep gradients and optimiser state in host memory: sums come there and are needed once a round.

    Attributes:
        parameters: what this party steps by itself, by name, where it is stepped.
        optimizer: of the parameters; where there are none, of all that is trained here, and it is never stepped.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: Float32Optimizer

    def __init__(
        self, inputs: PartyInputs, weights: Weights, shared: Collection[str] = (), *, on_host: bool = False
    ) -> None:
        self.inputs = inputs
        self.layers = seam.expert_layers(inputs.model)
        self._spec = inputs.federation.train
        self._order = RoundOrder(len(inputs.train), self._spec.batch_size, self._spec.seed)
        self._computing = {n: param for n, param in trunk_parameters(inputs.model).items() if n not in shared}
        self._on_host = on_host
        self.restart(weights)

    def restart(self, weights: Weights) -> None:
        """Trunk and optimiser as they are before the first round."""
        frozen = trunk_tensors(self.inputs.model).keys() - self.tensors().keys()
        self._copy({name: tensor for name, tensor in weights.trunk.items() if name not in frozen})
        self.parameters = {name: _on_host(p) if self._on_host else p for name, p in self._computing.items()}
        self.optimizer = self.make_optimizer((self.parameters or trunk_parameters(self.inputs.model)).values())
        self.inputs.model.train()

    def make_optimizer(self, params: Collection[Tensor]) -> Float32Optimizer:
        """Of any parameters of this federation."""
        return make_optimizer(params, self.inputs.federation.optim)

    def batches(self, round_no: int) -> list[Batch]:
        """The micro-batches of a round, from 1."""
        return [self.inputs.train.batch(each) for each in self.rows(round_no)]

    def rows(self, round_no: int) -> list[list[int]]:
        """The sequences of each micro-batch of a round."""
        return self._order.micro_batches(round_no, self._spec.micro_batch)

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Summed loss of a micro-batch, and its tokens."""
        return loss_sum(self.inputs.model, to_device(batch, self.inputs.device))

    def step(self, sums: Mapping[Tensor, Tensor], divisor: float, rate: float) -> None:
        """Step the parameters by sums of gradients over ``divisor``.

        Args:
            sums: by parameter of `parameters`.
            divisor: what they are divided by.
            rate: learning rate.
        """
        for param in self.parameters.values():
            if param in sums:
                self.optimizer.gradient(param).copy_(sums[param])
        finish_round(self.optimizer, divisor, lr=rate)
        with torch.no_grad():
            for name, param in self.parameters.items():
                if param is not self._computing[name]:
                    self._computing[name].copy_(param)

    def tensors(self) -> dict[str, Tensor]:
        """What training changes of the trunk, shared parameters and saved buffers too, for a checkpoint."""
        return changing_tensors(self.inputs.model, self.inputs.federation.lora)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state, for a checkpoint."""
        return self.optimizer.tensors(dict(self.parameters))

    @torch.no_grad()
    def load(self, trunk: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Put a checkpoint back.

        Raises:
            CheckpointError: it is of another model.
        """
        self._copy(trunk)
        self.optimizer.load_tensors(dict(self.parameters), optimizer)
        for name, param in self.parameters.items():
            if param is not self._computing[name]:
                param.copy_(self._computing[name])

    def state_bytes(self) -> int:
        """The model here with its gradients and optimiser state."""
        return model_state_bytes(self.inputs.model, self.optimizer)

    @torch.no_grad()
    def _copy(self, saved: Mapping[str, Tensor]) -> None:
        own = self.tensors()
        different = sorted(own.keys() ^ saved.keys()) or [n for n in own if own[n].shape != saved[n].shape]
        if different:
            raise CheckpointError(
                f"The saved trunk does not fit the model: {len(different)} tensors differ, first `{different[0]}`.",
                code="checkpoint-weights",
                why="a partly loaded trunk would train on random weights",
                fix="write trunk and shards again with `coterie split` from the model that federation.yaml names",
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _on_host(param: nn.Parameter) -> nn.Parameter:
    """The parameter itself where the model computes on the processor, otherwise a copy in host memory."""
    return param if param.device.type == "cpu" else nn.Parameter(param.detach().to("cpu"))
