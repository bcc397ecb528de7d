"""What one adversary reads in the rows that it received, and how much of that is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.audit.adversaries import Adversary
from coterie.audit.findings import Channel, Finding, Unit
from coterie.audit.matching import pairs, places_in
from coterie.audit.metrics import UNKNOWN, Estimate, advantage, rate, token_recovery
from coterie.audit.prior import language_prior
from coterie.audit.tokens.decoders import Gaussian, directions, guesses
from coterie.audit.tokens.known import Known
from coterie.audit.tokens.link import pair_up, same_token
from coterie.audit.tokens.routes import Choices, Network, routed
from coterie.audit.tokens.rows import Places, ReceivedRows, Truth
from coterie.audit.tokens.search import beginnings, rebuild

_DICTIONARY = 6000
_PAIRED_CALLS, _TAUGHT_CALLS = 4, 4
_SURE = 0.99
_REBUILT, _WORDS = 4, 16


@dataclass
class ScoredRows:
    """One adversary's rows, what it reads in them, and how much of that is right.

    Attributes:
        known: what it prepared.
        table: its rows, with the key.
        hosted: bool [E] of each layer, the experts whose rows it receives.
        adversary: who it is.
    """

    known: Known
    table: ReceivedRows
    hosted: Mapping[int, Tensor]
    adversary: Adversary

    def __post_init__(self) -> None:
        assert self.table.places is not None
        self.places: Places = self.table.places
        self.prior_P = _prior(self.known, self.places)
        self.readers: dict[int, dict[int, Gaussian]] = {}
        self._read: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in sorted(self.table.layers):
            self.readers[layer] = self._follow(layer)

    def findings(self) -> list[Finding]:
        """Every attack on rows, gradients, expert ids and their order, and all together."""
        found = [finding for layer in self.table.layers for finding in self._layer(layer)]
        found += [*self._fused(), *self._held_out(), *self._routes(), *self._pairs()]
        return found

    # ---- one layer ----

    def _follow(self, layer: int) -> dict[int, Gaussian]:
        """By round a reader that has followed the owner's trunk.

        Lower layers drift least. What is read there teaches the reader of the next one, by rows of the same token;
        the lowest layer follows its own confident guesses.
        """
        rows, stale = self.table.layers[layer], self.known.tokens[layer]
        found: dict[int, Gaussian] = {}
        for number in torch.unique(rows.round_R).tolist():
            calls = [place for place, call in enumerate(rows.calls) if call[0] == number][:_TAUGHT_CALLS]
            self.readers[layer] = {**found, number: stale}  # the one to link by
            shown, token_R = self._told_below(layer, calls)
            if len(shown) > stale.to_C.shape[1]:
                found[number] = stale.taught(rows.hidden_RD[shown], token_R)
            else:
                found[number] = stale.adapted(rows.hidden_RD[rows.round_R == number])
        return found

    def _told_below(self, layer: int, calls: list[int]) -> tuple[Tensor, Tensor]:
        """Rows of a layer whose token is read for sure in the layer below, and that token."""
        nobody = torch.empty(0, dtype=torch.int64)
        if layer - 1 not in self.readers:
            return nobody, nobody
        partner = self._linked(layer - 1, layer, calls, upward=False)
        shown = torch.nonzero(partner >= 0).squeeze(1)
        if not len(shown):
            return nobody, nobody
        guess_R, sure_R = self.read(layer - 1)
        sure = sure_R[partner[shown]] > _SURE
        return shown[sure], guess_R[partner[shown[sure]]]

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row, and how sure the reader is."""
        if layer not in self._read:
            rows = self.table.layers[layer]
            of_R, guess_R, sure_R = rows.round_R, torch.full((len(rows),), UNKNOWN), torch.zeros(len(rows))
            for number, reader in self.readers[layer].items():
                guess_R[of_R == number], sure_R[of_R == number] = guesses(reader, rows.hidden_RD[of_R == number])
            self._read[layer] = guess_R, sure_R
        return self._read[layer]

    def _layer(self, layer: int) -> Iterator[Finding]:
        rows, truth = self.table.layers[layer], self.table.truth[layer]
        stale = guesses(self.known.tokens[layer], rows.hidden_RD)[0]
        attacks = {
            "linear discriminants": stale,
            "linear discriminants that follow the trunk": self.read(layer)[0],
        }
        if self.adversary is Adversary.HOST_PUBLIC:
            attacks["linear classifier"] = guesses(self.known.linear(layer), rows.hidden_RD)[0]
            attacks["dictionary"] = self.known.dictionary(layer, _DICTIONARY).look_up(rows.hidden_RD)[0]
        for name, guess_R in attacks.items():
            yield self._seen(f"tokens by {name}", Channel.ROWS, layer, guess_R == truth.token_R, truth)
        told = rows.has_gradient_R & (truth.next_R >= 0)
        if told.any():
            slopes = directions(rows.gradient_RD[told])
            right = guesses(self.known.nexts[layer], slopes)[0] == truth.next_R[told]
            value = rate(right, self.places.document_P[truth.place_R[told]])
            yield self._finding(
                "next token from the returned gradient", Channel.GRADIENTS, Unit.NEXT, value, layer,
                f"{self._who} {self._does('read')} the next token of {percent(value)} of the rows whose gradient "
                "came back",
            )  # fmt: skip

    def _seen(self, name: str, channel: Channel, layer: int, right_R: Tensor, truth: Truth) -> Finding:
        real = truth.place_R >= 0
        place, right = truth.place_R[real], right_R[real]
        document, prior = self.places.document_P[place], self.prior_P[place]
        value = rate(right, document)
        return self._finding(
            name, channel, Unit.SEEN, value, layer,
            f"{self._who} {self._does('read')} {percent(value)} of the tokens that reach it",
            rate(prior, document), advantage(right, prior, document),
        )  # fmt: skip

    # ---- all layers ----

    def guessed(self) -> tuple[Tensor, Tensor]:
        """For each place its guess from the lowest layer that was received, and whether any was: lower is surer."""
        place, guess, sure = [], [], []
        for layer, truth in self.table.truth.items():
            real = truth.place_R >= 0
            place.append(truth.place_R[real])
            guess.append(self.read(layer)[0][real])
            sure.append(torch.full((int(real.sum()),), -layer))
        order = torch.cat(sure).argsort(stable=True)
        order = order[torch.cat(place)[order].argsort(stable=True)]
        place_R, guess_R = torch.cat(place)[order], torch.cat(guess)[order]
        last = torch.cat([place_R[1:] != place_R[:-1], torch.tensor([True])])  # the surest of each place
        guess_P = torch.full((len(self.places.token_P),), UNKNOWN)
        guess_P[place_R[last]] = guess_R[last]
        return guess_P, guess_P != UNKNOWN

    def _fused(self) -> Iterator[Finding]:
        places = self.places
        guess_P, seen_P = self.guessed()
        found = token_recovery(places.token_P, guess_P, seen_P, places.document_P, content_V=self.known.content_V)
        right_P = guess_P == places.token_P
        yield self._finding(
            "tokens by the surest layer", Channel.TOKENS, Unit.TOKENS, found.all, None,
            f"{self._who} {self._does('read')} {percent(found.all)} of all tokens in some layer",
            rate(self.prior_P, places.document_P), advantage(right_P, self.prior_P, places.document_P),
        )  # fmt: skip
        yield self._finding(
            "coverage", Channel.TOKENS, Unit.COVERAGE, found.coverage, None,
            f"{percent(found.coverage)} of all tokens reach {self._who_low} in some layer",
        )  # fmt: skip
        if found.content is not None:
            yield self._finding(
                "content tokens by the surest layer", Channel.TOKENS, Unit.CONTENT, found.content, None,
                f"{self._who} {self._does('read')} {percent(found.content)} of the tokens that carry meaning",
            )  # fmt: skip
        spans = _spans(places)
        first_S = torch.tensor([first for first, _ in spans])
        whole_S = torch.tensor([bool(right_P[first:behind].all()) for first, behind in spans])
        whole = rate(whole_S, places.document_P[first_S])
        yield self._finding(
            "whole records by the surest layer", Channel.TOKENS, Unit.RECORDS, whole, None,
            f"in {percent(whole)} of the records {self._who_low} {self._does('read')} every token",
        )  # fmt: skip

    def _held_out(self) -> Iterator[Finding]:
        """Held-out text, which crosses at every evaluation."""
        places = self.places
        if not places.evaluated_P.any():
            return
        guess_P, _ = self.guessed()
        inside = places.evaluated_P
        value = rate((guess_P == places.token_P)[inside], places.document_P[inside])
        share = float(inside.float().mean())
        yield self._finding(
            "tokens of held-out text", Channel.ROWS, Unit.TOKENS, value, None,
            f"{share:.0%} of the tokens that crossed in the recorded rounds are of held-out text, which every "
            f"evaluation sends; {self._who_low} {self._does('read')} {percent(value)} of them",
            rate(self.prior_P[inside], places.document_P[inside]),
        )  # fmt: skip

    def _routes(self) -> Iterator[Finding]:
        """Expert ids alone: of one layer, and of all layers of rows that vectors link."""
        known, best = self.known, None
        for layer, rows in self.table.layers.items():
            seen_E, view, truth = self.hosted[layer], known.views[layer], self.table.truth[layer]
            taught = routed(view.experts_PK, view.weights_PK, len(seen_E)) * seen_E
            right_R = Choices.fit(taught, view.token_P, known.unigram.log_V).guess(rows.routed_RE) == truth.token_R
            finding = self._seen("expert ids of one layer", Channel.IDS, layer, right_R, truth)
            if best is None or _value(finding) > _value(best):
                best = finding
        if best is not None:
            yield best
        yield from self._linked_routes()

    def _linked_routes(self) -> Iterator[Finding]:
        known, layers = self.known, sorted(self.table.layers)
        base = max(layers, key=lambda layer: len(self.table.layers[layer]))
        rows, truth = self.table.layers[base], self.table.truth[base]
        calls = self._trained_calls()
        chosen = torch.isin(rows.call_R, torch.tensor(calls))
        if not chosen.any():
            return
        chains = self._chains(base, calls)
        seen = {layer: self.hosted[layer] for layer in layers}
        features, taught = [], []
        for layer in layers:
            view, at_R = known.views[layer], chains[layer]
            routed_RE = torch.where(at_R[:, None] >= 0, self.table.layers[layer].routed_RE[at_R], 0)
            features.append(routed_RE[chosen])
            taught.append(routed(view.experts_PK, view.weights_PK, len(seen[layer])) * seen[layer])
        some = known.some(base)
        network = Network.fit(
            torch.cat(taught, 1)[some], known.views[base].token_P[some], known.unigram.log_V, seed=known.seed
        )
        right = network.guess(torch.cat(features, 1)) == truth.token_R[chosen]
        asked = Truth(truth.token_R[chosen], truth.next_R[chosen], truth.place_R[chosen])
        yield self._seen("expert ids and weights, linked over layers", Channel.IDS, base, right, asked)

    def _chains(self, base: int, calls: list[int]) -> dict[int, Tensor]:
        """For each row of the base layer its row in every layer, by pairing neighbouring layers; -1 where none is."""
        chains = {base: torch.arange(len(self.table.layers[base]))}
        above = [layer for layer in sorted(self.table.layers) if layer > base]
        below = [layer for layer in sorted(self.table.layers, reverse=True) if layer < base]
        for path in (above, below):
            before = base
            for layer in path:
                partner = self._linked(min(before, layer), max(before, layer), calls, upward=layer > before)
                at = chains[before]
                chains[layer] = torch.where(at >= 0, partner[at], -1)
                before = layer
        return chains

    def _linked(self, lower: int, upper: int, calls: list[int], *, upward: bool) -> Tensor:
        """The partner of each row of one layer in the next one, within a call."""
        low, high = self.table.layers[lower], self.table.layers[upper]
        partner = torch.full((len(low if upward else high),), -1)
        if upper != lower + 1:  # a layer between them reached nobody
            return partner
        linker = self.known.upwards[lower]
        for call in calls:
            a, b = (torch.nonzero(rows.call_R == call).squeeze(1) for rows in (low, high))
            if not len(a) or not len(b):
                continue
            scores = linker.scores(low.hidden_RD[a], high.hidden_RD[b])
            scores = scores + same_token(
                self._posterior(lower, a), self._posterior(upper, b), self.known.unigram.log_V
            )
            if upward:
                found = pair_up(scores)
                partner[a[found >= 0]] = b[found[found >= 0]]
            else:
                found = pair_up(scores.T)
                partner[b[found >= 0]] = a[found[found >= 0]]
        return partner

    def _posterior(self, layer: int, rows: Tensor) -> Tensor:
        received = self.table.layers[layer]
        reader = self.readers[layer][int(received.round_R[rows[0]])]
        return reader.log_posterior(received.hidden_RD[rows])

    def _pairs(self) -> Iterator[Finding]:
        """The order of the text: which row follows which, in training, where gradients tell the next token."""
        layer = max(self.table.layers, key=lambda one: len(self.table.layers[one]))
        rows, truth, places = self.table.layers[layer], self.table.truth[layer], self.places
        linker, log_V = self.known.orders[layer], self.known.unigram.log_V
        before_P = torch.full((len(places.token_P),), -1)
        calls = self._trained_calls()
        for call in calls:
            a = torch.nonzero((rows.call_R == call) & rows.has_gradient_R).squeeze(1)
            if len(a) < 2:
                continue
            after = self.known.nexts[layer].log_posterior(directions(rows.gradient_RD[a]))
            scores = linker.scores(rows.hidden_RD[a], rows.hidden_RD[a]) + same_token(
                after, self._posterior(layer, a), log_V
            )
            found = pair_up(scores, allowed_AB=~torch.eye(len(a), dtype=torch.bool))
            first, second = truth.place_R[a[found >= 0]], truth.place_R[a[found[found >= 0]]]
            real = (first >= 0) & (second >= 0)
            before_P[second[real]] = first[real]
        inside = torch.isin(places.call_P, torch.tensor(calls)) & (places.previous_P >= 0)
        if not inside.any():
            return
        value = rate((before_P == places.previous_P)[inside], places.document_P[inside])
        yield self._finding(
            "order rebuilt", Channel.TOKENS, Unit.PAIRS, value, layer,
            f"{self._who} {self._does('put')} {percent(value)} of all neighbouring tokens of training text beside "
            "each other again, although rows were shuffled",
        )  # fmt: skip

    def _trained_calls(self) -> list[int]:
        """The first and the last training forwards."""
        calls = next(iter(self.table.layers.values())).calls
        trained = [number for number, call in enumerate(calls) if call[1] > 0]
        half = _PAIRED_CALLS // 2
        return sorted({*trained[:half], *trained[-half:]})

    # ---- one host ----

    def rebuilt(self) -> Iterator[Finding]:
        """Whole records of the first forward, word by word, while the trunk is still the public one."""
        calls = next(iter(self.table.layers.values())).calls
        fresh = [place for place, call in enumerate(calls) if call[0] == (1 if call[1] else 0)]
        if not fresh:
            return
        inside = {layer: rows.hidden_RD[rows.call_R == fresh[0]] for layer, rows in self.table.layers.items()}
        inside = {layer: rows for layer, rows in inside.items() if len(rows)}
        among_V = torch.zeros(len(self.known.content_V), dtype=torch.bool)
        for layer in inside:
            among_V[self.read(layer)[0][self.table.layers[layer].call_R == fresh[0]]] = True
        texts, documents = _records(self.places, fresh[0])
        told = [
            rebuild(self.known.model, inside, self.hosted, [start], words=_WORDS, among_V=among_V)
            for start in beginnings(self.known.model, inside, self.hosted)[:_REBUILT]
        ]
        chosen = pairs(texts, told)
        if chosen:
            lengths = [min(_WORDS, len(texts[record])) for _, record, _ in chosen]
            of = torch.tensor([documents[record] for _, record, _ in chosen])
            value = rate(*places_in([count for count, _, _ in chosen], lengths, of))
            yield self._finding(
                "records rebuilt word by word", Channel.ROWS, Unit.PLACES, value, None,
                f"in the first round, with nothing given, {self._who_low} {self._does('put')} {percent(value)} of "
                f"the first {_WORDS} tokens of {len(chosen)} records in their places",
            )  # fmt: skip

    @property
    def _who(self) -> str:
        return self._who_low[0].upper() + self._who_low[1:]

    def _does(self, verb: str) -> str:
        return verb if self.adversary is Adversary.ALL_HOSTS else f"{verb}s"

    @property
    def _who_low(self) -> str:
        return "all other parties together" if self.adversary is Adversary.ALL_HOSTS else "one host"

    def _finding(
        self,
        name: str,
        channel: Channel,
        unit: Unit,
        value: Estimate,
        layer: int | None,
        sentence: str,
        prior: Estimate | None = None,
        gain: Estimate | None = None,
    ) -> Finding:
        where = "" if layer is None else f" at MoE layer {layer}"
        return Finding(
            name=name,
            adversary=self.adversary,
            channel=channel,
            unit=unit,
            value=value,
            layer=layer,
            prior=prior,
            gain=gain,
            sentence=f"{sentence[0].upper()}{sentence[1:]}{where}.",
        )


