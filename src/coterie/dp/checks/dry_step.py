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
_KNOWN = ("torch.optim.", "coterie.training.optim")
"""Modules of optimizers whose way with a parameter does not depend on its size."""

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

    Cost: nine steps; of torch's and coterie's own optimizers on a few rows of each parameter, of others at any moment
        with one copy of the trained parameters, their gradients and the optimizer's state.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    own = list(_parameters(optimizer))
    before = [_sample(p) for p in own]
    # One copy after the other, each from the start: two side by side would be the most that a run ever holds.
    followed = _tried(optimizer, own, put, [1.0] * _STEPS)
    for number in range(1, _STEPS + 1):
        opposite = _tried(optimizer, own, put, [1.0] * (number - 1) + [-1.0])[-1]
        for place, original in enumerate(own):
            name = names.get(id(original), "a parameter")
            after, earlier = followed[number][place], followed[number - 1][place]
            if not original.requires_grad and not torch.equal(after, earlier):
                raise _unfit(optimizer, f"moves `{name}`, which is frozen")
            if original.requires_grad and original.numel() and torch.equal(after, opposite[place]):
                raise _unfit(optimizer, f"does not move `{name}` by the gradient of step {number}")
    if not all(torch.equal(a, _sample(p)) for a, p in zip(before, own, strict=True)):
        raise _unfit(optimizer, "moves the model itself when a copy of it is stepped")


def _tried(optimizer: Any, own: Sequence[Tensor], put: Put, signs: Sequence[float]) -> list[list[Tensor]]:
    """Samples of a copy's parameters, and after each step with made-up gradients, times a sign each."""
    copied = _Copied(optimizer, own)
    samples = [[_sample(one) for one in copied.parameters]]
    for number, sign in enumerate(signs):
        generator = torch.Generator().manual_seed(number)
        for one in copied.parameters:
            gradient = torch.randn(one.shape, generator=generator).mul_(sign).to(one.device)
            one.grad = None
            if one.requires_grad:
                put(copied.optimizer, one, gradient)
        _step(optimizer, copied.optimizer)
        copied.optimizer.zero_grad()
        samples.append([_sample(one) for one in copied.parameters])
    return samples


def check_steps_apart(model: nn.Module, optimizer: Any, put: Put) -> None:
    """Step a copy with every second parameter alone, which must move as they do beside the others; and one with none,
    as a rank has it that owns nothing of a group.

    Args:
        model: parameters that require a gradient are trained.
        optimizer: steps them; its copies are tried.
        put: how a session hands a gradient over.

    Raises:
        PrivacyError: what an optimizer does with a parameter depends on others.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    originals = list(_parameters(optimizer))
    whole, some, none = (_Copied(optimizer, originals) for _ in range(3))
    for group in none.optimizer.param_groups:
        group["params"] = []
    _step(optimizer, none.optimizer)
    alone = {id(p) for p in some.parameters[::2]}
    for group in some.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in alone]
    for number in range(_STEPS):
        generator = torch.Generator().manual_seed(number)
        for one, other in zip(whole.parameters, some.parameters, strict=True):
            gradient = torch.randn(one.shape, generator=generator).to(one.device)
            one.grad = other.grad = None
            if one.requires_grad:
                put(whole.optimizer, one, gradient)
                if id(other) in alone:
                    put(some.optimizer, other, gradient.clone())
        _step(optimizer, whole.optimizer)
        _step(optimizer, some.optimizer)
    for original, one, other in list(zip(originals, whole.parameters, some.parameters, strict=True))[::2]:
        if not torch.equal(_sample(one), _sample(other)):
            name = names.get(id(original), "a parameter")
            raise PrivacyError(
                f"{type(optimizer).__name__} moves `{name}` by the gradients of other parameters, too.",
                code="dp-optimizer-apart",
                where="a trial on copies, before anything is drawn",
                why="several ranks share out the parameters, and each steps its own",
                fix="use an optimizer that takes each parameter by itself, such as torch.optim.AdamW, or one process",
            )


class _Copied:
    """An optimizer over copies of its parameters, with all of its attributes.

    Torch's own optimizers and coterie's do the same whatever the size of a parameter: before their first step a copy
    of a few rows of each is enough. Others may have looked at the sizes, and get whole copies.
    """

    def __init__(self, optimizer: Any, originals: Sequence[Tensor]) -> None:
        known = type(optimizer).__module__.startswith(_KNOWN) and not optimizer.state
        rows = [_rows(p) if known else p.detach() for p in originals]
        self.parameters = [nn.Parameter(few.clone(), p.requires_grad) for few, p in zip(rows, originals, strict=True)]
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


def _rows(parameter: Tensor) -> Tensor:
    """The first rows, of about as many values as are compared; of as many dimensions."""
    if parameter.numel() <= _SAMPLED or parameter.ndim == 0:
        return parameter.detach()
    return parameter.detach()[: max(1, _SAMPLED * parameter.shape[0] // parameter.numel())]


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
