"""Squared norms of sums of outer products, from dot products between rows, with a bound on the rounding.

The gradient of a matrix from one record is ``sum_t outer(g_t, a_t)``. Its squared norm is
``sum_{t,s} (a_t . a_s)(g_t . g_s)`` ("ghost norm", Li et al. 2022, arXiv:2110.05679; Goodfellow 2015), which never
forms the matrix. In floating point that sum can cancel: rows with a large common part gave -5.5e7 for a true 4.2e6.
So every result here comes with `slack`, a bound on its rounding error, and the caller takes the direct form where
the slack is too large.

Shape letters: B records (or segments of rows), T rows of each, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.dp.per_sample.gram_kernel import PIECE, SegmentNorms, take_all
from coterie.dp.per_sample.products import certain, multiply

UNIT = 2.0**-24
"""Unit roundoff of float32."""

TRUSTED = 1e-4
"""Largest slack, relative to the squared norm, with which a Gram form is used."""

TRUSTED_CERTAIN = 1e-2
"""The same where slack is certain: eta has nothing of it, and half of it is the most that a record is clipped too
much."""


_SHARE: ContextVar[float] = ContextVar("share of the trusted slack", default=1.0)
"""See `trusted_by`."""

LONGEST = 4096
"""Terms of a dot product that are added up at once."""

_BLOCK = 64
"""Rows of a block of a symmetric product of which only the lower half is formed."""


class SqNorms(NamedTuple):
    """Squared norms and how far rounding may have moved them.

    Attributes:
        value: [B] float64, at least 0.
        slack: [B] float64: the true squared norm is at most ``value + slack`` (see `rounding_factor`).
    """

    value: Tensor
    slack: Tensor

    def trusted(self) -> bool:
        """Whether every finite slack is small beside its value; a record that is not finite is masked later."""
        return _small(self.slack, self.value)

    def trusted_rows(self) -> Tensor:
        """[G] bool, for [G, B] norms: no record's slack matters in the group."""
        return ~(self.slack > trusted_share() * self.value).any(1)

    @property
    def upper(self) -> Tensor:
        """[B] upper bound of the squared norm."""
        return self.value + self.slack

    @property
    def least(self) -> Tensor:
        """[B] lower bound of the squared norm, were all roundings of all dot products to conspire."""
        return (self.value - conspiracy() * self.slack).clamp_min(0.0)

    @classmethod
    def zeros_like(cls, other: SqNorms) -> SqNorms:
        """Zeros in the shape of other norms."""
        return cls(torch.zeros_like(other.value), torch.zeros_like(other.slack))

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> SqNorms:
        zero = torch.zeros(count, dtype=torch.float64, device=device)
        return cls(zero, zero)


def rounding_factor(length: int) -> float:
    """Rounding of a float32 dot product of ``length`` terms, relative to the product of the vectors' lengths.

    The root law of Higham and Mary 2019 (errors of both signs) with a margin of four units. Were every rounding to
    go the same way, as an adversary might try to arrange, it would be ``sqrt(length)`` times larger: `worst_excess`
    turns that into the part of eta that stays.

    Where it has to be `certain`: two units a term bound additions in any order and direction, also those of tensor
    cores (at most 7 units for 4 products), and 64 the rest of a product of parts.
    """
    return UNIT * (2.0 * length + 64.0 if certain() else 4.0 + math.sqrt(length))


def rounding_factors(length_B: Tensor) -> Tensor:
    """`rounding_factor` of each length, float64."""
    length_B = length_B.double()
    return UNIT * (2.0 * length_B + 64.0 if certain() else 4.0 + length_B.sqrt())


def trusted_share() -> float:
    """Slack, relative to the squared norm, up to which nothing more careful is tried."""
    return (TRUSTED_CERTAIN if certain() else TRUSTED) * _SHARE.get()


@contextmanager
def trusted_by(ranks: int) -> Iterator[None]:
    """Inside, less slack is trusted: so much that what some ranks trust of their parts is trusted of the whole.

    A rank has a part v of a squared norm with slack s, and knows a `least` of the others' parts. Over all W ranks
    parts add up to V, and slack to S. As the others' least is at most V - v + c S (c: `conspiracy`),
    ``s <= share t (v + least)`` at every rank makes ``S <= share t (W V + (W - 1) c S)``. With the share below that
    is ``S <= t V``.
    """
    own = _SHARE.set(1.0 / (ranks + (ranks - 1) * conspiracy() * trusted_share()))
    try:
        yield
    finally:
        _SHARE.reset(own)


def conspiracy() -> float:
    """How often the bound of `rounding_factor` fits into what a dot product is off by if all roundings conspire.

    The root of the longest one: pieces of `LONGEST`, and as many of these as fewer than 2^24 entries make.
    """
    return 1.0 if certain() else math.sqrt(2 * LONGEST)


