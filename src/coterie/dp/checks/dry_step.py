"""Whether an optimizer applies every release once, found at set-up on copies; the model and its optimizer stay.

A release is paid for when it is counted. An optimizer that waits for four of them, steps only with a closure, or
wants sparse gradients would waste it, or fail after it was counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coterie.errors import PrivacyError

_STEPS = 3
_SAMPLED = 256
"""Values of a parameter that are compared."""

Put = Callable[[Any, Tensor, Tensor], None]
"""Gives an optimizer the gradient of a parameter."""


def check_optimizer_step(model: nn.Module, optimizer: Any, put: Put) -> None:
    """Step copies with made-up gradients and with their opposites: each must move each trained parameter by them.

    Args:
        model: parameters that require a gradient are trained.
        optimizer: steps them; its copy is tried.
        put: how a session hands a gradient over.

    Raises:
        PrivacyError: a step fails, does not follow the gradient it is given, or moves a parameter that is frozen.

    Cost: two copies of the trained parameters and of the optimizer's state, for three steps.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    own = list(_parameters(optimizer))
    before = [_sample(p) for p in own]
    state = _Copied(optimizer)
    for number in range(_STEPS):
        other = _Copied(state.optimizer, state.parameters)
        generator = torch.Generator().manual_seed(number)
        for one, opposite in zip(state.parameters, other.parameters, strict=True):
            gradient = torch.randn(one.shape, generator=generator).to(one.device)
            one.grad = opposite.grad = None
            if one.requires_grad:
                put(state.optimizer, one, gradient)
                put(other.optimizer, opposite, -gradient)
        held = [None if p.requires_grad else _sample(p) for p in state.parameters]
        _step(optimizer, state.optimizer)
        _step(optimizer, other.optimizer)
        for original, one, opposite, kept in zip(own, state.parameters, other.parameters, held, strict=True):
            name = names.get(id(original), "a parameter")
            if kept is not None and not torch.equal(kept, _sample(one)):
                raise _unfit(optimizer, f"moves `{name}`, which is frozen")
            if kept is None and one.numel() and torch.equal(_sample(one), _sample(opposite)):
                raise _unfit(optimizer, f"does not move `{name}` by the gradient of step {number + 1}")
        state.optimizer.zero_grad()
    if not all(torch.equal(a, _sample(p)) for a, p in zip(before, own, strict=True)):
        raise _unfit(optimizer, "moves the model itself when a copy of it is stepped")


class _Copied:
    """An optimizer over copies of its parameters, with all of its attributes."""

    def __init__(self, optimizer: Any, parameters: Sequence[Tensor] | None = None) -> None:
        originals = parameters or list(_parameters(optimizer))
        self.parameters = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in originals]
        memo: dict[int, Any] = dict(zip(map(id, originals), self.parameters, strict=True))
        try:
            self.optimizer = _copy(optimizer, memo)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise _unfit(optimizer, f"cannot be tried on a copy ({type(error).__name__})") from None


def _copy(optimizer: Any, memo: dict[int, Any]) -> Any:
    # Optimizers define which of their attributes a copy gets, and leave out those of subclasses.
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    for inner in _inner(optimizer):
        if id(inner) not in memo:
            _copy(inner, memo)
    for name, value in vars(optimizer).items():
        if name == "step" and getattr(value, "_wrapped_by_lr_sched", False):
            continue  # a schedule counts steps of the original through it
        if name == "step" and not hasattr(value, "__self__"):
            raise TypeError("its step was replaced by a function")
        twin.__dict__[name] = copy.deepcopy(value, memo)
    return twin


def _inner(optimizer: Any) -> Iterator[Any]:
    for value in vars(optimizer).values():
        values = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        )
        yield from (one for one in values if isinstance(one, torch.optim.Optimizer))


def _step(original: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), Tensor):
            group["lr"].fill_(1.0)
        elif isinstance(group.get("lr"), int | float):
            group["lr"] = 1.0  # a schedule may start from zero
    try:
        optimizer.step()
    except Exception as error:  # whatever an optimizer of the caller's raises
        raise _unfit(original, f"cannot step without more than gradients ({type(error).__name__})") from None


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].clone()


def _unfit(optimizer: Any, what: str) -> PrivacyError:
    return PrivacyError(
        f"{type(optimizer).__name__} {what}.",
        code="dp-optimizer-step",
        where="a trial on copies, before anything is drawn",
        why="each release is paid for when it is counted, and would not be applied, or not once",
        fix="use an optimizer whose step() applies the gradients it finds, such as torch.optim.AdamW; lot_size is "
        "the batch, and nothing has to be accumulated",
    )
