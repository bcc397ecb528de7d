"""Membership scores of a sequence from how a model predicts its tokens; larger means "was trained on".

Shape letters: S sequences, Z sequences of a population that nobody trained on, R reference models.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.audit.model.scoring import TokenScores

LOWEST = 0.2
"""Share of a sequence's tokens that Min-K% looks at, as its authors chose for text."""
PULL = 0.3
"""RMIA's a: how far a model that saw a sequence stands above those that did not (Zarifzadeh et al. 2024, offline)."""


def mean_loss(scores: TokenScores) -> Tensor:
    """Cross-entropy per token of each sequence, nats, [S]."""
    return scores.loss_S() / scores.counts_S


def lowest_mean(values_P: Tensor, scores: TokenScores, share: float = LOWEST) -> Tensor:
    """Mean of the lowest values of each sequence: this share of its tokens, at least one. [S]

    Of log-probabilities this is Min-K% (Shi et al. 2024, arXiv:2310.16789), of standardised ones Min-K%++
    (arXiv:2404.02936).
    """
    means = []
    for sequence in range(len(scores.counts_S)):
        own = values_P[scores.of(sequence)]
        means.append(own.sort().values[: max(1, int(len(own) * share))].mean())
    return torch.stack(means)


def zlib_ratio(loss_S: Tensor, texts: Sequence[bytes]) -> Tensor:
    """Loss over the length of the compressed text (Carlini et al. 2021), turned so that members are large. [S]"""
    return -loss_S / torch.tensor([len(zlib.compress(text)) for text in texts], dtype=torch.float64)


@dataclass(frozen=True)
class Population:
    """What offline RMIA compares with: mean losses of the model and of R references on Z sequences of no run."""

    loss_Z: Tensor
    reference_loss_RZ: Tensor


def rmia(
    loss_S: Tensor, reference_loss_RS: Tensor, population: Population, *, gamma: float = 1.0, pull: float = PULL
) -> Tensor:
    """Share of the population over which a sequence's likelihood ratio stands (Zarifzadeh et al. 2024, offline). [S]

    The likelihood of a sequence is that of its mean token, exp(-loss): of whole sequences it would underflow, and
    lengths would decide. What a model gives on average is estimated from references that saw none of it:
    ((1 + a) p_out + 1 - a) / 2.

    Args:
        loss_S: mean token loss of the model under attack.
        reference_loss_RS: the same of the references.
        population: the same of both on sequences that none of them trained on.
        gamma: how far a ratio has to stand above another.
        pull: a.
    """
    ratio_S = _ratio(loss_S, reference_loss_RS, pull)
    ratio_Z = _ratio(population.loss_Z, population.reference_loss_RZ, pull).sort().values
    # How many z have ratio_x / ratio_z >= gamma.
    return torch.searchsorted(ratio_Z, ratio_S / gamma, right=True).double() / len(ratio_Z)


def _ratio(loss_S: Tensor, reference_loss_RS: Tensor, pull: float) -> Tensor:
    outside_S = (-reference_loss_RS).exp().mean(0)
    return (-loss_S).exp() / (((1 + pull) * outside_S + 1 - pull) / 2)
