"""Attacks on pushed sums that nothing bounds: by the size of the push, for one host and for all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.audit import metrics
from coterie.audit.adversaries import Adversary
from coterie.audit.experts.bag import Bag, BagReader, table_names, table_sums
from coterie.audit.experts.case import Case, Owned, TimeBudget, documents_of
from coterie.audit.experts.drift import drifted
from coterie.audit.experts.membership import score
from coterie.audit.experts.opened import ExpertSum, Opened
from coterie.audit.experts.records import read_records
from coterie.audit.experts.simulate import rows_of, summed
from coterie.audit.experts.span import Place, SpanAttack, ranked_first
from coterie.audit.findings import Channel, Finding, Unit
from coterie.audit.matching import matched, places_in
from coterie.audit.metrics import Estimate, Scores

LOTS = (1, 4)
"""Sizes of push that are simulated from the owner's own records, beside the recorded one."""
MEMBER_LOTS = (64, 256)
_AT_ONCE = 8
_ADDING_UP = 3e-7
"""Of values of sums in float32, over their size: what another order of adding up changes."""
_SCORED = 400
_BAGS = 8
"""Pushes whose tokens are read: the recorded one, and others of the same size."""
_FEWEST_OTHERS = 40
_FEWEST_MEMBERS = 20
"""Of fewer, a share of members found says nothing."""


def places_of(case: Case, records: Sequence[Owned], count: int) -> tuple[list[Place], Tensor]:
    """Places to guess in some records, a few lengths of prefix and each record as often, with their documents."""
    draw = case.random()
    usable = [record for record in records if len(record.ids) > 1]
    places: list[Place] = []
    documents: list[int] = []
    while usable and len(places) < count:
        length = draw.randrange(1, max(len(record.ids) for record in usable))
        for record in draw.sample(usable, min(_AT_ONCE, len(usable))):
            if length < len(record.ids):
                places.append(Place(record.ids[:length], record.ids[length]))
                documents.append(record.document)
    return places[:count], torch.tensor(documents[:count])


