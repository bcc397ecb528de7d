"""The matrix products of norms and sums: in float32, or, where asked for, of parts of numbers on tensor cores.

A TF32 product reads 11 significant bits of each operand and adds up in float32. bfloat16 and float16 hold no more, so
nothing of them is lost; a float32 number is a sum of `parts` that have no more either. What is left is how a tensor
core adds up: in groups of 4 products or more, cut off instead of rounded, so that errors go the same way (Fasi et al.
2021, doi:10.7717/peerj-cs.330; Khattak and Mikaitis 2025, arXiv:2512.07004). Slack that is `certain` covers that.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from coterie.dp.per_sample.precision import tensor_float32
from coterie.errors import PrivacyError

_KEPT = -(1 << 13)
"""Bits of a float32 number that TF32 has too: sign, exponent, 10 of the 23 stored digits."""

_NARROW = (torch.bfloat16, torch.float16)

_MEASURED = ((8, 0), (8, 9), (9, 0), (10, 0))
"""Compute capabilities whose TF32 sums are known to the bit: A100, L40S, H100 and H200, B200 (arXiv:2512.07004)."""


class _Law:
    """Which products, and which slack, the engines at work use.

    It is the whole process's: autograd calls an engine's hooks in threads of its own, and torch has one switch for
    TF32. So an engine that uses tensor cores is at work alone.
    """

    def __init__(self) -> None:
        self.tensor_cores = False
        self._lock = threading.Lock()
        self._at_work: Counter[int] = Counter()

    @contextmanager
    def held(self, tensor_cores: bool) -> Iterator[None]:
        thread = threading.get_ident()
        with self._lock:
            if thread not in self._at_work:
                if self._at_work and (tensor_cores or self.tensor_cores):
                    raise _not_alone()
                self.tensor_cores = tensor_cores
            self._at_work[thread] += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work[thread] -= 1
                self._at_work += Counter()  # drops threads that are done
                if not self._at_work:
                    self.tensor_cores = False


_LAW = _Law()


@contextmanager
def law(tensor_cores: bool) -> Iterator[None]:
    """Inside, an engine is at work; with ``tensor_cores`` its products on a GPU whose arithmetic is known are TF32
    products of parts, and slack is `certain`. Within another one, the outer one's choice holds.

    Raises:
        PrivacyError: an engine is at work in another thread, and one of the two uses tensor cores.
    """
    with _LAW.held(tensor_cores):
        yield


def certain() -> bool:
    """Whether every slack has to hold however additions are rounded, not only where errors go both ways."""
    return _LAW.tensor_cores


def _not_alone() -> PrivacyError:
    return PrivacyError(
        "an engine with `tensor_cores` and another engine are at work in two threads of one process.",
        code="dp-tensor-cores-threads",
        why="torch has one switch for TF32, so the other's norms would be rounded beyond their bound",
        fix="train one after the other or in processes of their own, or leave out `tensor_cores`",
    )


def parts(x: Tensor, count: int) -> list[Tensor]:
    """Float32 numbers cut into parts that TF32 holds, of the same sign, largest first.

    Three add up to ``x`` exactly, two to all but ``2^-21 |x|``. TF32 has nothing below 2^-136: of numbers below
    2^-113 less than that may be missing. Infinity and NaN give parts whose sum is NaN.
    """
    found = []
    for _ in range(count):
        part = (x.view(torch.int32) & _KEPT).view(torch.float32)
        found.append(part)
        x = x - part
    return found


def operand(rows: Tensor) -> Tensor:
    """Rows as products take them: float32, or in their own type where that tells that one part is all of them."""
    return rows if rows.dtype in _NARROW and _taken(rows) else rows.float()


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32, of one matrix or of as many as there are on both sides; `operand`s."""
    if not _taken(left):
        return torch.matmul(left, right)
    shape = (*left.shape[:-1], right.shape[-1])
    out = torch.empty(shape, dtype=torch.float32, device=left.device)
    flat_out, flat_left, flat_right = (x if x.ndim == 2 else x.flatten(0, -3) for x in (out, left, right))
    add_product(flat_out, flat_left, flat_right, fresh=True)
    return out


def add_product(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """``out += left @ right``, of one matrix or of a stack; ``fresh``: ``out`` is written and not read.

    Args:
        out: float32, any strides.
        left: `operand`, as ``right``.
        right: see ``left``.
        fresh: see above.
    """
    if not _taken(left):
        _add(out, left, right, fresh)
        return
    # Smallest first: whether a core begins with what is in `out` or adds it at the end, the long sum is taken once.
    with tensor_float32():
        for left_part, right_part in _pairs(left, right):
            _add(out, left_part, right_part, fresh)
            fresh = False


def _pairs(left: Tensor, right: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Parts whose products add up to the product: all but ``2^-19`` of ``|left| |right|``, smallest first."""
    lefts, rights = ([x.float()] if x.dtype in _NARROW else parts(x, 2) for x in (left, right))
    pairs = [(a, b) for i, a in enumerate(lefts) for j, b in enumerate(rights) if i + j < 2]
    return pairs[::-1]


def _add(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    add = torch.addmm if out.ndim == 2 else torch.baddbmm
    add(out, left, right, beta=0 if fresh else 1, out=out)


def _taken(rows: Tensor) -> bool:
    return _LAW.tensor_cores and known(rows.device)


@functools.cache
def known(device: torch.device) -> bool:
    """Whether the arithmetic of a device's tensor cores is published, so that its rounding is bounded."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) in _MEASURED
    )
