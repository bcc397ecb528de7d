"""Whole records out of a push, with nothing given: a beam search over continuations that the sums allow.

Shape letters as in `coterie.audit.experts.reader`; K beams.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coterie.audit.experts.judge import Opener
from coterie.audit.experts.opened import Opened
from coterie.audit.experts.span import SpanAttack
from coterie.audit.matching import in_place

_SPARE = 4
"""Beams beside one for each record."""
_ENDED = 0.0
"""Log likelihood ratio of the best continuation below which a record has ended."""


@dataclass(frozen=True)
class Guess:
    """A record that was read.

    Attributes:
        ids: its tokens.
        score: log odds per token that all of them are of the push; larger is surer.
    """

    ids: tuple[int, ...]
    score: float


def read_records(
    attack: SpanAttack, opened: Opened, records: int, longest: int, *, budget_s: float = 600.0
) -> list[Guess]:
    """Read the records of a push, surest first.

    Args:
        attack: learned for such a push.
        opened: its sums.
        records: how many it holds.
        longest: most tokens of a record.
        budget_s: seconds after which what stands is returned.
    """
    until = time.monotonic() + budget_s
    opener = attack.opener(opened)
    width = records + _SPARE
    beams = _starts(attack, opener, width)
    ended: list[Guess] = []
    for length in range(1, longest):
        if not beams or time.monotonic() > until:
            break
        beams, over = _step(attack, opener, beams, width, last=length == longest - 1)
        ended += over
    found = ended + [Guess(ids, total / len(ids)) for ids, total in beams]
    found.sort(key=lambda guess: (-guess.score * min(len(guess.ids), longest // 2), guess.ids))
    return _different(found)


_Beam = tuple[tuple[int, ...], float]


def _starts(attack: SpanAttack, opener: Opener, width: int) -> list[_Beam]:
    nothing = torch.zeros(1, 0, dtype=torch.long)
    score_V = attack.scores(opener, nothing)[0]
    best = score_V.topk(min(2 * width, len(score_V)))
    return [((token,), value) for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def _step(
    attack: SpanAttack, opener: Opener, beams: Sequence[_Beam], width: int, *, last: bool
) -> tuple[list[_Beam], list[Guess]]:
    """One more token for every beam; those that nothing continues have ended."""
    prefixes_KT = torch.tensor([ids for ids, _ in beams])
    spans_KV, whole_KV = attack.spans_and_scores(opener, prefixes_KT)
    # A prefix of one repeated id attends to copies of itself: it looks as its first token does and passes every test.
    if prefixes_KT.shape[1] > 0:
        same_K = (prefixes_KT == prefixes_KT[:, :1]).all(1)
        whole_KV[same_K, prefixes_KT[same_K, 0]] = -torch.inf
        spans_KV[same_K, prefixes_KT[same_K, 0]] = -torch.inf
    ended = []
    going: list[_Beam] = []
    for row, (ids, total) in enumerate(beams):
        on_V = (spans_KV[row] > _ENDED).nonzero()[:, 0]
        if last or not len(on_V):
            # Nothing is predicted from a record's last token, so it is in no span: the gradient before it tells.
            final = int(attack.finals(opener, prefixes_KT[row : row + 1])[0].argmax())
            ended.append(Guess((*ids, final), total / len(ids)))
            continue
        best = whole_KV[row, on_V].topk(min(3, len(on_V)))
        going += [
            ((*ids, int(on_V[place])), total + float(value))
            for value, place in zip(best.values, best.indices, strict=True)
        ]
    going.sort(key=lambda beam: -beam[1])
    return going[:width], ended


def _different(found: Sequence[Guess]) -> list[Guess]:
    """Without those that repeat most of a surer one."""
    kept: list[Guess] = []
    for guess in found:
        if all(in_place(guess.ids, other.ids) * 2 <= len(guess.ids) for other in kept):
            kept.append(guess)
    return kept
