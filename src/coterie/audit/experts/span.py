"""The span attack: which token comes next in a record of a push, place by place or with nothing given.

After DAGER (arXiv:2405.15586), carried over to routed experts: an expert's sum speaks of its own tokens only, so a
push stays open to E / K times as many tokens as in a dense model, and an expert that nobody chose rules out
everything that would have chosen it. Beside the spans, the last MoE layer's gradient at a place is known for every
next token, and is looked for in the sum as a whole.

Shape letters as in `coterie.audit.experts.reader`; L features of a candidate.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.audit.experts.judge import RULED_OUT, Opener, Ratio
from coterie.audit.experts.membership import Metric
from coterie.audit.experts.opened import Opened
from coterie.audit.experts.reader import LayerView, Reader
from coterie.audit.experts.simulate import rows_of, summed

_REFERENCES, _SCATTERED = 24, 96
_LOOKED_AT = 16
_PLACES = 48
_GUESSES = 24
_HOPELESS = -6.0
"""Log likelihood ratio at the first layer below which a candidate is not looked at further."""
_KEPT = 48


@dataclass(frozen=True)
class Place:
    """A token to be guessed: the true prefix of a record, and what follows."""

    prefix: tuple[int, ...]
    truth: int


class SpanAttack:
    """Ranks candidates for the next token of a record by the sums of a push.

    It is made for one size of push and one adversary, on simulated pushes of public text.

    Args:
        reader: the model as the adversary has it.
        public: records of public text.
        visible: (layer, expert) whose sums the adversary opens.
        lot: records in the push.
        noise, rounding: of the sums; see `coterie.audit.experts.opened.Spectrum`.
        victim: the model that pushes are simulated on, where it is not the adversary's (a trunk that has drifted).
        metric: of such pushes, of whatever size, where it is known already; it was learned on other text.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        reader: Reader,
        public: Sequence[Sequence[int]],
        visible: Collection[tuple[int, int]],
        lot: int,
        *,
        noise: float = 0.0,
        rounding: float = 0.0,
        victim: Reader | None = None,
        metric: Metric | None = None,
        seed: int = 0,
    ) -> None:
        self.reader = reader
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        records = [record for record in public if len(record) > 2]
        self._random.shuffle(records)
        self._reference = _views(reader, records[:_REFERENCES])
        others = _REFERENCES
        if metric is None:
            others += min(_SCATTERED, len(records) // 2)
            metric = Metric(reader, records[_REFERENCES:others], lot)
        self._metric = metric.sized(lot, noise)
        self._learn(victim or reader, records[others:], visible, lot, noise, rounding, seed)

    def opener(self, opened: Opened) -> Opener:
        """Get the sums of a push ready."""
        return Opener(opened, self._reference, self._metric)

    @torch.no_grad()
    def scores(self, opener: Opener, prefixes_BT: Tensor) -> Tensor:
        """[B, V] log odds of every next token, up to a constant for each prefix.

        Args:
            opener: of the push.
            prefixes_BT: T may be 0; then the language model has no say.
        """
        return self._scored(opener, prefixes_BT)[1]

    @torch.no_grad()
    def spans_and_scores(self, opener: Opener, prefixes_BT: Tensor) -> tuple[Tensor, Tensor]:
        """[B, V] log likelihood ratios by the spans alone, and `scores`."""
        return self._scored(opener, prefixes_BT)

    @torch.no_grad()
    def finals(self, opener: Opener, prefixes_BT: Tensor) -> Tensor:
        """[B, V] log odds of each token as a record's last one, which is in no span."""
        prior_BV = self.reader.log_prior(prefixes_BT)[:, -1]
        every_BV = torch.arange(self.reader.vocabulary).expand(len(prefixes_BT), -1)
        pair_BV = self._before(opener, prefixes_BT, every_BV)
        return self._weights_L[0] * prior_BV + self._weights_L[-1] * pair_BV

    def _scored(self, opener: Opener, prefixes_BT: Tensor) -> tuple[Tensor, Tensor]:
        batch, vocabulary = prefixes_BT.shape[0], self.reader.vocabulary
        every_BV = torch.arange(vocabulary).expand(batch, -1)
        first_BV = self._spans(opener, prefixes_BT, every_BV, depth=1).sum(-1)
        prior_BV = torch.zeros(batch, vocabulary)
        if prefixes_BT.shape[1]:
            prior_BV = self.reader.log_prior(prefixes_BT)[:, -1]
        rough_BV = first_BV + prior_BV
        kept = max(_KEPT, int((first_BV > _HOPELESS).sum(1).max()))
        chosen_BV = rough_BV.topk(min(kept, vocabulary), 1).indices
        features_BVL = self._features(opener, prefixes_BT, chosen_BV, prior_BV)
        # What was not looked at keeps its order, behind everything else.
        rest_BV = 3 * RULED_OUT + rough_BV.clamp_min(RULED_OUT) / 100
        spans_BV = rest_BV.scatter(1, chosen_BV, features_BVL[..., 1:-1].sum(-1))
        return spans_BV, rest_BV.scatter(1, chosen_BV, features_BVL @ self._weights_L)

    def _before(self, opener: Opener, prefixes_BT: Tensor, candidates_BV: Tensor) -> Tensor:
        """[B, V] log likelihood ratio of the last layer's gradient one place before, for each next token."""
        found_BV = torch.zeros(candidates_BV.shape)
        if prefixes_BT.shape[1]:
            rows = self.reader.last_rows(prefixes_BT, candidates_BV)
            token_R, found_RC = opener.matches(len(self.reader.layers) - 1, rows)
            found_BV.view(-1).index_add_(0, token_R, self._pairs(found_RC))
        return found_BV

    def _features(self, opener: Opener, prefixes_BT: Tensor, candidates_BV: Tensor, prior_BV: Tensor) -> Tensor:
        """[B, V, L]: prior, each layer's ratio, the ratio of the last layer's gradient one place before."""
        spans_BVL = self._spans(opener, prefixes_BT, candidates_BV)
        pair_BV = self._before(opener, prefixes_BT, candidates_BV)
        own_BV = prior_BV.gather(1, candidates_BV)
        return torch.cat([own_BV.unsqueeze(-1), spans_BVL, pair_BV.unsqueeze(-1)], -1)

    def _spans(self, opener: Opener, prefixes_BT: Tensor, candidates_BV: Tensor, depth: int | None = None) -> Tensor:
        """[B, V, layers] log likelihood ratios."""
        views = self.reader.continuations(prefixes_BT, candidates_BV, depth)
        found = torch.zeros(len(views), candidates_BV.numel())
        for layer, view in enumerate(views):
            token_R, features_RC, out = opener.features(layer, view)
            found[layer].index_add_(0, token_R, self._rows(features_RC))
            found[layer][out] = RULED_OUT
        return found.T.reshape(*candidates_BV.shape, len(views))

    # ---- learning ----

    def _learn(
        self,
        victim: Reader,
        records: Sequence[Sequence[int]],
        visible: Collection[tuple[int, int]],
        lot: int,
        noise: float,
        rounding: float,
        seed: int,
    ) -> None:
        pushes = max(2, min(8, len(records) // lot, -(-64 // lot)))
        last = len(self.reader.layers) - 1
        inside, others, pair_inside, pair_others = [], [], [], []
        looked: list[tuple[Opener, Tensor, Tensor, Tensor]] = []
        for number in range(pushes):
            own = [records[(number * lot + each) % len(records)] for each in range(lot)]
            rows = list(rows_of(victim, own))
            opener = self.opener(summed(rows, visible, noise=noise, rounding=rounding, generator=self._generator))
            known = rows if victim is self.reader else list(rows_of(self.reader, own))
            inside += [opener.features(layer, each)[1] for some in known for layer, each in enumerate(some.layers)]
            pair_inside += [opener.matches(last, some.layers[last])[1] for some in known]
            for prefixes_BT, truth_B in self._places(own, -(-_PLACES // pushes)):
                prior_BV = self.reader.log_prior(prefixes_BT)[:, -1]
                guesses_BV = self._guesses(prior_BV, truth_B)
                looked.append((opener, prefixes_BT, guesses_BV, prior_BV))
                count = guesses_BV.shape[1]
                for layer, view in enumerate(self.reader.continuations(prefixes_BT, guesses_BV)):
                    token_R, found_RC, _ = opener.features(layer, view)
                    others.append(found_RC[token_R % count > 0])
                token_R, found_RC = opener.matches(last, self.reader.last_rows(prefixes_BT, guesses_BV))
                pair_others.append(found_RC[token_R % count > 0])
        self._rows = Ratio(torch.cat(inside), torch.cat(others), seed)
        self._pairs = Ratio(torch.cat(pair_inside), torch.cat(pair_others), seed)
        self._weights_L = self._weigh(looked)

    def _places(self, records: Sequence[Sequence[int]], count: int) -> list[tuple[Tensor, Tensor]]:
        """Prefixes of a few lengths with what follows: [B, T] and [B]."""
        found = []
        left = count
        while left > 0:
            length = self._random.randrange(1, max(len(record) for record in records))
            fits = [record for record in records if len(record) > length]
            some = self._random.sample(fits, min(8, left, len(fits)))
            ids = torch.tensor([list(record[: length + 1]) for record in some])
            found.append((ids[:, :-1], ids[:, -1]))
            left -= max(len(some), 2)
        return found

    def _guesses(self, prior_BV: Tensor, truth_B: Tensor) -> Tensor:
        """The truth first, then wrong tokens: half as the language model would guess, half any."""
        wrong_BV = prior_BV.exp().scatter(1, truth_B.unsqueeze(1), 0.0)
        wrong_BV = wrong_BV / wrong_BV.sum(1, keepdim=True) + 1.0 / prior_BV.shape[1]
        wrong_BV.scatter_(1, truth_B.unsqueeze(1), 0.0)
        drawn_BV = torch.multinomial(wrong_BV, min(_GUESSES, prior_BV.shape[1] - 1), generator=self._generator)
        return torch.cat([truth_B.unsqueeze(1), drawn_BV], 1)

    def _weigh(self, looked: Sequence[tuple[Opener, Tensor, Tensor, Tensor]]) -> Tensor:
        """How far each of the features is to be believed beside the others, from the same places.

        The truth against guesses that were drawn: each guess stands for as many as its chance to be drawn was small.
        """
        sets = []
        for opener, prefixes_BT, guesses_BV, prior_BV in looked:
            features_BVL = self._features(opener, prefixes_BT, guesses_BV, prior_BV)
            chance_BV = prior_BV.exp() + 1.0 / prior_BV.shape[1]
            sets.append((features_BVL, -chance_BV.gather(1, guesses_BV).log()))
        size = sets[0][0].shape[-1]
        log_weights_L = torch.zeros(size, requires_grad=True)
        with torch.enable_grad():
            optimizer = torch.optim.LBFGS([log_weights_L], max_iter=30)

            def loss() -> Tensor:
                optimizer.zero_grad()
                total = log_weights_L.square().sum()
                for features_BVL, stands_BV in sets:
                    logits_BV = features_BVL @ log_weights_L.exp() + stands_BV
                    total = total + F.cross_entropy(
                        logits_BV, torch.zeros(len(logits_BV), dtype=torch.long), reduction="sum"
                    )
                torch.autograd.backward(total)
                return total

            optimizer.step(loss)  # type: ignore[no-untyped-call]
        return log_weights_L.detach().exp()


def _views(reader: Reader, records: Sequence[Sequence[int]]) -> list[LayerView]:
    """Views of several texts as one."""
    length = min(max(len(record) for record in records), _LOOKED_AT)
    usable = [list(record[:length]) for record in records if len(record) >= length]
    return reader.views(torch.tensor(usable))


def ranked_first(
    attack: SpanAttack, opened: Opened, places: Sequence[Place], at_once: int = 8
) -> tuple[Tensor, Tensor]:
    """Whether the truth came out first at each place: with the push, and by the language model alone. Bool [P]."""
    opener = attack.opener(opened)
    right = torch.zeros(len(places), dtype=torch.bool)
    prior = torch.zeros_like(right)
    by_length: dict[int, list[int]] = {}
    for number, place in enumerate(places):
        by_length.setdefault(len(place.prefix), []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            prefixes_BT = torch.tensor([list(places[number].prefix) for number in some])
            truth_B = torch.tensor([places[number].truth for number in some])
            right[some] = attack.scores(opener, prefixes_BT).argmax(1) == truth_B
            prior[some] = attack.reader.log_prior(prefixes_BT)[:, -1].argmax(1) == truth_B
    return right, prior
