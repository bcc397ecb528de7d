"""Every attack on the sums of one owner's run, in the time allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coterie.audit import metrics
from coterie.audit.adversaries import Adversary
from coterie.audit.evidence import Evidence
from coterie.audit.experts import noised, plain
from coterie.audit.experts.case import Case, TimeBudget
from coterie.audit.experts.loads import loads
from coterie.audit.findings import Channel, Finding, Unit

Attack = Callable[[TimeBudget], list[Finding]]
"""Takes the time it may use."""

_SHORTEST_S = 5.0
"""Less is not begun with."""
_ALWAYS, _ALWAYS_PRIVATE = 2, 4
"""Attacks that are made in whatever time: without a budget the run's own push and one of a single record, under one
the noise, text and membership, of the default adversary."""
_FOR_RECORDS_S = 120.0
_OF_LOADS = 4
"""Records in a push whose loads are told."""


def attack(evidence: Evidence, *, seed: int, budget_s: float) -> list[Finding]:
    """Attack what other parties received of one owner in the exchange `experts`.

    Args:
        evidence: of the run.
        seed: of everything that is drawn.
        budget_s: seconds; attacks that are not reached say so in their finding.

    Raises:
        AuditError: nothing was received, or nothing can be scored (code audit-no-pushes).
        CheckpointError: transcript and key do not fit.
    """
    case = Case(evidence, seed)
    clock = TimeBudget(budget_s)
    plainly = evidence.privacy is None
    jobs, always = (_plain(case, budget_s), _ALWAYS) if plainly else (_noised(case), _ALWAYS_PRIVATE)
    found: list[Finding] = []
    for number, job in enumerate(jobs):
        if job.adversary is Adversary.ALL_HOSTS and case.parties_in(job.adversary) > 1:
            found.append(_unmeasured(job, "masks of the parties whose recordings are not here hide what it opens"))
        elif number >= always and clock.left < _SHORTEST_S:
            found.append(_unmeasured(job, "the time that the audit was given did not reach so far"))
        else:
            share = clock.share(job.weight / sum(each.weight for each in jobs[number:]))
            found += [_of_several(case, each) for each in job.run(share)]
    return found


def _of_several(case: Case, finding: Finding) -> Finding:
    """Where pushes were masked, what is in the sum beside the owner's records."""
    parties = case.parties_in(finding.adversary)
    if parties == 1 or finding.value is None:
        return finding
    return finding.model_copy(
        update={
            "sentence": f"{finding.sentence} Pushes were masked: what this adversary opens is the sum over {parties} "
            "parties, of which one is attacked."
        }
    )


@dataclass(frozen=True)
class _Job:
    """An attack that waits for its turn.

    Attributes:
        weight: how much of the time it may use beside the others.
    """

    name: str
    adversary: Adversary
    unit: Unit
    weight: float
    run: Attack


def _plain(case: Case, budget_s: float) -> list[_Job]:
    """What matters most comes first: time may not reach to the end."""
    both = Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS
    recorded = len(case.lot(case.rounds()[0]))
    whole = {each: recorded * case.parties_in(each) for each in both}
    jobs = [
        _next(case, each, lot)
        for each in both
        for lot in (whole[each], *_simulated(case.parties_in(each), recorded, whole[each]))
    ]
    jobs += [_member(case, each, whole[each]) for each in both]
    jobs += [_bag(case, each) for each in both]
    several = max(1, recorded // metrics.FEWEST_DOCUMENTS)
    jobs.append(_loads(case, min(_OF_LOADS * case.parties_in(Adversary.HOST_PUBLIC), several)))
    if case.evidence.trunk == "private" and len(case.rounds()) > 1:
        jobs += [_next(case, each, whole[each], round_index=case.rounds()[-1]) for each in both]
    if recorded > 1:
        jobs.append(_next(case, Adversary.HOST_DOMAIN, whole[Adversary.HOST_PUBLIC], known=recorded // 2))
    sizes = [lot for lot in plain.MEMBER_LOTS if lot <= len(case.train) // 2]
    jobs += [_member(case, each, lot) for lot in sizes for each in both if lot > whole[each]]
    if budget_s >= _FOR_RECORDS_S:
        jobs += [_search(case, lot) for lot in plain.LOTS if lot <= recorded]
    return jobs


def _simulated(parties: int, recorded: int, whole: int) -> list[int]:
    """Records in simulated sums that so many parties push to; the owner's own stand for all."""
    return [lot * parties for lot in plain.LOTS if lot * parties <= recorded and lot * parties < whole]


def _noised(case: Case) -> list[_Job]:
    both = Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS
    # Cheapest first: whether the noise is there at all needs a look at the sums alone.
    return [*(_noise(case, each) for each in both), *(job(case, each) for each in both for job in (_token, _run))]


def _next(case: Case, adversary: Adversary, lot: int, known: int = 0, round_index: int | None = None) -> _Job:
    def run(clock: TimeBudget) -> list[Finding]:
        return [plain.next_tokens(case, adversary, lot, clock, known=known, round_index=round_index)]

    return _Job("next token by spans", adversary, Unit.PLACES, 1.0, run)


def _member(case: Case, adversary: Adversary, lot: int) -> _Job:
    return _Job(
        "membership in a push", adversary, Unit.AUC, 1.0, lambda clock: plain.membership(case, adversary, lot, clock)
    )


def _bag(case: Case, adversary: Adversary) -> _Job:
    return _Job("bag of tokens", adversary, Unit.BAG, 1.0, lambda clock: plain.bag(case, adversary, clock))


def _loads(case: Case, lot: int) -> _Job:
    return _Job(
        "number of an expert's tokens by rank",
        Adversary.HOST,
        Unit.LOADS,
        0.5,
        lambda clock: [loads(case, lot, clock)],
    )


def _search(case: Case, lot: int) -> _Job:
    adversary = Adversary.ALL_HOSTS
    return _Job(
        "whole records by search",
        adversary,
        Unit.TOKENS,
        3.0,
        lambda clock: [plain.whole_records(case, adversary, lot, clock)],
    )


def _token(case: Case, adversary: Adversary) -> _Job:
    return _Job(
        "one token, all others known",
        adversary,
        Unit.PLACES,
        1.0,
        lambda clock: [noised.tokens(case, adversary, clock)],
    )


def _run(case: Case, adversary: Adversary) -> _Job:
    return _Job(
        "membership over rounds", adversary, Unit.AUC, 2.0, lambda clock: noised.membership(case, adversary, clock)
    )


def _noise(case: Case, adversary: Adversary) -> _Job:
    return _Job("noise in the recorded sums", adversary, Unit.NOISE, 0.2, lambda clock: noised.noise(case, adversary))


def _unmeasured(job: _Job, reason: str) -> Finding:
    return Finding(
        name=job.name,
        adversary=job.adversary,
        channel=Channel.PUSHES,
        unit=job.unit,
        value=None,
        reason=reason,
        sentence="Not measured.",
    )
