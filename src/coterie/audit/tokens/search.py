"""Rebuild records word by word: try each candidate in the public model, and see whether its row was received.

While the owner's trunk is still the public one, the row of a right candidate is among the received rows, in every
layer where its experts live at the attacker's; that of a wrong one is not. A candidate that no layer shows is neither
right nor wrong, and stays for the next word to decide. A received row stands for one word: a repeated token gives the
same row again and again, and would fit for ever.

Shape letters: C candidates, T words so far, R rows received, D their width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.audit.tokens.views import TextRows, last_rows

_SAME = 1e-3
"""Rows are one and the same up to this share of their length: sums of another order differ by less."""


@dataclass(frozen=True)
class _Prefix:
    """Words that fit so far: the received rows they stand for, by layer, and how unlikely the model finds them."""

    ids: tuple[int, ...]
    used: tuple[tuple[int, int], ...]
    unlikely: float


def rebuild(
    model: PreTrainedModel,
    rows: Mapping[int, Tensor],
    hosted: Mapping[int, Tensor],
    start: Sequence[int],
    *,
    words: int,
    among_V: Tensor | None = None,
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
        among_V: bool, which tokens are in the forward at all, if other attacks tell; None: any.
        candidates: next words that are tried at once, the likeliest by the public model first.
        beam: records that are followed at once, while no row decides between them.

    Returns:
        Token ids, ``start`` included.
    """
    used: list[tuple[int, int]] = []
    for words_so_far in range(1, len(start) + 1):
        (fits,) = _fits(last_rows(model, [start[:words_so_far]])[0], rows, hosted)
        used += [(layer, row) for layer, row, _ in fits or ()]
    alive = [_Prefix(tuple(start), tuple(used), 0.0)]
    while len(alive[0].ids) < words:
        tried: list[_Prefix] = []
        shown = False  # once a record goes on, others that do not are not searched to the end
        for prefix in alive:
            longer, goes_on = _longer(model, rows, hosted, prefix, candidates, among_V, further=not shown)
            tried, shown = tried + longer, shown or goes_on
        if not tried:
            break
        tried.sort(key=lambda one: (-len(one.used), one.unlikely))
        alive = tried[:beam]
    return list(alive[0].ids)


def beginnings(model: PreTrainedModel, rows: Mapping[int, Tensor], hosted: Mapping[int, Tensor]) -> list[int]:
    """Every token that some record begins with: the first row of a record depends on its first token alone."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    shown = last_rows(model, [[token] for token in range(vocabulary)])[0]
    fits = _fits(shown, rows, hosted)
    return [token for token, each in enumerate(fits) if each]


def _longer(
    model: PreTrainedModel,
    rows: Mapping[int, Tensor],
    hosted: Mapping[int, Tensor],
    prefix: _Prefix,
    candidates: int,
    among_V: Tensor | None,
    *,
    further: bool,
) -> tuple[list[_Prefix], bool]:
    """The prefix with each next word that no layer rules out, and whether some layer shows one.

    The likeliest words are tried first; the others too where ``further``, until one is shown.
    """
    _, log_V = last_rows(model, [list(prefix.ids)])
    wanted_V = log_V[0] if among_V is None else log_V[0].masked_fill(~among_V, -torch.inf)
    best = wanted_V.topk(int(wanted_V.isfinite().sum()))
    found: list[_Prefix] = []
    goes_on = False
    for some, logs in zip(torch.split(best.indices, candidates), torch.split(best.values, candidates), strict=True):
        shown, _ = last_rows(model, [[*prefix.ids, token] for token in some.tolist()])
        for token, log, fits in zip(some.tolist(), logs.tolist(), _fits(shown, rows, hosted), strict=True):
            if fits is not None and all(prefix.used.count((layer, row)) < times for layer, row, times in fits):
                used = (*prefix.used, *((layer, row) for layer, row, _ in fits))
                found.append(_Prefix((*prefix.ids, token), used, prefix.unlikely - log))
        goes_on = any(len(each.used) > len(prefix.used) for each in found)
        if goes_on or not further:
            break
    return found, goes_on


def _fits(
    shown: Sequence[TextRows], rows: Mapping[int, Tensor], hosted: Mapping[int, Tensor]
) -> list[tuple[tuple[int, int, int], ...] | None]:
    """For each candidate the received rows that are its own, as (layer, first of them, how many are equal).

    None for one whose row should have been received in some layer, and was not; nothing for one that no layer shows.
    """
    found: list[tuple[tuple[int, int, int], ...] | None] = [()] * len(shown[0].token_P)
    for layer, received in rows.items():
        view = shown[layer]
        there_C = hosted[layer][view.experts_PK.clamp(0, len(hosted[layer]) - 1)].any(1)
        exact = "donot_use_mm_for_euclid_dist"  # the other form loses half of the digits
        apart_CR = torch.cdist(view.hidden_PD, received, compute_mode=exact)
        same_CR = apart_CR < _SAME * view.hidden_PD.norm(dim=1, keepdim=True)
        times_C, first_C = same_CR.sum(1).tolist(), same_CR.int().argmax(1).tolist()
        for number, there in enumerate(there_C.tolist()):
            sofar = found[number]
            if there and sofar is not None:
                fit = (layer, first_C[number], times_C[number])
                found[number] = (*sofar, fit) if times_C[number] else None
    return found
