"""AdamW, SGD and their learning rate: one piece of code for trunk, experts and single-process training.

Parameters in bfloat16 keep a float32 master copy, float32 moments and a float32 gradient sum in the optimiser: a
bfloat16 weight alone would lose every update smaller than about 1/256 of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from coterie.config import OptimSpec
from coterie.errors import CheckpointError


class Float32Optimizer(ABC, torch.optim.Optimizer):
    """What optimisers here have in common: everything is computed in float32.

    A parameter without a gradient is stepped with gradient zero: its averages fade and its decay applies, as for an
    expert that no token chose. So a parameter's course does not depend on which process holds it.
    """

    averages: tuple[str, ...] = ()
    """Names of the running averages in a parameter's state."""

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

    def set_gradient(self, param: Tensor, gradient: Tensor) -> None:
        """This round's gradient, whole. It is kept as it is, not copied: the caller gives it away.

        Args:
            param: one of the optimiser's.
            gradient: float32, of the parameter's shape.
        """
        own = gradient.to(param.device)
        if param.dtype == torch.float32:
            param.grad = own
        else:
            self.state[param]["gradient"] = own

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter once, by its group's ``lr``."""
        if closure is not None:
            raise TypeError("gradients are handed over by `gradient`, not computed by a closure")
        self.gather()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.requires_grad]
            if not params:
                continue
            states = [self._state(param) for param in params]
            self._step_group(group, params, states)
            for param, state in zip(params, states, strict=True):
                if "master" in state:
                    param.copy_(state["master"])

    @abstractmethod
    def _step_group(self, group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]]) -> None:
        """Change the float32 weights of a group in place: masters in the states, else the parameters."""

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
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in self.averages:
                state[name] = torch.zeros_like(param, dtype=torch.float32)
            if param.dtype != torch.float32:
                state["master"] = param.detach().to(torch.float32)
        return {part: value for part, value in state.items() if part != "gradient"}

    def _params(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]


class AdamW(Float32Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101), computed in float32."""

    averages = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Iterable[Tensor], spec: OptimSpec) -> None:
        defaults = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
        super().__init__(params, defaults)

    def _step_group(self, group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]]) -> None:
        adamw(
            [state.get("master", param) for state, param in zip(states, params, strict=True)],
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


class CorrectedAdamW(Float32Optimizer):
    """AdamW whose second moment is freed of the privacy noise's share (DP-AdamBC, arXiv:2312.14334).

    Noise of variance s^2 on a gradient adds s^2 to the expectation of its square, which drowns what Adam is to tell
    coordinates apart by. The divisor is ``sqrt(max(v - s^2, floor s^2)) + eps``. The noise's size is public, and what
    is divided was released: it costs no privacy. Without noise, before `expect_noise`, it is AdamW.
    """

    averages = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Iterable[Tensor], spec: OptimSpec) -> None:
        defaults = {
            "lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay,
            "noise_floor": spec.noise_floor,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._noise: dict[Tensor, float] = {}

    def expect_noise(self, std: Mapping[Tensor, float]) -> None:
        """Standard deviation of the noise in each parameter's gradient, from the next step on."""
        self._noise = dict(std)

    def _step_group(self, group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]]) -> None:
        first, second = group["betas"]
        for param, state in zip(params, states, strict=True):
            gradient, master = self.gradient(param), state.get("master", param)
            state["step"] += 1
            count, variance = float(state["step"]), self._noise.get(param, 0.0) ** 2
            mean = state["exp_avg"].lerp_(gradient, 1 - first)
            square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            divisor = square.div(1 - second**count).sub_(variance).clamp_(min=group["noise_floor"] * variance)
            master.mul_(1 - group["lr"] * group["weight_decay"])
            master.addcdiv_(mean, divisor.sqrt_().add_(group["eps"]), value=-group["lr"] / (1 - first**count))


class SGD(Float32Optimizer):
    """Gradients added up with momentum, and decoupled weight decay: weights are a sum of what it was given."""

    averages = ("momentum_buffer",)

    def __init__(self, params: Iterable[Tensor], spec: OptimSpec) -> None:
        super().__init__(params, {"lr": spec.lr, "momentum": spec.momentum, "weight_decay": spec.weight_decay})

    @property
    def momentum(self) -> float:
        """Share of the last step that is added to the next."""
        return float(self.param_groups[0]["momentum"])

    def _step_group(self, group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]]) -> None:
        for param, state in zip(params, states, strict=True):
            state["step"] += 1
            master = state.get("master", param)
            buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(self.gradient(param))
            master.mul_(1 - group["lr"] * group["weight_decay"]).sub_(buffer, alpha=group["lr"])


def make_optimizer(params: Iterable[Tensor], spec: OptimSpec) -> Float32Optimizer:
    """The optimiser of a set of parameters. Set its rate each round with `set_lr`."""
    kinds: Mapping[str, Callable[[Iterable[Tensor], OptimSpec], Float32Optimizer]]
    kinds = {"adamw": AdamW, "adamw_corrected": CorrectedAdamW, "sgd": SGD}
    return kinds[spec.kind](params, spec)


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
