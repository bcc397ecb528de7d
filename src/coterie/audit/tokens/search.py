"""Rebuild records word by word: try each candidate in the public model, and see whether its row was received.

While the owner's trunk is still the public one, the row of a right candidate is among the received rows, in every
layer where its experts live at the attacker's; that of a wrong one is not. A candidate that no layer shows is neither
right nor wrong, and stays for the next word to decide.

Shape letters: C candidates, T words so far, R rows received, D their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.audit.tokens.views import View, last_rows

_SAME = 1e-3
"""Rows are one and the same up to this share of their length: sums of another order differ by less."""


@dataclass(frozen=True)
class _Prefix:
    ids: tuple[int, ...]
    matched: int
    unlikely: float


def rebuild(
    model: PreTrainedModel,
    rows: Mapping[int, Tensor],
    hosted: Mapping[int, Tensor],
    start: Sequence[int],
    *,
    words: int,
    candidates: int = 24,
    beam: int = 3,
) -> list[int]:
    """One record, begun by known words, as far as received rows carry it.

    Args:
        model: the public starting model.
        rows: [R, D] received at each layer, of the forward that the record went through.
        hosted: bool [E], the attacker's experts of each layer.
        start: first words; one is enough, see `beginnings`.
        words: longest record to rebuild.
        candidates: likeliest next words by the public model that are tried.
        beam: records that are followed at once, while no row decides between them.

    Returns:
        Token ids, ``start`` included.
    """
    alive = [_Prefix(tuple(start), 0, 0.0)]
    while len(alive[0].ids) < words:
        tried: list[_Prefix] = []
        for prefix in alive:
            tried += _longer(model, rows, hosted, prefix, candidates)
        if not tried:
            break
        tried.sort(key=lambda one: (-one.matched, one.unlikely))
        alive = tried[:beam]
    return list(alive[0].ids)


def beginnings(model: PreTrainedModel, rows: Mapping[int, Tensor], hosted: Mapping[int, Tensor]) -> list[int]:
    """Every token that some record begins with: the first row of a record depends on its first token alone."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    shown = last_rows(model, [[token] for token in range(vocabulary)])[0]
    seen_C, fits_C = _evidence(shown, rows, hosted)
    return torch.nonzero((seen_C > 0) & (seen_C == fits_C)).squeeze(1).tolist()


def _longer(
    model: PreTrainedModel, rows: Mapping[int, Tensor], hosted: Mapping[int, Tensor], prefix: _Prefix, candidates: int
) -> list[_Prefix]:
    """The prefix with each next word that no layer rules out."""
    _, log_V = last_rows(model, [list(prefix.ids)])
    best = log_V[0].topk(min(candidates, log_V.shape[1]))
    shown, _ = last_rows(model, [[*prefix.ids, token] for token in best.indices.tolist()])
    seen_C, fits_C = _evidence(shown, rows, hosted)
    return [
        _Prefix((*prefix.ids, token), prefix.matched + fits, prefix.unlikely - log)
        for token, log, seen, fits in zip(
            best.indices.tolist(), best.values.tolist(), seen_C.tolist(), fits_C.tolist(), strict=True
        )
        if fits == seen
    ]


def _evidence(
    shown: Sequence[View], rows: Mapping[int, Tensor], hosted: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """In how many layers each candidate would have been received, and in how many it was. [C], [C]"""
    count = len(shown[0].token_P)
    seen_C, fits_C = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    for layer, received in rows.items():
        view = shown[layer]
        there = hosted[layer][view.experts_PK.clamp(0, len(hosted[layer]) - 1)].any(1)
        exact = "donot_use_mm_for_euclid_dist"  # the other form loses half of the digits
        apart = torch.cdist(view.hidden_PD, received, compute_mode=exact).min(1).values / view.hidden_PD.norm(
            dim=1
        ).clamp_min(1e-30)
        seen_C += there
        fits_C += there & (apart < _SAME)
    return seen_C, fits_C