def _prior(known: Known, places: Places) -> Tensor:
    """Where the public model guesses a place, given the true text before it, bool [P]."""
    hits = torch.zeros(len(places.token_P), dtype=torch.bool)
    by_text: dict[tuple[int, ...], list[int]] = {}
    spans = _spans(places)
    for number, (first, behind) in enumerate(spans):
        by_text.setdefault(tuple(places.token_P[first:behind].tolist()), []).append(number)
    new = [text for text in by_text if text not in known.hits]
    if new:
        found = language_prior(known.model, new, known.unigram).hits()
        known.hits |= dict(zip(new, torch.split(found, [len(text) for text in new]), strict=True))
    for text, numbers in by_text.items():
        for number in numbers:
            hits[slice(*spans[number])] = known.hits[text]
    return hits


def _spans(places: Places) -> list[tuple[int, int]]:
    """Where each record begins and ends among the places."""
    starts = torch.nonzero(places.position_P == 0).squeeze(1).tolist()
    return list(zip(starts, [*starts[1:], len(places.token_P)], strict=True))


def _records(places: Places, call: int) -> tuple[list[list[int]], list[int]]:
    """The records of a call, and their documents."""
    spans = [(first, behind) for first, behind in _spans(places) if int(places.call_P[first]) == call]
    texts = [places.token_P[first:behind].tolist() for first, behind in spans]
    return texts, [int(places.document_P[first]) for first, _ in spans]


def _value(finding: Finding) -> float:
    return 0.0 if finding.value is None else finding.value.value


def percent(value: Estimate) -> str:
    return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"