def next_tokens(
    case: Case,
    adversary: Adversary,
    lot: int,
    clock: TimeBudget,
    *,
    places: int = 1000,
    known: int = 0,
    round_index: int | None = None,
) -> Finding:
    """How often the next token of a record comes out first, given the true prefix.

    Args:
        case: the run.
        adversary: whose sums are opened.
        lot: records in the sum that is opened: as many as in the recorded one, or fewer of the owner's.
        clock: when to stop.
        places: most places.
        known: records of the push that the adversary has, and takes out of it.
        round_index: default: the first one. In a later one a private trunk has drifted, and the adversary learns
            with that.
    """
    first = case.rounds()[0]
    round_index = first if round_index is None else round_index
    reader, victim = case.reader_at(round_index), None
    if round_index > first and case.evidence.trunk == "private":
        train = case.federation.train
        victim = drifted(reader, case.public, case.federation.optim, round_index - first, train.batch_size, case.seed)
    recorded, whole = case.opened(adversary, round_index), case.lot(round_index)
    own = lot == case.records_in(adversary, round_index)
    pushes = [(whole, recorded)] if own else simulated(case, whole, lot, list(recorded.experts))
    if known:
        pushes = [
            (
                records[known:],
                without(opened, summed(rows_of(reader, [r.ids for r in records[:known]]), list(opened.experts))),
            )
            for records, opened in pushes
        ]
    attack = SpanAttack(
        reader,
        case.learned,
        list(recorded.experts),
        lot - known,
        rounding=case.rounding,
        victim=victim,
        metric=case.metric,
        seed=case.seed,
    )
    right, prior, documents = [], [], []
    for number, (records, opened) in enumerate(pushes):
        share = clock.share(1 / (len(pushes) - number))
        found, document_P = places_of(case, records, -(-places // len(pushes)))
        for start in range(0, len(found), _AT_ONCE):
            if start and not share.left:
                break
            some = slice(start, start + _AT_ONCE)
            one, other = ranked_first(attack, opened, found[some])
            right.append(one)
            prior.append(other)
            documents.append(document_P[some])
    right_P, prior_P, document_P = torch.cat(right), torch.cat(prior), torch.cat(documents)
    value = metrics.rate(right_P, document_P, seed=case.seed)
    guessed = metrics.rate(prior_P, document_P, seed=case.seed)
    sentence = (
        f"Given what stands before, {_percent(value)} of the next tokens of {'the' if own else 'a simulated'} push "
        f"of {counted(lot)} came out first; "
        f"a language model without the push guesses {_percent(guessed)}."
    )
    if victim is not None:
        sentence += f" The trunk had drifted for {round_index - first} rounds."
    if known:
        sentence += f" {known} of the records were known and taken out of the sum."
    return Finding(
        name="next token by spans",
        adversary=adversary,
        channel=Channel.PUSHES,
        unit=Unit.PLACES,
        lot=lot,
        simulated=not own,
        value=value,
        prior=guessed,
        gain=metrics.advantage(right_P, prior_P, document_P, seed=case.seed),
        sentence=sentence,
    )


def counted(records: int) -> str:
    """For people."""
    return "1 record" if records == 1 else f"{records} records"


def simulated(
    case: Case, records: Sequence[Owned], lot: int, visible: Sequence[tuple[int, int]], most: int | None = None
) -> list[tuple[list[Owned], Opened]]:
    """Pushes of a few of the records each, and what is opened of each.

    Args:
        case: the run.
        records: what they are made of.
        lot: records in each.
        visible: (layer, expert) that are opened.
        most: pushes, as far as there are records; default: as many as an interval needs documents.
    """
    draw, cut, order = case.random(), Counter[int](), []
    for record in draw.sample(list(records), len(records)):
        order.append((cut[record.document], record))
        cut[record.document] += 1
    scattered = [record for _, record in sorted(order, key=lambda each: each[0])]
    count = max(1, min(most or -(-metrics.FEWEST_DOCUMENTS // lot), len(scattered) // lot))
    dealt = [scattered[number::count][:lot] for number in range(count)]
    return [
        (some, summed(rows_of(case.reader, [record.ids for record in some]), visible, rounding=case.rounding))
        for some in dealt
    ]


def without(opened: Opened, known: Opened) -> Opened:
    """What is left of a push when known records are taken out."""
    left = {}
    for key, each in opened.experts.items():
        own = known.experts.get(key)
        left[key] = each if own is None else _difference(each, own)
    return Opened(left)


def _difference(each: ExpertSum, known: ExpertSum) -> ExpertSum:
    """Less the known part; what only rounding has left is nothing, and the rounding of the whole stays as noise."""
    sides, noise = [], each.noise
    for whole, part in ((each.first_DG, known.first_DG), (each.second_FD, known.second_FD)):
        rest = whole - part
        sides.append(rest if float(rest.norm()) > 1e-5 * float(whole.norm()) else torch.zeros_like(rest))
        noise = max(noise, _ADDING_UP * float(whole.square().mean().sqrt()))
    return ExpertSum(sides[0], sides[1], noise, each.rounding)


def whole_records(case: Case, adversary: Adversary, lot: int, clock: TimeBudget) -> Finding:
    """Records read with nothing given, from pushes of a few of the owner's records."""
    round_index = case.rounds()[0]
    visible = list(case.opened(adversary, round_index).experts)
    pushes = simulated(case, case.lot(round_index), lot, visible)
    attack = SpanAttack(
        case.reader, case.learned, visible, lot, rounding=case.rounding, metric=case.metric, seed=case.seed
    )
    longest = max(len(record) for record in case.public)
    records, in_place = [], []
    for number, (some, opened) in enumerate(pushes):
        own = clock.share(1 / (len(pushes) - number))
        guesses = read_records(attack, opened, lot, longest, budget_s=own.left)
        in_place += matched([record.ids for record in some], [guess.ids for guess in guesses])
        records += some
    right_P, document_P = places_in(in_place, [len(record.ids) for record in records], documents_of(records))
    exact = sum(count == len(record.ids) for count, record in zip(in_place, records, strict=True))
    value = metrics.rate(right_P, document_P, seed=case.seed)
    return Finding(
        name="whole records by search",
        adversary=adversary,
        channel=Channel.PUSHES,
        unit=Unit.TOKENS,
        lot=lot,
        simulated=True,
        value=value,
        sentence=f"With nothing given, {sum(in_place)} of the {len(right_P)} tokens of {len(pushes)} simulated "
        f"pushes of {counted(lot)} were read in their places; {exact} of {len(records)} records to the last token.",
    )


@dataclass(frozen=True)
class Split:
    """Records of which some are members; scores are joined to them by their place in the list."""

    records: list[Owned]
    member: list[bool]

    def scores(self, value_S: Tensor) -> Scores:
        inside = torch.tensor(self.member)
        document_S = torch.tensor([record.document for record in self.records])
        return Scores.of(value_S[inside], value_S[~inside], document_S[inside], document_S[~inside])


def membership(case: Case, adversary: Adversary, lot: int, clock: TimeBudget) -> list[Finding]:
    """Whether a known record is in a push without noise: the recorded one, or one of that many of the records."""
    round_index = case.rounds()[0]
    recorded, whole = case.opened(adversary, round_index), case.lot(round_index)
    draw = case.random()
    own = lot == case.records_in(adversary, round_index)
    if own:
        members, opened = whole, recorded
        rows = {record.row for record in whole}
        others = [record for record in case.train if record.row not in rows]
    else:
        shuffled = draw.sample(case.train, len(case.train))
        members, others = shuffled[:lot], shuffled[lot:]
        opened = summed(
            rows_of(case.reader, [r.ids for r in members]), list(recorded.experts), rounding=case.rounding
        )
    if len(others) < _FEWEST_OTHERS:
        return [too_few("membership in a push", adversary, Channel.PUSHES, lot, _FEWEST_OTHERS)]
    metric = case.metric.sized(lot)
    split = _balanced(
        members, draw.sample(others, min(_SCORED, len(others))), draw.sample(members, min(_SCORED // 2, len(members)))
    )
    scored = score(case.reader, [record.ids for record in split.records], [opened], metric)
    found = rates("membership in a push", case, adversary, Channel.PUSHES, split.scores(scored.log_ratio()), lot)
    if own:
        return found
    return [each.model_copy(update={"unit": Unit.SIMULATED}) if each.unit is Unit.AUC else each for each in found]


def _balanced(members: Sequence[Owned], others: Sequence[Owned], chosen: Sequence[Owned]) -> Split:
    return Split([*chosen, *others], [True] * len(chosen) + [False] * len(others))


def too_few(name: str, adversary: Adversary, channel: Channel, lot: int | None, needed: int) -> Finding:
    """An AUC that the records at hand do not carry."""
    return Finding(
        name=name,
        adversary=adversary,
        channel=channel,
        unit=Unit.AUC,
        lot=lot,
        value=None,
        reason=f"fewer than {needed} of the owner's records are on one of the two sides",
        sentence="It could not be measured.",
    )


def rates(
    name: str, case: Case, adversary: Adversary, channel: Channel, scores: Scores, lot: int | None, more: str = ""
) -> list[Finding]:
    """AUC, and the members found at 1 % and 0.1 % of false alarms where the others are enough for it."""
    area = metrics.auc(scores, seed=case.seed)
    fpr, tpr = metrics.roc(scores)
    curve = tuple(zip(fpr.tolist(), tpr.tolist(), strict=True))
    found = [
        Finding(
            name=name,
            adversary=adversary,
            channel=channel,
            unit=Unit.AUC,
            lot=lot,
            value=area,
            roc=curve,
            sentence=f"A known record that was in scores above one that was not with chance {area.value:.3f} "
            f"[{area.low:.3f}, {area.high:.3f}].{more}",
        )
    ]
    for level in (0.01, 0.001) if len(scores.member_M) >= _FEWEST_MEMBERS else ():
        hits = metrics.tpr_at(level, scores, seed=case.seed)
        if hits is not None:
            found.append(
                Finding(
                    name=f"{name} at {level:.1%} false alarms",
                    adversary=adversary,
                    channel=channel,
                    unit=Unit.TPR,
                    lot=lot,
                    value=hits,
                    sentence=f"With {level:.1%} of false alarms {_percent(hits)} of the members are found.",
                )
            )
    return found


def bag(case: Case, adversary: Adversary, clock: TimeBudget) -> list[Finding]:
    """Which tokens a push holds, from the sums of embedding and head; nothing where they do not cross.

    What is read of one push says nothing of others: beside the recorded one as many are made of the owner's other
    records as they give, up to `_BAGS` in all.
    """
    round_index = case.rounds()[0]
    opened, records = case.opened(adversary, round_index), case.lot(round_index)
    names = [name for name in table_names(case.reader.model) if name in opened.trunk]
    if not names:
        return []
    lot = case.records_in(adversary, round_index)
    reader = BagReader(case.reader, case.public, lot, names, pushes=max(6, min(24, 256 // lot)), seed=case.seed)
    pushes = [(records, {name: opened.trunk[name] for name in names}), *_other_bags(case, records, lot, names)]
    found: list[tuple[Tensor, Bag]] = []
    for some, sums in pushes:
        if found and not clock.left:
            break
        found.append((_truth(some, case.reader.vocabulary), reader.read(sums)))
    usual = reader.usual()
    f1 = metrics.mean([_f_measure(truth_V, each.counts_V) for truth_V, each in found])
    f1_prior = metrics.mean([_f_measure(truth_V, usual.counts_V) for truth_V, _ in found])
    area = metrics.mean([_presence(truth_V, each.log_odds_V) for truth_V, each in found])
    area_prior = metrics.mean([_presence(truth_V, usual.log_odds_V) for truth_V, _ in found])
    several = len(found) > 1
    one = f"a push of {counted(lot)}"
    of = f"{len(found)} pushes of {counted(lot)}, of which all but one are simulated," if several else one
    return [
        Finding(
            name="bag of tokens",
            adversary=adversary,
            channel=Channel.EMBEDDING,
            unit=Unit.BAG,
            lot=lot,
            simulated=several,
            value=f1,
            prior=f1_prior,
            sentence=f"Which tokens {of} hold, and how often, was read with F1 {f1.value:.2f} "
            f"[{f1.low:.2f}, {f1.high:.2f}]; without the push {f1_prior.value:.2f}.",
        ),
        Finding(
            name="presence of a token",
            adversary=adversary,
            channel=Channel.EMBEDDING,
            unit=Unit.PRESENCE,
            lot=lot,
            simulated=several,
            value=area,
            prior=area_prior,
            sentence=f"In {of} a token that occurs is told from one that does not with AUC {area.value:.3f} "
            f"[{area.low:.3f}, {area.high:.3f}]; without the push {area_prior.value:.3f}.",
        ),
    ]


def _other_bags(
    case: Case, recorded: Sequence[Owned], lot: int, names: Sequence[str]
) -> Iterator[tuple[list[Owned], dict[str, Tensor]]]:
    """Sums like the recorded one, of the owner's other records, each of which is in one of them at most; as many as
    in the recorded one count as the owner's, and the rest stand for other parties'."""
    rows = {record.row for record in recorded}
    others = [record for record in case.train if record.row not in rows]
    order = case.random().sample(others, len(others))
    for start in range(0, min(len(order) // lot, _BAGS - 1) * lot, lot):
        some = order[start : start + lot]
        sums = table_sums(case.reader, [record.ids for record in some])
        yield (
            some[: len(recorded)],
            {name: sums[name].bfloat16().float() if case.rounding else sums[name] for name in names},
        )


def _truth(records: Sequence[Owned], vocabulary: int) -> Tensor:
    """How often each id occurs. int64 [V]"""
    return torch.bincount(torch.tensor([token for record in records for token in record.ids]), minlength=vocabulary)


def _presence(truth_V: Tensor, log_odds_V: Tensor) -> float:
    """AUC of an id that occurs against one that does not."""
    here_V = truth_V > 0
    return metrics.area(Scores.of(log_odds_V[here_V], log_odds_V[~here_V]))


def _f_measure(truth_V: Tensor, guess_V: Tensor) -> float:
    both, either = int(torch.minimum(truth_V, guess_V).sum()), int((truth_V + guess_V).sum())
    return 2 * both / either if either else 0.0


def _percent(value: Estimate) -> str:
    return f"{value.value:.0%} [{value.low:.0%}, {value.high:.0%}]"
