"""Handing a release to an optimizer, and holding the optimizer to the parameters that the mechanism covers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from coterie.dp.checks.dry_step import check_optimizer_step, check_steps_apart
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.refusals import check_hooks
from coterie.errors import PrivacyError


@runtime_checkable
class KeepsFloat32(Protocol):
    """An optimizer that keeps float32 gradients of low-precision parameters, as `coterie.training.optim.AdamW`."""

    def set_gradient(self, param: Tensor, gradient: Tensor) -> None:
        """Take a parameter's float32 gradient, which is the optimizer's from then on."""


@runtime_checkable
class ExpectsNoise(Protocol):
    """An optimizer that uses how much noise is in what it is given, as `coterie.training.optim.CorrectedAdamW`."""

    def expect_noise(self, std: Mapping[Tensor, float]) -> None:
        """Standard deviation of the noise in each parameter's gradient, from the next step on."""


@runtime_checkable
class AddsUp(Protocol):
    """An optimizer whose weights are a sum of what it was given, as those of `coterie.training.optim.SGD`."""

    @property
    def momentum(self) -> float:
        """Share of the last step that is added to the next."""


def momentum_of(optimizer: Any) -> float:
    """With which an optimizer adds up what it is given; 0 where it does something else."""
    if isinstance(optimizer, AddsUp):
        return float(optimizer.momentum)
    inside = _innermost(optimizer)
    return float(inside.param_groups[0]["momentum"]) if isinstance(inside, torch.optim.SGD) else 0.0


def check_adds_up(optimizer: Any, bands: NoiseBands | None) -> None:
    """Hold noise in bands to an optimizer that gains by it.

    Raises:
        PrivacyError: it divides by the size of single steps, in which there is more noise.
    """
    if bands is None or isinstance(optimizer, AddsUp) or isinstance(_innermost(optimizer), torch.optim.SGD):
        return
    raise PrivacyError(
        f"noise in bands (`noise_bands`) does not fit {type(_innermost(optimizer)).__name__}.",
        code="dp-bands-optimizer",
        why="it divides by the size of single rounds' gradients, which hold more noise so that their sum holds less",
        fix="use SGD with momentum (`optim: {kind: sgd}` in a settings file, torch.optim.SGD in Python), or leave "
        "out `noise_bands`",
    )


def put_gradient(optimizer: Any, parameter: Tensor, mean: Tensor) -> None:
    """Hand a parameter's part of a release to the optimizer, which keeps it: a second copy of all would be as large
    as the model."""
    if isinstance(optimizer, KeepsFloat32):
        optimizer.set_gradient(parameter, mean)
    else:
        parameter.grad = mean.to(parameter.device, parameter.dtype)


@contextmanager
def stepping_without(optimizer: torch.optim.Optimizer, others: Collection[int]) -> Iterator[None]:
    """Inside, an optimizer does not know of some of its parameters, by `id`; it keeps no state of them."""
    groups = [(group, list(group["params"])) for group in optimizer.param_groups]
    for group, parameters in groups:
        group["params"] = [parameter for parameter in parameters if id(parameter) not in others]
    try:
        yield
    finally:
        for group, parameters in groups:
            group["params"] = parameters


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, *, shared: bool = False) -> None:
    """Make sure that an optimizer steps what is trained, nothing else, and every release once.

    Args:
        model: its parameters that require a gradient are trained.
        optimizer: steps them.
        shared: several ranks step some of them each.

    Raises:
        PrivacyError: it does not.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = sum(p.requires_grad and id(p) not in trained for p in stepped)
    missing = [name for key, name in trained.items() if key not in {id(p) for p in stepped}]
    if strangers:
        raise PrivacyError(
            f"the optimizer steps {strangers} parameters that are not the model's.",
            code="dp-outside-mechanism",
            why="what is trained outside the mechanism gets no noise",
            fix="build the optimizer from model.parameters()",
        )
    if missing:
        raise PrivacyError(
            f"`{missing[0]}` is trainable but not in the optimizer ({len(missing)} in all).",
            code="dp-not-stepped",
            why="its gradient would use up clip norm and noise without being learned from",
            fix="freeze it with requires_grad_(False), or add it to the optimizer",
        )
    check_hooks(model)
    if not any(parameter.is_meta for parameter in stepped):
        check_optimizer_step(model, _unwrapped(optimizer), put_gradient)
        if shared:
            check_steps_apart(model, _unwrapped(optimizer), put_gradient)


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "gradient_state") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _unwrapped(optimizer: Any) -> Any:
    """What accelerate's wrapper steps.

    Raises:
        PrivacyError: the wrapper leaves out steps.
    """
    while hasattr(optimizer, "gradient_state") and hasattr(optimizer, "optimizer"):
        every = getattr(optimizer.gradient_state, "num_steps", 1)
        if every != 1 or getattr(optimizer, "scaler", None) is not None:
            raise PrivacyError(
                f"accelerate steps this optimizer every {every} batches"
                if every != 1
                else "accelerate scales this optimizer's gradients (fp16).",
                code="dp-optimizer-step",
                why="each release is paid for when it is counted, and some would not be applied",
                fix="pass the optimizer itself, or an Accelerator without gradient accumulation and fp16",
            )
        optimizer = optimizer.optimizer
    return optimizer
