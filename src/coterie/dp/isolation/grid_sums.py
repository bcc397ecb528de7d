"""Sums of clipped gradients as integers on the noise's public grid.

Integers add up exactly and in any order, so what one unit adds is all that it changes. A contribution is rounded
toward zero, which never makes its norm larger: what `coterie.dp.noise.discrete_gaussian` calls the cost of rounding
is nothing here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.dp.threads import run_in_threads

_CHUNK = 1 << 16
"""Values that are squared, skipped or added together on a CPU: half a megabyte in double precision."""

_CHUNK_ELSEWHERE = 1 << 22
_SLAB = 1 << 20
"""Most values in one piece of work of a thread."""

_WORTH_COMPILING = 1 << 20
"""Values of a contribution from which on compiling (1 s, once in a process) is worth it."""

Kernel = Callable[[np.ndarray, np.ndarray, float], None]
Job = tuple[np.ndarray, np.ndarray, float]


def squares(gradient: Tensor) -> list[float]:
    """Sum of the squares of every chunk of a tensor, in double precision, with a relative error below n 2^-53.

    Squares of float32 numbers are exact in a double, and none of them underflows.
    """
    flat = _flat(gradient)
    if flat.device.type != "cpu":
        parts = [chunk.double().square().sum() for chunk in torch.split(flat, _CHUNK_ELSEWHERE)]
        return torch.stack(parts).tolist() if parts else []
    found = []
    for chunk in torch.split(flat, _CHUNK):
        wide = chunk.double()
        found.append(float(torch.dot(wide, wide)))
    return found


class GridSums:
    """Adds contributions up.

    Args:
        shapes: of what is summed, by name.
        devices: where each sum lies, by name.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], devices: Mapping[str, torch.device]) -> None:
        self._shapes, self._devices = shapes, devices
        self._sums: dict[str, Tensor] = {}

    def add(
        self, gradients: Mapping[str, Tensor], squared: Mapping[str, list[float]], scale: Mapping[str, float]
    ) -> None:
        """Add ``trunc(gradient * scale)`` of every tensor, multiplied in double precision.

        Args:
            gradients: finite, contiguous or not, any floating-point type.
            squared: what `squares` said of each; chunks of zeros are left out.
            scale: by name, grid steps in one unit of the gradient.
        """
        jobs: list[Job] = []
        for name, gradient in gradients.items():
            into = self._of(name).view(-1)
            flat = _flat(gradient).to(into.device)
            size = _CHUNK if gradient.device.type == "cpu" else _CHUNK_ELSEWHERE
            for start, end in _runs(squared[name], size, flat.numel()):
                if into.device.type == "cpu":
                    jobs.append((_plain(flat[start:end]).numpy(), into[start:end].numpy(), scale[name]))
                else:
                    into[start:end] += (flat[start:end].double() * scale[name]).to(torch.int64)
        if jobs:
            values = sum(job[0].shape[0] for job in jobs)
            kernel = compiled() if values >= _WORTH_COMPILING else None
            run_in_threads(partial(_do_all, kernel or _in_numpy), _shares(jobs))

    def take(self) -> dict[str, Tensor]:
        """int64 sums in grid steps, zeros for what nothing was added to; begins anew."""
        for name in self._shapes:
            self._of(name)
        sums, self._sums = self._sums, {}
        return sums

    def _of(self, name: str) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros(self._shapes[name], dtype=torch.int64, device=self._devices[name])
        return self._sums[name]


def _flat(gradient: Tensor) -> Tensor:
    return gradient.detach().contiguous().view(-1)


def _plain(values: Tensor) -> Tensor:
    """In a type that numpy has; half precision is exact in float32."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _runs(squared: list[float], chunk: int, length: int) -> list[tuple[int, int]]:
    """(start, end) of neighbouring chunks that are not all zeros, at most `_SLAB` values or one chunk together."""
    found: list[tuple[int, int]] = []
    for number, square in enumerate(squared):
        if square == 0.0:
            continue
        start, end = number * chunk, min((number + 1) * chunk, length)
        if found and found[-1][1] == start and end - found[-1][0] <= _SLAB:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _shares(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that a thread does together, of about a slab: handing one over costs as much as adding 100,000 values."""
    found: list[list[Job]] = []
    room = 0
    for job in jobs:
        if job[0].shape[0] > room:
            found.append([])
            room = _SLAB
        found[-1].append(job)
        room -= job[0].shape[0]
    return found


def _do_all(kernel: Kernel, jobs: list[Job]) -> None:
    for job in jobs:
        kernel(*job)


def _in_numpy(values: np.ndarray, into: np.ndarray, scale: float) -> None:
    """What the compiled pass does."""
    for start in range(0, values.shape[0], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        into[chunk] += (values[chunk] * np.float64(scale)).astype(np.int64)


@functools.cache
def compiled() -> Kernel | None:
    """The pass as compiled code, which gives the same integers; None without numba."""
    if find_spec("numba") is None:
        return None
    import numba

    jit: Any = numba.njit(nogil=True)

    def add(values: np.ndarray, into: np.ndarray, scale: float) -> None:
        for i in range(values.shape[0]):
            into[i] += np.int64(np.float64(values[i]) * scale)

    kernel: Kernel = jit(add)
    return kernel


def whole(squared: list[float]) -> float:
    """A tensor's squared norm."""
    return math.fsum(squared) if all(map(math.isfinite, squared)) else math.nan
