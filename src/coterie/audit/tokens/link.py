"""Which rows belong together: the same token at two layers, or one token and the next. Shuffling hides neither.

Shape letters: P known pairs, A and B rows to pair, D their width, C canonical directions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coterie.audit.tokens.decoders import whitening

_LARGEST = 0.9999
"""Correlations are taken to be at most this: a finite sample cannot show a perfect one."""


@dataclass(frozen=True)
class Linker:
    """How much likelier two rows are as a pair than by chance, if pairs are jointly normal.

    Attributes:
        first_D, second_D: means.
        first_DC, second_DC: to canonical directions, in which either side has spread one.
        correlation_C: of the two sides.
    """

    first_D: Tensor
    second_D: Tensor
    first_DC: Tensor
    second_DC: Tensor
    correlation_C: Tensor

    @classmethod
    def fit(cls, first_PD: Tensor, second_PD: Tensor) -> Linker:
        """By canonical correlations of known pairs; correlations that chance makes are shrunk away."""
        first, second = first_PD.double(), second_PD.double()
        means = first.mean(0), second.mean(0)
        apart = first - means[0], second - means[1]
        whiten = [whitening(side.T @ side / max(1, len(side)), len(side)) for side in apart]
        sides = [side @ to for side, to in zip(apart, whiten, strict=True)]
        left, found, right = torch.linalg.svd(sides[0].T @ sides[1] / len(first), full_matrices=False)
        chance = (first.shape[1] / max(1, len(first))) ** 0.5  # what unrelated sides of this width show
        kept = found > 2 * chance
        return cls(
            means[0].float(),
            means[1].float(),
            (whiten[0] @ left[:, kept]).float(),
            (whiten[1] @ right.T[:, kept]).float(),
            found[kept].clamp(max=_LARGEST).float(),
        )

    def scores(self, first_AD: Tensor, second_BD: Tensor) -> Tensor:
        """Log of the likelihood ratio, [A, B]."""
        at_AC = (first_AD.float() - self.first_D) @ self.first_DC
        at_BC = (second_BD.float() - self.second_D) @ self.second_DC
        share_C = self.correlation_C.square()
        rest_C = 1 - share_C
        own_A, own_B = (0.5 * (at.square() * (share_C / rest_C)).sum(1) for at in (at_AC, at_BC))
        return (at_AC * (self.correlation_C / rest_C)) @ at_BC.T - own_A[:, None] - own_B - 0.5 * rest_C.log().sum()


def same_token(log_first_AV: Tensor, log_second_BV: Tensor, log_prior_V: Tensor) -> Tensor:
    """Log of how much likelier than by chance two posteriors are of one token, [A, B]."""
    first = (log_first_AV - log_prior_V).clamp(max=60).exp()
    return (first @ log_second_BV.exp().T).clamp_min(1e-30).log()


def pair_up(scores_AB: Tensor, *, least: float = 0.0, allowed_AB: Tensor | None = None) -> Tensor:
    """The best pairing in which each row of either side is used once at most.

    Args:
        scores_AB: how much likelier than by chance each pair is, log.
        least: a pair below it is worse than none.
        allowed_AB: bool; other pairs are impossible.

    Returns:
        For each row of the first side its partner; -1 for none. [A]
    """
    wanted = scores_AB if allowed_AB is None else scores_AB.masked_fill(~allowed_AB, -1e6)
    rows, columns = linear_sum_assignment(wanted.clamp(min=least - 1).double().numpy(), maximize=True)
    partner_A = torch.full((len(scores_AB),), -1)
    first, second = torch.from_numpy(rows), torch.from_numpy(columns)
    good = wanted[first, second] > least
    partner_A[first[good]] = second[good]
    return partner_A