def worst_excess(length: int) -> float:
    """Most by which a *trusted* Gram norm may fall short, if all roundings of all dot products conspire.

    A trusted sum has slack at most `TRUSTED` of its value. The deterministic bound ``length * UNIT`` is larger than
    `rounding_factor` by at most ``sqrt(length)``, so the squared norm is short by at most ``TRUSTED * sqrt(length)``
    beyond the slack already added; half of that for the norm. Dot products are taken in pieces of `LONGEST`.
    """
    length = min(length, LONGEST + length // LONGEST)
    return 0.5 * TRUSTED * max(math.sqrt(length) - 1.0, 0.0)


def gram_is_cheaper(rows: float, inputs: int, outputs: int) -> bool:
    """T^2 (I + O) against T I O multiplications; of more than `_BLOCK` rows, only the lower half is formed."""
    formed = rows if rows <= _BLOCK else (rows + _BLOCK) / 2
    return formed * (inputs + outputs) < inputs * outputs


def gram_sq_norms(a_BTI: Tensor, g_BTO: Tensor, real_BT1: Tensor | None = None, precise: bool = False) -> SqNorms:
    """Squared norm of ``sum_t outer(g_t, a_t)`` for each leading index, by dot products.

    Args:
        a_BTI: rows that entered; `operand`.
        g_BTO: gradients at the output, same rows; `operand`.
        real_BT1: 1.0 for rows that count, 0.0 for padding; None: all count.
        precise: where the cheap slack is not small, bound the same rounding more tightly.

    Cost: time B T^2 (I + O), memory B T^2.
    """
    inputs, outputs, rows = a_BTI.shape[2], g_BTO.shape[2], a_BTI.shape[1]
    if real_BT1 is None and rows > _BLOCK:
        value, crude = _lower_half_values(a_BTI, g_BTO)
        value = value.clamp_min(0.0)
        cheap = SqNorms(value, gram_slack(value, crude, torch.full_like(crude, rows), inputs, outputs))
        if not precise or cheap.trusted():
            return cheap
    a_BTT, g_BTT = _products(a_BTI, a_BTI), _products(g_BTO, g_BTO)
    if real_BT1 is not None:
        g_BTT *= real_BT1 * real_BT1.mT
    value = (a_BTT * g_BTT).sum(2).double().sum(1).clamp_min(0.0)
    a_length, g_length = _lengths(a_BTT).unsqueeze(2), _lengths(g_BTT).unsqueeze(2)
    off_a, off_g, off_sum = _dot_factor(inputs), _dot_factor(outputs), rounding_factor(rows)
    crude = (a_length * g_length).sum((1, 2)).double()
    added = sum_slack(value, crude, rows)
    slack = (off_a + off_g + off_sum) * crude.square() + added
    if not precise or _small(slack, value):
        return SqNorms(value, slack)
    # Where one factor is off, the other counts with its true size instead of |g_t| |g_s|.
    a_size, g_size = a_BTT.abs_(), g_BTT.abs_()
    by_a = (a_length.mT @ (g_size @ a_length)).flatten()
    by_g = (g_length.mT @ (a_size @ g_length)).flatten()
    by_sum = (a_size * g_size).flatten(1).sum(1)
    slack = (off_a * by_a + off_g * by_g + off_sum * by_sum).double() + added
    if _small(slack, value) or not gram_is_cheaper(2 * rows, inputs, outputs):
        return SqNorms(value, slack)
    # A dot product is off relative to the sum of its terms' sizes, which is small where few entries are shared.
    by_a = (_products(a_BTI.abs(), a_BTI.abs()) * g_size).flatten(1).sum(1)
    by_g = _products(g_BTO.abs(), g_BTO.abs()) * a_size
    if real_BT1 is not None:
        by_g *= real_BT1 * real_BT1.mT
    return SqNorms(value, (off_a * by_a + off_g * by_g.flatten(1).sum(1) + off_sum * by_sum).double() + added)


def _products(left_BTX: Tensor, right_BSX: Tensor) -> Tensor:
    """[B, T, S] dot products; long ones in pieces of `LONGEST`, so that rounding does not grow with the width."""
    out = multiply(left_BTX[..., :LONGEST], right_BSX[..., :LONGEST].mT)
    for start in range(LONGEST, left_BTX.shape[2], LONGEST):
        piece = slice(start, start + LONGEST)
        out += multiply(left_BTX[..., piece], right_BSX[..., piece].mT)
    return out


def _dot_factor(length: int) -> float:
    """`rounding_factor` of `_products`, which takes long dot products in pieces."""
    return rounding_factor(min(length, LONGEST + length // LONGEST) if certain() else length)


def gram_values(a_BTI: Tensor, g_BTO: Tensor, real_BT1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[B] float64 squared norms by dot products, and ``sum_t |a_t| |g_t|``, of which `gram_slack` makes a bound.

    Args:
        a_BTI: as in `gram_sq_norms`.
        g_BTO: as in `gram_sq_norms`.
        real_BT1: as in `gram_sq_norms`.
    """
    if real_BT1 is None and a_BTI.shape[1] > _BLOCK:
        return _lower_half_values(a_BTI, g_BTO)
    products, g_BTT = _products(a_BTI, a_BTI), _products(g_BTO, g_BTO)
    lengths = _lengths(products) * _lengths(g_BTT)
    products *= g_BTT
    if real_BT1 is not None:
        lengths *= real_BT1.squeeze(-1)
        products *= real_BT1 * real_BT1.mT
    return products.sum(2).double().sum(1), lengths.sum(1).double()


def _lengths(products_BTT: Tensor) -> Tensor:
    """[B, T] lengths of the rows whose dot products these are."""
    return products_BTT.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()


def gram_slack(value_B: Tensor, crude_B: Tensor, rows_B: Tensor, inputs: int, outputs: int) -> Tensor:
    """[B] bound on the rounding of `gram_values`, and of the sum.

    Args:
        value_B: the squared norms, at least 0.
        crude_B: ``sum_t |a_t| |g_t|``.
        rows_B: T of each, float64.
        inputs: I.
        outputs: O.
    """
    factor = _dot_factor(inputs) + _dot_factor(outputs) + rounding_factors(rows_B)
    return factor * crude_B.square() + sum_slack(value_B, crude_B, rows_B)


def taken(norms: SegmentNorms | None, inputs: int, outputs: int) -> SqNorms | None:
    """What a compiled pass found, per segment, or finds now; None where there is none.

    Only inside pieces of dot products, and in the clipped sum, is anything added up in float32.
    """
    if norms is None:
        return None
    take_all([norms])
    if norms.value_S is None or norms.crude_S is None:
        return None
    factor = rounding_factor(min(inputs, PIECE)) + rounding_factor(min(outputs, PIECE))
    value = norms.value_S.clamp_min(0.0)
    return SqNorms(value, factor * norms.crude_S.square() + sum_slack(value, norms.crude_S, norms.rows_S))


def _lower_half_values(a_BTI: Tensor, g_BTO: Tensor) -> tuple[Tensor, Tensor]:
    rows = a_BTI.shape[1]
    value = torch.zeros(a_BTI.shape[0], dtype=torch.float64, device=a_BTI.device)
    crude = torch.zeros_like(value)
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        products = _products(a_BTI[:, start:stop], a_BTI[:, :stop])
        g_products = _products(g_BTO[:, start:stop], g_BTO[:, :stop])
        crude += (_lengths(products[:, :, start:]) * _lengths(g_products[:, :, start:])).sum(1).double()
        products *= g_products
        by_row = products[:, :, start:].sum(2).double() + 2.0 * products[:, :, :start].sum(2).double()
        value += by_row.sum(1)
    return value, crude


def _small(slack: Tensor, value: Tensor) -> bool:
    return not bool((slack > trusted_share() * value).any())


def sum_slack(value: Tensor, crude: Tensor, rows: int | Tensor) -> Tensor:
    """What the rounding of a gradient of outer products adds to its squared norm.

    Args:
        value: [B] squared norm.
        crude: [B] ``sum_t |a_t| |g_t|``, the norm if nothing cancelled.
        rows: T, or [B] where it differs.

    Each entry is a dot product over T rows, so all are off by ``rounding_factor(T) * crude`` in norm at most, which
    squared gives twice that times the norm.
    """
    off = (rounding_factor(rows) if isinstance(rows, int) else rounding_factors(rows)) * crude
    return 2.0 * off * value.sqrt() + off.square()


def direct_slack(value: Tensor, crude: Tensor, rows: int | Tensor, length: int) -> Tensor:
    """Slack of a norm from a gradient that is formed once for its norm, and in other products for the sum.

    Both are rounded, each by as much as `sum_slack` says. ``length`` as in `norm_slack`.
    """
    return sum_slack(value, 2.0 * crude, rows) + norm_slack(value, length)


def square_norms(gradients_B: Tensor) -> Tensor:
    """[B] float64 squared norms of tensors [B, *shape], in float32 by rows and in double where these overflow."""
    rows = gradients_B.reshape(gradients_B.shape[0], -1, gradients_B.shape[-1] if gradients_B.ndim > 1 else 1)
    pieces = [torch.linalg.vector_norm(piece, dim=-1, dtype=torch.float32) for piece in torch.split(rows, LONGEST, 2)]
    value = torch.stack([piece.double().square().sum(1) for piece in pieces]).sum(0)
    if bool(torch.isfinite(value).all()):
        return value
    norms: Tensor = torch.linalg.vector_norm(rows, dim=(1, 2), dtype=torch.float64)
    return norms.square()


def norm_slack(value: Tensor, length: int) -> Tensor:
    """Slack of `square_norms` of the very tensor that is added, of rows of ``length``."""
    return rounding_factor(min(length, LONGEST)) * value
