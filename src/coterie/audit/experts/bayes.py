"""One token of a record of which everything else is known, from noised sums: the Bayes weight of each candidate.

In Gaussian noise the sum's log likelihood, were a candidate's clipped gradient in it, is the inner product of both
less half the gradient's square, in units of the noise; no test of the sum says more. It is weighed with what a
language model says of the whole record, and with the chance that the record is in the lot at all.

Shape letters as in `coterie.audit.experts.membership`; V candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.audit.experts.membership import Metric, RecordScores, products, score
from coterie.audit.experts.opened import Opened
from coterie.audit.experts.reader import Reader

CANDIDATES = 40
_AT_ONCE = 4


@dataclass(frozen=True)
class Blank:
    """A place to be filled.

    Attributes:
        record: all tokens, the true one among them.
        place: where it is, from 0.
        factor: what the record's summed gradient was scaled by (`coterie.audit.experts.clipped.factors`).
    """

    record: tuple[int, ...]
    place: int
    factor: float = 1.0


@torch.no_grad()
def candidates_of(reader: Reader, blank: Blank, count: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """The likeliest tokens by what stands before, the truth among them, and the log-probability of the whole record
    with each of them. [V] int64 in ascending order, and [V]."""
    ids = torch.tensor(blank.record)
    before = ids[None, : blank.place]
    before_V = reader.log_prior(before)[0, -1] if blank.place else torch.zeros(reader.vocabulary)
    before_V[blank.record[blank.place]] = torch.inf
    tokens_V = before_V.topk(min(count, reader.vocabulary)).indices.sort().values
    variants_VT = _variants(blank, tokens_V)
    log_VTV = reader.log_prior(variants_VT)[:, :-1]
    own_V = log_VTV.gather(2, variants_VT[:, 1:, None]).sum((1, 2))
    return tokens_V, own_V


def weights(
    reader: Reader, blank: Blank, tokens_V: Tensor, pushes: Sequence[Opened], metric: Metric, rate: float
) -> Tensor:
    """[V] log likelihood ratio of the pushes, were each token the true one. float64.

    Args:
        reader: the model that the pushes were made with.
        blank: the place.
        tokens_V: candidates.
        pushes: what the adversary opens.
        metric: of these pushes.
        rate: the chance that the record is in one.
    """
    variants = [tuple(row) for row in _variants(blank, tokens_V).tolist()]
    factors = torch.full((len(variants),), blank.factor)
    return score(reader, variants, pushes, metric, factors).log_ratio(rate)


def _likeliest(
    reader: Reader, blank: Blank, tokens_V: Tensor, before_V: Tensor, pushes: Sequence[Opened], metric: Metric,
    rate: float,
) -> int:  # fmt: skip
    """The candidate with the largest weight of all.

    Squares of gradients only take away from a weight, and cost most of the work: they are computed for candidates
    from the most promising on, until no other can come first.
    """
    variants = [tuple(row) for row in _variants(blank, tokens_V).tolist()]
    product_VP = products(reader, variants, pushes, metric, torch.full((len(variants),), blank.factor))
    most_V = before_V + RecordScores(product_VP, torch.zeros(len(variants), dtype=torch.float64)).log_ratio(rate)
    best, token = -torch.inf, -1
    for some in torch.split(most_V.argsort(descending=True), _AT_ONCE):
        if float(most_V[some[0]]) < best:
            break
        after = before_V[some] + weights(reader, blank, tokens_V[some], pushes, metric, rate)
        if float(after.max()) > best:
            best, token = float(after.max()), int(tokens_V[some[after.argmax()]])
    return token


def _variants(blank: Blank, tokens_V: Tensor) -> Tensor:
    variants_VT = torch.tensor(blank.record).repeat(len(tokens_V), 1)
    variants_VT[:, blank.place] = tokens_V
    return variants_VT


def filled(
    reader: Reader, blanks: Sequence[Blank], pushes: Sequence[Opened], metric: Metric, rate: float
) -> tuple[Tensor, Tensor]:
    """Whether the truth came out first at each place: with the pushes, and by the language model alone. Bool [P]."""
    right, prior = [], []
    for blank in blanks:
        tokens_V, before_V = candidates_of(reader, blank)
        truth = blank.record[blank.place]
        right.append(_likeliest(reader, blank, tokens_V, before_V.double(), pushes, metric, rate) == truth)
        prior.append(int(tokens_V[before_V.argmax()]) == truth)
    return torch.tensor(right, dtype=torch.bool), torch.tensor(prior, dtype=torch.bool)
