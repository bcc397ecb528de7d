"""Attacks on sums under a budget: they know clip norm, noise, rate and every weight that was served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from coterie.audit import metrics
from coterie.audit.adversaries import Adversary
from coterie.audit.epsilon.allowed import by_mechanism
from coterie.audit.experts.bayes import CANDIDATES, Blank, filled
from coterie.audit.experts.case import Case, Clock, Owned
from coterie.audit.experts.clipped import factors
from coterie.audit.experts.membership import Metric, Scored, score
from coterie.audit.experts.opened import Opened
from coterie.audit.experts.plain import rates, too_few
from coterie.audit.experts.pushes import noised, standard_deviation
from coterie.audit.experts.reader import Reader
from coterie.audit.findings import Channel, Finding, Unit
from coterie.audit.metrics import Scores
from coterie.config import PrivacyRules
from coterie.dp.accounting.accountant import Mechanism

_SCORED = 200
_FEWEST = 20


def rate_of(case: Case) -> float:
    """The chance that a record is in a lot."""
    rules = case.federation.privacy
    lot = rules.lot_size if isinstance(rules, PrivacyRules) else None
    return min(1.0, (lot or case.federation.train.batch_size) / max(len(case.train), 1))


def clip_norm_of(case: Case) -> float:
    """C, which the federation agreed on."""
    rules = case.federation.privacy
    return rules.clip_norm if isinstance(rules, PrivacyRules) else 1.0


def releases(case: Case, adversary: Adversary) -> Iterator[tuple[Reader, Opened]]:
    """Every round's noised sums, and the model that they were made with."""
    for round_index in case.rounds():
        opened = case.opened(adversary, round_index)
        yield case.reader_at(round_index), noised(opened, standard_deviation(opened))


def tokens(case: Case, adversary: Adversary, clock: Clock, *, places: int = 1000) -> Finding:
    """One token of a record of which all others are known, by Bayes weight, in records of the first round's lot.

    The adversary is told that the record is in the lot.

    Args:
        case: the run.
        adversary: whose sums are opened.
        clock: when to stop.
        places: most places.
    """
    reader, opened = next(releases(case, adversary))
    records = [record for record in case.lot(case.rounds()[0]) if len(record.ids) > 1]
    blanks, documents = blanks_of(case, records, places)
    public = case.shown
    lot = rate_of(case) * len(case.train)
    metric = Metric(reader, public, lot, opened.noise, factors(reader.model, public, clip_norm_of(case)))
    right: list[Tensor] = []
    prior: list[Tensor] = []
    for blank in blanks:
        if right and not clock.left:
            break
        one, other = filled(reader, [blank], [opened], metric, 1.0)
        right.append(one)
        prior.append(other)
    right_P, prior_P = torch.cat(right), torch.cat(prior)
    document_P = documents[: len(right_P)]
    value = metrics.rate(right_P, document_P, seed=case.seed)
    guessed = metrics.rate(prior_P, document_P, seed=case.seed)
    gain = metrics.advantage(right_P, prior_P, document_P, seed=case.seed)
    return Finding(
        name="one token, all others known",
        adversary=adversary,
        channel=Channel.RELEASES,
        unit=Unit.PLACES,
        lot=round(lot),
        value=value,
        prior=guessed,
        gain=gain,
        sentence=f"Of {len(right_P)} places the truth came out first at {value.value:.1%}, by the language model "
        f"alone at {guessed.value:.1%}: {gain.value:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}]. Both choose among "
        f"{CANDIDATES} candidates of which the truth always is one.",
    )


def blanks_of(case: Case, records: Sequence[Owned], count: int) -> tuple[list[Blank], Tensor]:
    """Places to be filled, drawn over the records in turn, with their documents."""
    draw = case.random()
    order = draw.sample(list(records), len(records))
    chosen = [order[number % len(order)] for number in range(count)]
    distinct = {record.row: record for record in chosen}
    scale = factors(case.reader.model, [record.ids for record in distinct.values()], clip_norm_of(case))
    factor_of = dict(zip(distinct, scale.tolist(), strict=True))
    blanks = [Blank(r.ids, draw.randrange(1, len(r.ids)), factor_of[r.row]) for r in chosen]
    return blanks, torch.tensor([record.document for record in chosen])


def membership(case: Case, adversary: Adversary, clock: Clock, *, candidates: int = _SCORED) -> list[Finding]:
    """Whether a known record was in one given lot: records of the owner's own, of which lots were drawn at random.

    Whether a record is in the owner's data at all is not measured here: held-out text was set aside by a person, and
    whatever tells it from the owner's would pass for leakage.

    Args:
        case: the run.
        adversary: whose sums are opened.
        clock: when to stop; rounds that are not reached are left out.
        candidates: most records that are scored.
    """
    members = [record for record in case.train if len(record.ids) > 1]
    members = case.random().sample(members, min(candidates, len(members)))
    ids = [record.ids for record in members]
    public = case.shown
    lot = rate_of(case) * len(case.train)
    scale = factors(case.reader.model, [*public, *ids], clip_norm_of(case))
    seen: list[Scored] = []
    sigma = 0.0
    for reader, opened in releases(case, adversary):
        if seen and not clock.left:
            break
        sigma = opened.noise / clip_norm_of(case)
        metric = Metric(reader, public, lot, opened.noise, scale[: len(public)])
        seen.append(score(reader, ids, [opened], metric, scale[len(public) :]))
    name, sides = "membership in a lot", in_lots(case, members, seen)
    if min(len(values) for values, _ in sides.values()) < _FEWEST:
        return [too_few(name, adversary, Channel.RELEASES, round(lot), _FEWEST), _not_by_coins(adversary)]
    (inside, inside_documents), (outside, outside_documents) = sides[True], sides[False]
    scores = Scores.of(inside, outside, inside_documents, outside_documents)
    allowed = by_mechanism([(Mechanism(sigma, 1.0), 1)]).auc  # of a round whose lot it is in or not, without the draw
    more = f" The noise allows no test more than {allowed:.3f}."
    found = rates(name, case, adversary, Channel.RELEASES, scores, round(lot), more)
    promised = [each.model_copy(update={"allowed": allowed}) if each.unit is Unit.AUC else each for each in found]
    return [*promised, _not_by_coins(adversary)]


def _not_by_coins(adversary: Adversary) -> Finding:
    return Finding(
        name="membership over rounds",
        adversary=adversary,
        channel=Channel.RELEASES,
        unit=Unit.AUC,
        value=None,
        reason="members were not chosen by coins",
        sentence="Whether a record is in the owner's data was not measured: a person chose what was held out.",
    )


_Sides = dict[bool, tuple[list[float], list[int]]]
"""Scores and documents of members, and of others."""


def in_lots(case: Case, members: Sequence[Owned], seen: Sequence[Scored]) -> _Sides:
    """Scores of every record with every round, and its document: drawn into the round's lot (True), or not."""
    found: _Sides = {True: ([], []), False: ([], [])}
    for number, scored in zip(case.rounds(), seen, strict=False):
        rows = {record.row for record in case.lot(number)}
        for record, value in zip(members, scored.log_ratio().tolist(), strict=False):
            values, documents = found[record.row in rows]
            values.append(value)
            documents.append(record.document)
    return found
