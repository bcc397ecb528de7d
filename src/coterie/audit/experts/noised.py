"""Attacks on sums under a budget: they know clip norm, noise, rate and every weight that was served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from coterie.audit import metrics
from coterie.audit.adversaries import Adversary
from coterie.audit.epsilon.allowed import by_mechanism
from coterie.audit.experts.bayes import CANDIDATES, Blank, filled
from coterie.audit.experts.case import Case, Owned, TimeBudget
from coterie.audit.experts.clipped import factors
from coterie.audit.experts.membership import Metric, RecordScores, score
from coterie.audit.experts.opened import Opened
from coterie.audit.experts.plain import rates, too_few
from coterie.audit.experts.pushes import noised, standard_deviation
from coterie.audit.experts.reader import Reader
from coterie.audit.findings import NO_COINS, Channel, Finding, Unit
from coterie.audit.metrics import Estimate, Scores
from coterie.dp.accounting.accountant import Mechanism

_SCORED = 200
_FEWEST = 20
_AT_ONCE = 8
"""Places between two looks at the clock."""


def rate_of(case: Case) -> float:
    """The chance that a record is in a lot."""
    return min(1.0, case.federation.lot_of(case.evidence.owner) / max(len(case.train), 1))


def metric_of(case: Case, adversary: Adversary, reader: Reader, opened: Opened) -> Metric:
    """How one round's sums scatter over lots, of all parties that are in what the adversary opens."""
    lot = case.expected_records(adversary)
    if reader is case.reader:
        return case.clipped_metric.sized(lot, opened.noise)
    return Metric(reader, case.shown, lot, opened.noise, case.shown_factors)


def releases(case: Case, adversary: Adversary) -> Iterator[tuple[Reader, Opened]]:
    """Every round's noised sums, and the model that they were made with."""
    for round_index in case.rounds():
        opened = case.opened(adversary, round_index)
        yield case.reader_at(round_index), noised(opened, standard_deviation(opened))


def tokens(case: Case, adversary: Adversary, clock: TimeBudget, *, places: int = 1000) -> Finding:
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
    lot = rate_of(case) * len(case.train)
    metric = metric_of(case, adversary, reader, opened)
    right: list[Tensor] = []
    prior: list[Tensor] = []
    documents: list[int] = []
    for blanks, own in blanks_of(case, records, places):
        if right and not clock.left:
            break
        one, other = filled(reader, blanks, [opened], metric, 1.0)
        right.append(one)
        prior.append(other)
        documents += own
    right_P, prior_P, document_P = torch.cat(right), torch.cat(prior), torch.tensor(documents)
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


def blanks_of(case: Case, records: Sequence[Owned], count: int) -> Iterator[tuple[list[Blank], list[int]]]:
    """Places to be filled with their documents, a few at once, drawn over the records in turn."""
    draw = case.random()
    order = draw.sample(list(records), len(records))
    for start in range(0, count, _AT_ONCE):
        some = [order[number % len(order)] for number in range(start, min(start + _AT_ONCE, count))]
        scale = factors(case.reader.model, [record.ids for record in some], case.clip_norm).tolist()
        blanks = [
            Blank(record.ids, draw.randrange(1, len(record.ids)), factor)
            for record, factor in zip(some, scale, strict=True)
        ]
        yield blanks, [record.document for record in some]


def membership(case: Case, adversary: Adversary, clock: TimeBudget, *, candidates: int = _SCORED) -> list[Finding]:
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
    lot = rate_of(case) * len(case.train)
    scale = factors(case.reader.model, ids, case.clip_norm)
    seen: list[RecordScores] = []
    measured: list[float] = []
    for reader, opened in releases(case, adversary):
        if seen and not clock.left:
            break
        measured.append(opened.noise / case.clip_norm)
        seen.append(score(reader, ids, [opened], metric_of(case, adversary, reader, opened), scale))
    claimed = case.claimed_noise(adversary)
    sigma = measured[-1] if claimed is None else claimed
    name, sides = "membership in a lot", in_lots(case, members, seen)
    if min(len(values) for values, _ in sides.values()) < _FEWEST:
        return [too_few(name, adversary, Channel.RELEASES, round(lot), _FEWEST), _not_by_coins(adversary)]
    (inside, inside_documents), (outside, outside_documents) = sides[True], sides[False]
    scores = Scores.of(inside, outside, inside_documents, outside_documents)
    allowed = by_mechanism([(Mechanism(sigma, 1.0), 1)]).auc  # of a round whose lot it is in or not, without the draw
    more = f" The noise allows no test more than {allowed:.3f}."
    found = rates(name, case, adversary, Channel.RELEASES, scores, round(lot), more)
    if claimed is None:  # what the noise that was found allows is no claim
        return [*found, _not_by_coins(adversary)]
    promised = [each.model_copy(update={"allowed": allowed}) if each.unit is Unit.AUC else each for each in found]
    return [*promised, _not_by_coins(adversary)]


def noise(case: Case, adversary: Adversary) -> list[Finding]:
    """How much noise the recorded sums hold, over what the run claims for them: what is learnt adds to it, so honest
    sums hold no less."""
    claimed = case.claimed_noise(adversary)
    if claimed is None:
        return []
    shares = [opened.noise / (case.clip_norm * claimed) for _, opened in releases(case, adversary)]
    values = sum(value.numel() for value in _values(case.opened(adversary, case.rounds()[0])))
    least = min(shares)
    error = 2 * 1.17 / values**0.5  # of a standard deviation that is estimated by the middle of the sizes
    return [
        Finding(
            name="noise in the recorded sums",
            adversary=adversary,
            channel=Channel.RELEASES,
            unit=Unit.NOISE,
            value=Estimate(least, least * (1 - error), least * (1 + error), values),
            sentence=f"The sums that this adversary opens hold {least:.3f} times the noise that is claimed for them, "
            "in the round with least of it.",
        )
    ]


def _values(opened: Opened) -> Iterator[Tensor]:
    for each in opened.experts.values():
        yield from (each.first_DG, each.second_FD)


def _not_by_coins(adversary: Adversary) -> Finding:
    return Finding(
        name="membership over rounds",
        adversary=adversary,
        channel=Channel.RELEASES,
        unit=Unit.AUC,
        value=None,
        reason=NO_COINS,
        sentence="Whether a record is in the owner's data was not measured: a person chose what was held out.",
    )


_Sides = dict[bool, tuple[list[float], list[int]]]
"""Scores and documents of members, and of others."""


def in_lots(case: Case, members: Sequence[Owned], seen: Sequence[RecordScores]) -> _Sides:
    """Scores of every record with every round, and its document: drawn into the round's lot (True), or not."""
    found: _Sides = {True: ([], []), False: ([], [])}
    for number, scored in zip(case.rounds(), seen, strict=False):
        rows = {record.row for record in case.lot(number)}
        for record, value in zip(members, scored.log_ratio().tolist(), strict=False):
            values, documents = found[record.row in rows]
            values.append(value)
            documents.append(record.document)
    return found
