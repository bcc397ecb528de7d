"""Rows whose products float32 cannot hold, scaled by powers of two, which changes no digit.

Rows near 5e17 and gradients near 2e-23 make an ordinary gradient of 1e-5, but ``g . g`` is zero in float32. A host
that chooses the weights chooses these sizes. So every pair of rows is looked at before any product: `bounded` says
that underflow and overflow cannot matter, `balance` makes it so.

Shape letters: R rows of all records, B records, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.dp.per_sample.gram_kernel import SegmentNorms

UNSEEN = 2.0**-60
"""Most that underflow takes from the squared norm of a parameter whose rows are `bounded`; added to every one."""

_REACH = 2.0**62
SMALLEST = 2.0**-126
"""Factors below are zero: a record whose norm is beyond ``threshold / SMALLEST`` counts as not finite."""

_FAR_BELOW = -(1 << 20)


def bounded(a: Tensor, g: Tensor, rows: int, norms: SegmentNorms | None = None) -> bool:
    """Whether products of these rows neither overflow float32 nor lose more than `UNSEEN` to underflow.

    Args:
        a: [.., I] rows that entered.
        g: [.., O] gradients at the output.
        rows: most rows that are added up to one gradient.
        norms: of these rows; where they are taken, their sums of squares need not be taken again.

    A dot product loses at most ``2 n 2^-126`` for n terms, also where subnormal numbers count as zero. Summed over
    all pairs of rows, the squared norm is off by at most ``2^-125 rows (O |a|^2 + I |g|^2)``, norms over all rows;
    and no sum of products exceeds ``|a|^2 |g|^2``. Rows that are not finite are not bounded.
    """
    if norms is not None and norms.reach_S is not None and int(norms.rows_S.sum()) == g[..., 0].numel():
        return bool(norms.reach_S.sum() <= _REACH)
    a_norm, g_norm = (torch.linalg.vector_norm(x, dtype=torch.float32).double() for x in (a, g))
    reach = rows * (g.shape[-1] * a_norm.square() + a.shape[-1] * g_norm.square())
    return bool(reach <= _REACH)


def balance(a_RI: Tensor, g_RO: Tensor, record_R: Tensor, records: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same outer products from rows of similar size, relative to the largest of their record.

    Returns:
        ``a_RI``, ``g_RO`` in float32 with entries below 1, and ``exponent_B`` int64: the gradient of record b is
        ``2^exponent_b`` times the sum of its new rows' outer products, of which the largest is at least 1/4 of 1.
        Rows that are not finite stay as they are. What underflows now is below ``2^-60`` of the record's largest
        product, and so far inside the slack.
    """
    a, g = a_RI.double(), g_RO.double()
    a_size, g_size = a.abs().amax(-1), g.abs().amax(-1)
    finite = torch.isfinite(a_size) & torch.isfinite(g_size)
    live = finite & (a_size > 0) & (g_size > 0)
    a_exponent, g_exponent = (torch.frexp(size).exponent.long() for size in (a_size, g_size))
    both = torch.where(live, a_exponent + g_exponent, _FAR_BELOW)
    largest = torch.full((records,), _FAR_BELOW, device=a.device)
    largest = largest.scatter_reduce(0, record_R, both, "amax")
    exponent_B = torch.where(largest == _FAR_BELOW, 0, largest)
    below = both - exponent_B[record_R]
    half = below // 2
    kept = torch.where(finite, 0.0, 1.0)
    a_scale, g_scale = (
        torch.where(live, power_of_two(shift), kept).unsqueeze(-1)
        for shift in (half - a_exponent, below - half - g_exponent)
    )
    return (a * a_scale).float(), (g * g_scale).float(), exponent_B


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^exponent`` as float64 without rounding; exponents beyond float64's normal range become its ends."""
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def single(factors_B: Tensor) -> Tensor:
    """Factors in float32. What would be subnormal becomes zero: rounded, it could be twice as large."""
    return torch.where(factors_B.abs() < SMALLEST, 0.0, factors_B).float()
