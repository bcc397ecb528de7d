"""Every attack on the sums of one owner's run, in the time allowed."""

from __future__ import annotations

from collections.abc import Callable

from coterie.audit.adversaries import Adversary
from coterie.audit.evidence import Evidence
from coterie.audit.experts import noised, plain
from coterie.audit.experts.case import Case, Clock
from coterie.audit.findings import Channel, Finding, Unit

Attack = Callable[[Clock], list[Finding]]
"""Takes the time it may use."""

_SHORTEST_S = 5.0
"""Less is not begun with."""
_FOR_RECORDS_S = 120.0


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
    case.lot(case.rounds()[0] if case.rounds() else 0)
    clock = Clock(budget_s)
    jobs = _plain(case, budget_s) if evidence.privacy is None else _noised(case)
    found: list[Finding] = []
    for number, (name, adversary, unit, weight, job) in enumerate(jobs):
        if number and clock.left < _SHORTEST_S:
            found.append(_not_reached(name, adversary, unit))
            continue
        left = sum(each[3] for each in jobs[number:])
        found += job(clock.share(weight / left))
    return found


_Job = tuple[str, Adversary, Unit, float, Attack]


def _plain(case: Case, budget_s: float) -> list[_Job]:
    recorded = len(case.lot(case.rounds()[0]))
    lots = [recorded, *(lot for lot in plain.LOTS if lot < recorded)]
    jobs: list[_Job] = []
    for adversary in (Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS):
        jobs += [("next token by spans", adversary, Unit.PLACES, 1.0, _next(case, adversary, lot)) for lot in lots]
        sizes = [recorded, *(lot for lot in plain.MEMBER_LOTS if recorded < lot <= len(case.train) // 2)]
        jobs += [("membership in a push", adversary, Unit.AUC, 1.0, _member(case, adversary, lot)) for lot in sizes]
        jobs.append(("bag of tokens", adversary, Unit.BAG, 1.0, _bag(case, adversary)))
    if recorded > 1:
        known = Adversary.HOST_DOMAIN
        jobs.append(("next token by spans", known, Unit.PLACES, 1.0, _next(case, known, recorded, recorded // 2)))
    if case.evidence.trunk == "private" and len(case.rounds()) > 1:
        late = case.rounds()[-1]
        jobs += [
            ("next token by spans", each, Unit.PLACES, 1.0, _next(case, each, recorded, round_index=late))
            for each in (Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS)
        ]
    searched = [lot for lot in plain.LOTS if lot <= recorded]
    if budget_s >= _FOR_RECORDS_S:
        jobs += [
            ("whole records by search", Adversary.ALL_HOSTS, Unit.TOKENS, 3.0, _search(case, lot)) for lot in searched
        ]
    return jobs


def _noised(case: Case) -> list[_Job]:
    jobs: list[_Job] = []
    for adversary in (Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS):
        jobs.append(("one token, all others known", adversary, Unit.PLACES, 1.0, _token(case, adversary)))
        jobs.append(("membership over rounds", adversary, Unit.AUC, 2.0, _run(case, adversary)))
    return jobs


def _next(case: Case, adversary: Adversary, lot: int, known: int = 0, round_index: int | None = None) -> Attack:
    return lambda clock: [plain.next_tokens(case, adversary, lot, clock, known=known, round_index=round_index)]


def _member(case: Case, adversary: Adversary, lot: int) -> Attack:
    return lambda clock: plain.membership(case, adversary, lot, clock)


def _bag(case: Case, adversary: Adversary) -> Attack:
    return lambda clock: plain.bag(case, adversary, clock)


def _search(case: Case, lot: int) -> Attack:
    return lambda clock: [plain.whole_records(case, Adversary.ALL_HOSTS, lot, clock)]


def _token(case: Case, adversary: Adversary) -> Attack:
    return lambda clock: [noised.tokens(case, adversary, clock)]


def _run(case: Case, adversary: Adversary) -> Attack:
    return lambda clock: noised.membership(case, adversary, clock)


def _not_reached(name: str, adversary: Adversary, unit: Unit) -> Finding:
    return Finding(
        name=name,
        adversary=adversary,
        channel=Channel.PUSHES,
        unit=unit,
        value=None,
        reason="the time that the audit was given did not reach so far",
        sentence="Not measured.",
    )
