"""The matrix products of norms and sums: in float32, or, where that was enabled, of parts of numbers on tensor cores.

A TF32 product reads 11 significant bits of each operand and adds up in float32. bfloat16 and float16 hold no more, so
nothing of them is lost; a float32 number is a sum of `parts` that have no more either. What is left is how a tensor
core adds up: in groups of 4 products or more, cut off instead of rounded, so that errors go the same way (Fasi et al.
2021, doi:10.7717/peerj-cs.330; Khattak and Mikaitis 2025, arXiv:2512.07004). Slack that is `certain` covers that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from coterie.dp.per_sample.precision import tensor_float32

_KEPT = -(1 << 13)
"""Bits of a float32 number that TF32 has too: sign, exponent, 10 of the 23 stored digits."""

_NARROW = (torch.bfloat16, torch.float16)

_MEASURED = ((8, 0), (8, 9), (9, 0), (10, 0))
"""Compute capabilities whose TF32 sums are known to the bit: A100, L40S, H100 and H200, B200 (arXiv:2512.07004)."""

_enabled = False


@contextmanager
def on_tensor_cores() -> Iterator[None]:
    """Inside, products on a GPU whose arithmetic is known are TF32 products of parts, and slack is `certain`.

    For the whole process: no engine may be at work in another thread when it begins or ends, and a run on several
    ranks has it on all of them, from before its first batch.
    """
    global _enabled
    before, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = before


def certain() -> bool:
    """Whether every slack has to hold however additions are rounded, not only where errors go both ways."""
    return _enabled


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
    return _enabled and _known(rows.device)


@functools.cache
def _known(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) in _MEASURED
    )
