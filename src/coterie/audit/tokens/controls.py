"""Whether the instruments work: what is there to be read is read, and where there is nothing, nothing is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from coterie.audit import metrics
from coterie.audit.metrics import Estimate
from coterie.audit.prior import Unigram
from coterie.audit.tokens.decoders import Gaussian, guesses
from coterie.audit.tokens.views import TextRows, cover, views
from coterie.errors import AuditError

MOST_TOKENS = 50_000
"""Of public text that the controls are tried on; more would say the same to a smaller part of a point."""
LEAST_TOKENS = 200
"""Fewer could not show two points: without any disagreement an interval is z^2 / (n + z^2) wide."""
_FEWEST = 20


@dataclass(frozen=True)
class Control:
    """An attack on public text whose outcome is known beforehand; `coterie.audit.verdicts.controls` judges it.

    Attributes:
        value: share of tokens that were read.
        prior: share that the commonest token guesses, on the same places.
        gap: ``value`` minus ``prior``, paired over the same places.
    """

    value: Estimate
    prior: Estimate
    gap: Estimate


def positive_control(model: PreTrainedModel, public: Sequence[Sequence[int]], *, seed: int = 0) -> Control:
    """Read public text from undefended rows of the first MoE layer, with a decoder fitted on other public text.

    Raises:
        AuditError: ``audit-public``: too little public text.
    """
    fitted, other, unigram = halves(model, public, seed)
    decoder = Gaussian.fit(fitted.hidden_PD, fitted.token_P, unigram.log_V)
    return _read(decoder, other, unigram, seed)


def negative_control(model: PreTrainedModel, public: Sequence[Sequence[int]], *, seed: int = 0) -> Control:
    """The same attack with a decoder fitted on rows that were dealt out among all texts: it can know nothing.

    Raises:
        AuditError: ``audit-public``: too little public text.
    """
    fitted, other, unigram = halves(model, public, seed)
    generator = torch.Generator().manual_seed(seed)
    unrelated_P = fitted.token_P[torch.randperm(len(fitted.token_P), generator=generator)]
    return _read(Gaussian.fit(fitted.hidden_PD, unrelated_P, unigram.log_V), other, unigram, seed)


def halves(model: PreTrainedModel, public: Sequence[Sequence[int]], seed: int) -> tuple[TextRows, TextRows, Unigram]:
    """Rows of most of some text, and of a part that was kept apart; both drawn, since files have an order."""
    if len(public) < _FEWEST:
        raise AuditError(
            f"There are {len(public)} public texts; the controls need {_FEWEST}.",
            code="audit-public",
            why="an attack whose instruments were not tried shows nothing when it finds nothing",
            fix="name files of public text",
        )
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    drawn = [public[n] for n in torch.randperm(len(public), generator=generator).tolist()]
    enough = sum(tokens <= MOST_TOKENS for tokens in accumulate(map(len, drawn)))
    apart, rest = split(drawn[: max(_FEWEST, enough)])
    unigram = Unigram.of(torch.cat([torch.tensor(text) for text in rest]), vocabulary)
    fitted = views(model, [*rest, *cover(rest, vocabulary, 4, generator)], gradients=False)[0]
    return fitted, views(model, apart, gradients=False)[0], unigram


def split(public: Sequence[Sequence[int]]) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """The first eighth of some texts, or more for `LEAST_TOKENS`, up to half; and the rest."""
    kept = max(metrics.FEWEST_DOCUMENTS, len(public) // 8)
    while kept < len(public) // 2 and sum(map(len, public[:kept])) < LEAST_TOKENS:
        kept += 1
    tokens = sum(map(len, public[:kept]))
    if tokens < LEAST_TOKENS:
        raise AuditError(
            f"Half of the public texts hold {tokens} tokens; the controls need {LEAST_TOKENS} to be tried on.",
            code="audit-public",
            why="on fewer tokens neither control can be shown to be where it must be",
            fix="name more public text",
        )
    return public[:kept], public[kept:]


def _read(decoder: Gaussian, other: TextRows, unigram: Unigram, seed: int) -> Control:
    right_P = guesses(decoder, other.hidden_PD)[0] == other.token_P
    common_P = other.token_P == unigram.commonest
    return Control(
        metrics.rate(right_P, other.text_P, seed=seed),
        metrics.rate(common_P, other.text_P, seed=seed),
        metrics.advantage(right_P, common_P, other.text_P, seed=seed),
    )
