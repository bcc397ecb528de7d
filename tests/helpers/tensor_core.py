"""TF32 products as a tensor core takes them, computed on the processor, with the engine's products sent through them.

The arithmetic is that of an A100 (Khattak and Mikaitis 2025, arXiv:2512.07004), which loses more than later ones:
operands are read with 11 significant bits; what was added up so far and 4 products are cut off at 24 binary places
below the largest one's leading digit, added, and the sum is cut off at 24 digits. Nothing is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from coterie.dp.per_sample import gram_kernel, products

GROUP, EXTRA = 4, 1
_LARGEST = torch.finfo(torch.float32).max


def tf32_product(left: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """``start + left @ right`` in float32, [.., M, K] with [.., K, N]."""
    rows, columns = (_read(x).unsqueeze(dim) for x, dim in ((left, -2), (right.mT, -3)))
    total = start.double()
    for k in range(0, left.shape[-1], GROUP):
        terms = torch.cat([total.unsqueeze(-1), rows[..., k : k + GROUP] * columns[..., k : k + GROUP]], -1)
        total = _cut(_cut(terms, terms.abs().amax(-1, keepdim=True), 23 + EXTRA).sum(-1))
        total = torch.where(total.abs() > _LARGEST, total.sign() * torch.inf, total)
    return total.float()


def _read(x: Tensor) -> Tensor:
    """The digits that a tensor core sees of a float32 number."""
    assert x.dtype == torch.float32
    return ((x.contiguous().view(torch.int32) >> 13) << 13).view(torch.float32).double()


def _cut(x: Tensor, beside: Tensor | None = None, places: int = 23) -> Tensor:
    """Toward zero, at so many places below the leading digit of ``beside``, or of ``x``; infinity and NaN stay."""
    exponent = torch.frexp(x if beside is None else beside).exponent - 1
    place = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), (exponent - places).clamp_min(-149 - EXTRA))
    return torch.where(torch.isfinite(x), (x / place).trunc() * place, x)


@contextmanager
def known_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the processor counts as a GPU whose tensor cores are known: products are taken by `tf32_product` where
    an engine uses tensor cores."""

    in_float32 = products._add  # noqa: SLF001 - what is emulated

    def add(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
        if not products.certain():
            in_float32(out, left, right, fresh)
            return
        assert torch.get_float32_matmul_precision() == "high"
        out.copy_(tf32_product(left, right, torch.zeros_like(out) if fresh else out))

    with monkeypatch.context() as patched:
        patched.setattr(products, "known", lambda device: True)
        patched.setattr(products, "_add", add)
        patched.setattr(gram_kernel, "_WORTH_STARTING", 1 << 62)  # the compiled pass multiplies by itself
        yield


@contextmanager
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same, with tensor cores for everything inside."""
    with known_processor(monkeypatch), products.law(tensor_cores=True):
        yield
