"""Whether the instruments work: what is there to be read is read, and where there is nothing, nothing is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from coterie.audit.metrics import Estimate, rate
from coterie.audit.prior import Unigram
from coterie.audit.tokens.decoders import Gaussian, guesses
from coterie.audit.tokens.views import View, cover, views
from coterie.errors import AuditError

LEAST_POSITIVE = 0.95
WIDEST_NEGATIVE = 0.02
_FEWEST = 20


@dataclass(frozen=True)
class Control:
    """An attack on public text whose outcome is known beforehand.

    Attributes:
        value: share of tokens that were read.
        prior: share that the commonest token guesses, on the same places.
        passed: the outcome is as it must be.
    """

    value: Estimate
    prior: Estimate
    passed: bool


def positive_control(model: PreTrainedModel, public: Sequence[Sequence[int]], *, seed: int = 0) -> Control:
    """Read public text from undefended rows of the first MoE layer, with a decoder fitted on other public text.

    Passed if at least `LEAST_POSITIVE` of the tokens are read.

    Raises:
        AuditError: ``audit-public``: too little public text.
    """
    fitted, other, unigram = _halves(model, public, seed)
    decoder = Gaussian.fit(fitted.hidden_PD, fitted.token_P, unigram.log_V)
    value, prior = _read(decoder, other, unigram, seed)
    return Control(value, prior, value.value >= LEAST_POSITIVE)


def negative_control(model: PreTrainedModel, public: Sequence[Sequence[int]], *, seed: int = 0) -> Control:
    """The same attack with a decoder fitted on rows that were dealt out among all texts: it can know nothing.

    Passed if what it reads lies within `WIDEST_NEGATIVE` of the commonest token's share.

    Raises:
        AuditError: ``audit-public``: too little public text.
    """
    fitted, other, unigram = _halves(model, public, seed)
    generator = torch.Generator().manual_seed(seed)
    unrelated_P = fitted.token_P[torch.randperm(len(fitted.token_P), generator=generator)]
    value, prior = _read(Gaussian.fit(fitted.hidden_PD, unrelated_P, unigram.log_V), other, unigram, seed)
    return Control(value, prior, abs(value.value - prior.value) <= WIDEST_NEGATIVE)


def _halves(model: PreTrainedModel, public: Sequence[Sequence[int]], seed: int) -> tuple[View, View, Unigram]:
    """Rows of most of the text, and of some that was kept apart."""
    if len(public) < _FEWEST:
        raise AuditError(
            f"There are {len(public)} public texts; the controls need {_FEWEST}.",
            code="audit-public",
            why="an attack whose instruments were not tried shows nothing when it finds nothing",
            fix="name files of public text",
        )
    kept = max(4, len(public) // 8)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    apart, rest = public[:kept], public[kept:]
    unigram = Unigram.of(torch.cat([torch.tensor(text) for text in rest]), vocabulary)
    fitted = views(model, [*rest, *cover(rest, vocabulary, 4, generator)], gradients=False)[0]
    return fitted, views(model, apart, gradients=False)[0], unigram


def _read(decoder: Gaussian, other: View, unigram: Unigram, seed: int) -> tuple[Estimate, Estimate]:
    right_P = guesses(decoder, other.hidden_PD)[0] == other.token_P
    common_P = other.token_P == unigram.commonest
    return rate(right_P, other.text_P, seed=seed), rate(common_P, other.text_P, seed=seed)
