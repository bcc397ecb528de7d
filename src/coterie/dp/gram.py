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
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 2.0**-24
"""Unit roundoff of float32."""

TRUSTED = 1e-4
"""Largest slack, relative to the squared norm, with which a Gram form is used."""


class SqNorms(NamedTuple):
    """Squared norms and how far rounding may have moved them.

    Attributes:
        value: [B] float64, at least 0.
        slack: [B] float64: the true squared norm is at most ``value + slack`` (see `rounding_factor`).
    """

    value: Tensor
    slack: Tensor

    def plus(self, other: SqNorms) -> SqNorms:
        return SqNorms(self.value + other.value, self.slack + other.slack)

    def trusted(self) -> bool:
        """Whether every finite slack is small beside its value; a record that is not finite is masked later."""
        return not bool((self.slack > TRUSTED * self.value).any())

    @property
    def upper(self) -> Tensor:
        """[B] upper bound of the squared norm."""
        return self.value + self.slack

    @classmethod
    def zeros(cls, count: int, device: torch.device) -> SqNorms:
        zero = torch.zeros(count, dtype=torch.float64, device=device)
        return cls(zero, zero)


def rounding_factor(length: int) -> float:
    """Rounding of a float32 dot product of ``length`` terms, relative to the product of the vectors' lengths.

    The root law of Higham and Mary 2019 (errors of both signs) with a margin of four units. Were every rounding to
    go the same way, as an adversary might try to arrange, it would be ``sqrt(length)`` times larger: `worst_excess`
    turns that into the part of eta that stays.
    """
    return UNIT * (4.0 + math.sqrt(length))


def worst_excess(length: int) -> float:
    """Most by which a *trusted* Gram norm may fall short, if all roundings of all dot products conspire.

    A trusted sum has slack at most `TRUSTED` of its value. The deterministic bound ``length * UNIT`` is larger than
    `rounding_factor` by at most ``sqrt(length)``, so the squared norm is short by at most ``TRUSTED * sqrt(length)``
    beyond the slack already added; half of that for the norm.
    """
    return 0.5 * TRUSTED * max(math.sqrt(length) - 1.0, 0.0)


def gram_is_cheaper(rows: float, inputs: int, outputs: int) -> bool:
    """T^2 (I + O) against T I O multiplications."""
    return rows * (inputs + outputs) < inputs * outputs


def gram_sq_norms(a_BTI: Tensor, g_BTO: Tensor) -> SqNorms:
    """Squared norm of ``sum_t outer(g_t, a_t)`` for each leading index, by dot products.

    Args:
        a_BTI: float32 rows that entered.
        g_BTO: float32 gradients at the output, same rows; a zero row adds nothing.

    Cost: time B T^2 (I + O), memory B T^2.
    """
    a_BTT = torch.bmm(a_BTI, a_BTI.transpose(1, 2))
    g_BTT = torch.bmm(g_BTO, g_BTO.transpose(1, 2))
    return combine_grams(a_BTT, g_BTT, a_BTI.shape[-1], g_BTO.shape[-1])


def combine_grams(a_BTT: Tensor, g_BTT: Tensor, inputs: int, outputs: int) -> SqNorms:
    """``sum(A * G)`` and its slack: each dot product is off by `rounding_factor` of the two vectors' lengths."""
    value = torch.linalg.vecdot(a_BTT.flatten(1), g_BTT.flatten(1)).double().clamp_min(0.0)
    a_length = a_BTT.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt().unsqueeze(-1)
    g_length = g_BTT.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt().unsqueeze(-1)
    crude = (a_length * g_length).sum((1, 2)).double().square()
    factor = rounding_factor(inputs) + rounding_factor(outputs) + rounding_factor(a_BTT.shape[1])
    slack = factor * crude
    if bool((slack > TRUSTED * value).any()):
        # The tighter form of the same bound: |g_t . g_s| instead of |g_t| |g_s| where the other factor is off.
        off_a = (a_length.mT @ (g_BTT.abs() @ a_length)).flatten().double()
        off_g = (g_length.mT @ (a_BTT.abs() @ g_length)).flatten().double()
        off_sum = (a_BTT.abs() * g_BTT.abs()).sum((1, 2)).double()
        slack = (
            rounding_factor(inputs) * off_a
            + rounding_factor(outputs) * off_g
            + rounding_factor(a_BTT.shape[1]) * off_sum
        )
    return SqNorms(value, slack)


def direct_slack(value: Tensor, crude: Tensor, rows: int) -> Tensor:
    """Slack of a norm taken from the gradient itself: each entry is a dot product over ``rows`` rows.

    Args:
        value: [B] squared norm.
        crude: [B] ``sum_t |a_t| |g_t|``, the norm if nothing cancelled.
        rows: T.

    The entries are off by at most ``rounding_factor(T) * crude`` in norm; squaring gives twice that times the norm.
    """
    off = rounding_factor(rows) * crude
    return 2.0 * off * value.sqrt() + off.square() + 4.0 * UNIT * value
