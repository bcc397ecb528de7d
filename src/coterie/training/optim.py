"""AdamW and its learning rate: one piece of code for trunk, experts and single-process training.

Parameters in bfloat16 keep a float32 master copy, float32 moments and a float32 gradient sum in the optimiser: a
bfloat16 weight alone would lose every update smaller than about 1/256 of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from coterie.config import OptimSpec
from coterie.errors import CheckpointError


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), computed in float32.

    A parameter without a gradient is stepped with gradient zero: its moments fade and its decay applies, as for an
    expert that no token chose. So a parameter's course does not depend on which process holds it.
    """

    def __init__(self, params: Iterable[Tensor], spec: OptimSpec) -> None:
        defaults = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def gather(self) -> None:
        """Add the gradients of low-precision parameters to their float32 sums. Call it after each micro-batch.

        Float32 gradients already add up in ``.grad`` and stay there.
        """
        for param in self._params():
            if param.grad is not None and param.dtype != torch.float32:
                self.gradient(param).add_(param.grad)
                param.grad = None

    def gradient(self, param: Tensor) -> Tensor:
        """The float32 gradient of this round so far, to be changed in place; zeros when there is none yet."""
        if param.dtype == torch.float32:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            return param.grad
        state = self.state[param]
        if "gradient" not in state:
            state["gradient"] = torch.zeros_like(param, dtype=torch.float32)
        gradient: Tensor = state["gradient"]
        return gradient

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter once, by its group's ``lr``."""
        assert closure is None
        self.gather()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.requires_grad]
            if not params:
                continue
            states = [self._state(param) for param in params]
            masters = [state.get("master", param) for state, param in zip(states, params, strict=True)]
            adamw(
                masters,
                [self.gradient(param) for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                # Torch's choice on a GPU, all parameters at once, holds a temporary as large as all of them.
                foreach=False,
            )
            for param, master in zip(params, masters, strict=True):
                if master is not param:
                    param.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for state in self.state.values():
            state.pop("gradient", None)

    def tensors(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state as flat tensors ``{parameter name}/{part}``, for a checkpoint."""
        return {
            f"{name}/{part}": value
            for name, param in names.items()
            if param in self.state
            for part, value in self.state[param].items()
            if part != "gradient"
        }

    def load_tensors(self, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave.

        Raises:
            CheckpointError: a part of some parameter is missing or has another shape.
        """
        if not tensors:
            return
        for name, param in names.items():
            for part, value in self._state(param).items():
                saved = tensors.get(f"{name}/{part}")
                if saved is None or saved.shape != value.shape:
                    raise CheckpointError(
                        f"The saved optimiser state has no fitting `{part}` for `{name}`.",
                        code="checkpoint-optimizer",
                        why="the checkpoint was made with another model or an older version",
                        fix="resume with the settings the run was started with",
                    )
                value.copy_(saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that the state of low-precision parameters stays in float32."""
        super().load_state_dict(state_dict)
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        for index, param in zip(saved, self._params(), strict=True):
            for part, value in state_dict["state"].get(index, {}).items():
                if part != "step":
                    self.state[param][part] = value.to(param.device, torch.float32, copy=True)

    def _state(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
            if param.dtype != torch.float32:
                state["master"] = param.detach().to(torch.float32)
        return {part: value for part, value in state.items() if part != "gradient"}

    def _params(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]


def make_optimizer(params: Iterable[Tensor], spec: OptimSpec) -> AdamW:
    """The optimiser of a set of parameters. Set its rate each round with `set_lr`."""
    return AdamW(params, spec)


def lr_at(round_no: int, spec: OptimSpec, rounds: int) -> float:
    """The learning rate of a round, counted from 1, in a run of ``rounds``.

    Rises linearly over ``warmup_rounds`` (the first round already moves). Then it stays, follows half a cosine down
    to ``final_lr_ratio`` of the peak in the last round, or falls in a straight line that would reach zero in the
    round after the last, so that every round moves.
    """
    if round_no <= spec.warmup_rounds:
        return spec.lr * round_no / spec.warmup_rounds
    if spec.schedule == "constant":
        return spec.lr
    since = round_no - 1 - spec.warmup_rounds
    if spec.schedule == "linear":
        return spec.lr * max(0.0, 1 - since / max(1, rounds - spec.warmup_rounds))
    done = min(1.0, since / max(1, rounds - 1 - spec.warmup_rounds))
    return spec.lr * (spec.final_lr_ratio + (1 - spec.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
