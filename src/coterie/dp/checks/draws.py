"""Randomness and rounding of a forward under control, for comparisons that ask what records do to each other."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
_UNIFORM = {_aten.rand, _aten.rand_like, _aten.uniform, _aten.uniform_}
_NORMAL = {_aten.randn, _aten.randn_like, _aten.normal, _aten.normal_}
_EXPONENTIAL = {_aten.exponential, _aten.exponential_}
_CHANCE = {_aten.bernoulli, _aten.bernoulli_}
_WHOLE = {_aten.randint}
_WITH_LOW = {_aten.randint.low, _aten.randint.low_generator}
_ROW = 4096
"""Values that a record draws at a time, at least: see `RowDraws`."""
_FROZEN = _UNIFORM | _NORMAL | _EXPONENTIAL | _CHANCE
_PRODUCTS = {
    _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten._grouped_mm, _aten.embedding,
    _aten._scaled_dot_product_flash_attention_for_cpu, _aten.convolution,
}  # fmt: skip


class OneDraw(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every random draw gives one value, the same for all elements of its tensor.

    A record then draws the same in every batch, beside whatever records and at whatever length, so what differs
    between batches is coupling and not chance. Dropout keeps everything. The value follows the state of the generator
    of the CPU, which checkpointed layers put back before they are computed again.

    Args:
        dropout_only: leave other draws as they are. Between batches of one shape they repeat with the seed, orders
            and choices among records included, which one value cannot stand for.

    Attributes:
        others: a draw of whole numbers or places was made, which depends on the shape of the batch.
    """

    def __init__(self, dropout_only: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.others = False
        self._dropout_only = dropout_only

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if packet is _aten.native_dropout:
            kept = 1.0 - float(args[1])
            return args[0] / kept if kept else args[0] * 0.0, torch.ones_like(args[0], dtype=torch.bool)
        args, kwargs = _without_dropout(func, args, kwargs)
        if packet not in _FROZEN or (self._dropout_only and packet not in _CHANCE):
            self.others |= torch.Tag.nondeterministic_seeded in func.tags
            return func(*args, **kwargs)
        state = torch.get_rng_state()
        out: Tensor = func(*args, **kwargs)
        torch.set_rng_state(state)  # what is drawn next must not depend on how many elements this had
        if packet in _CHANCE:
            chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            if func is _aten.bernoulli.default:
                chance = args[0]
            likely = (chance >= 0.5).to(out.dtype) if isinstance(chance, Tensor) else float(chance >= 0.5)
            return out.copy_(likely) if isinstance(likely, Tensor) else out.fill_(likely)
        value = min(max(float(torch.rand(())), 0.01), 0.99)
        if packet in _UNIFORM:
            low, high = _two(args, kwargs, ("from", 0.0), ("to", 1.0), packet)
            return out.fill_(low + value * (high - low))
        if packet in _NORMAL and not any(isinstance(part, Tensor) for part in args[1:3]):
            mean, std = _two(args, kwargs, ("mean", 0.0), ("std", 1.0), packet)
            return out.fill_(mean + std * float(torch.special.ndtri(torch.tensor(value, dtype=torch.float64))))
        if packet in _EXPONENTIAL:
            rate = float(args[1] if len(args) > 1 else kwargs.get("lambd", 1.0))
            return out.fill_(-math.log1p(-value) / rate)
        self.others = True  # a distribution around each element of a tensor
        return out


class RowDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random draws with a row for every record come from a generator of that record's own.

    For collators that draw (masked language modelling): a made-up record then draws the same alone and beside others,
    at whatever length, as long as its tokens begin in the first column.

    Args:
        seeds: one for every record, in the order of the rows.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if packet not in _UNIFORM | _CHANCE | _WHOLE:
            return func(*args, **kwargs)
        state = torch.get_rng_state()
        out: Tensor = func(*args, **kwargs)
        if out.ndim < 2 or out.shape[0] != len(self._rows):
            return out
        torch.set_rng_state(state)
        width = math.prod(out.shape[1:])
        # A generator gives other numbers for another count, so that a longer row would begin differently.
        drawn = [
            torch.rand(-(-width // _ROW) * _ROW, generator=row, dtype=torch.float64)[:width] for row in self._rows
        ]
        uniform = torch.stack(drawn).reshape(out.shape)
        if packet in _CHANCE:
            chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return out.copy_(uniform < (args[0] if func is _aten.bernoulli.default else chance))
        if packet in _WHOLE:
            low, high = (args[0], args[1]) if func in _WITH_LOW else (0, args[0])
            return out.copy_((low + uniform * (high - low)).floor())
        low, high = _two(args, kwargs, ("from", 0.0), ("to", 1.0), packet)
        return out.copy_(low + uniform * (high - low))


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products come out as if rounded more coarsely: each value times (1 + factor * eps * normal noise).

    What a record computes by itself has to stand this before it is a witness for anything.

    Args:
        factor: how many times coarser.
        seed: of the noise, which has a generator of its own: what the model draws stays the same.
    """

    def __init__(self, factor: float, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._factor = factor
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in _PRODUCTS:
            return out
        if isinstance(out, tuple):
            return (self._rounded(out[0]), *out[1:])
        return self._rounded(out)

    def _rounded(self, out: Tensor) -> Tensor:
        if not out.is_floating_point():
            return out
        if out.device not in self._generators:
            self._generators[out.device] = torch.Generator(out.device).manual_seed(self._seed)
        noise = torch.randn(out.shape, generator=self._generators[out.device], device=out.device)
        return (out * (1 + self._factor * torch.finfo(out.dtype).eps * noise)).to(out.dtype)


@contextmanager
def repeated(seed: int, devices: list[torch.device], *modes: TorchDispatchMode) -> Iterator[None]:
    """Inside, torch, numpy and ``random`` draw from ``seed``; afterwards they go on where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"]))
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        for mode in modes:
            stack.enter_context(mode)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def generators(devices: list[torch.device]) -> list[Any]:
    """States of everything that a forward may draw from, to see whether it did: torch's, then Python's own two."""
    cuda = [torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"]
    _, keys, place, *_rest = np.random.get_state(legacy=True)
    drawn = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    return [drawn, random.getstate(), (np.asarray(keys).tobytes(), place)]


def _without_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments of a fused attention with its dropout off."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return args, kwargs
    place = names.index("dropout_p")
    if place < len(args):
        return (*args[:place], 0.0, *args[place + 1 :]), kwargs
    return args, kwargs | {"dropout_p": 0.0}


def _two(args: Any, kwargs: dict[str, Any], first: Any, second: Any, packet: Any) -> tuple[float, float]:
    """The two numbers of a distribution, where this form of the function takes them."""
    given = list(args[1:3]) if packet in (_aten.uniform, _aten.uniform_, _aten.normal_, _aten.normal) else []
    if packet is _aten.normal and args and not isinstance(args[0], Tensor):
        given = list(args[0:2])
    numbers = [
        float(given[i] if len(given) > i else kwargs.get(name, default))
        for i, (name, default) in enumerate((first, second))
    ]
    return numbers[0], numbers[1]
