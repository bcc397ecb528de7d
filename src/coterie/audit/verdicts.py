"""What the figures of an audit amount to: per adversary in words, and for the whole.

Nothing counts as held unless the instruments work: the positive control reads at least `POSITIVE` of the tokens of
undefended hidden vectors by the lower end of its interval, a prior was measured, and the negative control, an
instrument that can know nothing, stays within `NEAR` of its prior with the whole interval of the paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from scipy import stats

from coterie.audit.adversaries import DEFAULT, Adversary
from coterie.audit.epsilon.findings import CONFIDENCE as SURE
from coterie.audit.findings import (
    NO_COINS,
    Controls,
    Finding,
    Outcome,
    PrivateFigures,
    RunKind,
    Unit,
    Verdict,
)
from coterie.audit.metrics import CONFIDENCE, Estimate

POSITIVE = 0.95
NEAR = 0.02
"""Two points: as near to a prior as "no better than it" has to be."""

_WEAKER = {
    Adversary.NETWORK: (Adversary.NETWORK,),
    Adversary.HOST: (Adversary.NETWORK, Adversary.HOST),
    Adversary.HOST_PUBLIC: (Adversary.NETWORK, Adversary.HOST, Adversary.HOST_PUBLIC),
    Adversary.HOST_DOMAIN: (Adversary.NETWORK, Adversary.HOST, Adversary.HOST_PUBLIC, Adversary.HOST_DOMAIN),
    Adversary.ALL_HOSTS: (Adversary.NETWORK, Adversary.HOST, Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS),
}
"""Whose attacks each can play, too."""
_CONTROLS = {
    "positive": "the positive control",
    "negative": "the negative control",
    "prior": "the prior",
    "gap": "the negative control less its prior",
}
_NOISE_OFF = 0.02
"""How far below the claim a measured share of the noise may be: the estimate's own error is far less."""
READS = (Unit.TOKENS, Unit.PLACES, Unit.NEXT, Unit.SEEN, Unit.RECORDS, Unit.SECRETS)
"""Units that say text was read, the one that says most first."""


def controls(
    positive: Estimate | None,
    negative: Estimate | None,
    prior: Estimate | None,
    gap: Estimate | None,
    reasons: dict[str, str],
) -> Controls:
    """Join the controls and judge them.

    Args:
        positive: share of tokens read where nothing defends them.
        negative: share of tokens that an instrument reads which can know nothing of them.
        prior: share of the same tokens that is guessed without an instrument.
        gap: ``negative`` less ``prior``, paired over those tokens.
        reasons: why one is missing, by its name.
    """
    values = {"positive": positive, "negative": negative, "prior": prior, "gap": gap}
    passed = (
        positive is not None
        and negative is not None
        and prior is not None
        and gap is not None
        and positive.low >= POSITIVE
        and _farthest(gap) <= NEAR
    )
    return Controls(
        **{name: None if found is None else found.value for name, found in values.items()},
        intervals={name: found for name, found in values.items() if found is not None},
        reasons={name: reasons.get(name, "it was not measured") for name, found in values.items() if found is None},
        passed=passed,
    )


def _farthest(gap: Estimate) -> float:
    """How far from its prior the negative control may be, by the interval."""
    return max(-gap.low, gap.high)


def failed(measured: Controls) -> str:
    """Why the controls let nothing count as held, in one sentence; empty when they do."""
    if measured.passed:
        return ""
    missing: dict[str, list[str]] = {}
    for name, reason in measured.reasons.items():
        missing.setdefault(reason, []).append(_CONTROLS[name])
    why = [f"{', '.join(names)}: {reason}" for reason, names in missing.items()]
    positive = measured.intervals.get("positive")
    if positive is not None and positive.low < POSITIVE:
        why.append(
            f"the positive control read {percent(positive.value)} of tokens, by its interval as few as "
            f"{percent(positive.low)} instead of {percent(POSITIVE)}"
        )
    gap = measured.intervals.get("gap")
    if gap is not None and _farthest(gap) > NEAR:
        why.append(
            f"the negative control is {100 * abs(gap.value):.1f} points from the prior, by its interval as many as "
            f"{100 * _farthest(gap):.1f}, not within {100 * NEAR:.0f}"
        )
    return "; ".join(why)


def able(finding: Finding, adversary: Adversary) -> bool:
    """Whether an adversary can play the attack of a finding."""
    return finding.adversary in _WEAKER[adversary]


def best(findings: Iterable[Finding], adversary: Adversary, units: Sequence[Unit]) -> Finding | None:
    """The strongest attack that an adversary can play, by the first of these units that was measured."""
    possible = [finding for finding in findings if able(finding, adversary) and finding.value is not None]
    for unit in units:
        counted = [finding for finding in possible if finding.unit is unit]
        if counted:
            return max(counted, key=_value)
    return None


_NOTHING_READ = "No attack read more than the language model's guess"
_A_LITTLE = "Some attack read a little more than the language model's guess"
_AS_CLAIMED = "whether a known record was used is told no better than claimed"


def _value(finding: Finding) -> float:
    assert finding.value is not None
    return finding.value.value


def verdicts(
    part: RunKind,
    findings: Sequence[Finding],
    measured: Controls,
    private: PrivateFigures,
    notes: Sequence[str] = (),
    *,
    premises: bool = False,
    unpromised: Mapping[Adversary, str] = {},
) -> list[Verdict]:
    """One verdict per adversary that was played.

    Args:
        part: what was audited.
        findings: all of this part.
        measured: the controls.
        private: figures of the part under a budget; used where there is one.
        notes: alarms that no finding carries, in sentences; they count against every adversary.
        premises: of the claimed epsilon were measured, and its audit concluded; else no claim is said to stand.
        unpromised: adversaries whom the claim does not cover, with what it covers in a sentence.
    """
    played = [adversary for adversary in Adversary if any(f.adversary is adversary for f in findings)]
    claimed = part is RunKind.EXPERTS_DP or (part is RunKind.ALONE and private.epsilon_claimed is not None)
    found = []
    for adversary in played:
        if claimed:
            beyond = unpromised.get(adversary, "")
            outcome, sentence = _under_a_claim(
                findings, adversary, measured, private, notes, premises=premises, beyond=beyond
            )
        else:
            outcome, sentence = _without_a_claim(findings, adversary, measured, notes)
        found.append(Verdict(part=part, adversary=adversary, outcome=outcome, sentence=sentence))
    return found


def _without_a_claim(
    findings: Sequence[Finding], adversary: Adversary, measured: Controls, notes: Sequence[str]
) -> tuple[Outcome, str]:
    """Where nothing was promised, reading is no alarm; not reading counts only when the instruments work."""
    if notes:
        return Outcome.ALARM, " ".join(notes)
    read = [f for f in _readings(findings, adversary) if _above_prior(f)]
    if read:
        return Outcome.OPEN, _foremost(read, adversary).sentence
    told = _told_apart(findings, adversary)
    if told is not None:
        return Outcome.OPEN, f"Whether a known record was used can be told: {told.sentence}"
    if not _played(findings, adversary):
        return Outcome.UNKNOWN, _unmeasured(findings, adversary)
    why = failed(measured)
    if why:
        return Outcome.UNKNOWN, f"Nothing was read, but the instruments were not shown to work: {why}."
    return (
        Outcome.UNKNOWN,
        "No attack here was shown to read more than a language model guesses; nothing promises that none can.",
    )


def _under_a_claim(
    findings: Sequence[Finding],
    adversary: Adversary,
    measured: Controls,
    private: PrivateFigures,
    notes: Sequence[str],
    *,
    premises: bool,
    beyond: str,
) -> tuple[Outcome, str]:
    alarms = [*notes, *_less_noise(findings, adversary), *_membership_beyond(findings, adversary)]
    read = list(_read_beyond(findings, adversary))
    if alarms or (read and not beyond):
        return Outcome.ALARM, " ".join([*alarms, *read])
    if read:
        return Outcome.OPEN, " ".join([*read, beyond])
    readings = list(_readings(findings, adversary))
    others_alone = bool(readings) and _left_out(findings, adversary, READS)
    if others_alone or not _played(findings, adversary):
        return Outcome.UNKNOWN, _unmeasured(findings, adversary)
    why = failed(measured)
    if why:
        return Outcome.UNKNOWN, f"Nothing contradicts the claim, but the instruments were not shown to work: {why}."
    if not readings:
        return _membership_alone(findings, adversary)
    widest = max(_gain_at_most(f) for f in readings)
    if widest > NEAR:
        places = min(f.value.count for f in readings if f.value is not None)
        words = (
            f"{_A_LITTLE if any(map(_above_prior, readings)) else _NOTHING_READ}; {places} places carry only "
            f'"within {100 * widest:.0f} points of it", not "within {100 * NEAR:.0f}".'
        )
        promised = _shown(findings, adversary)
        if _within(promised):
            words += f" Whether a known record was used is told no better than claimed: {_widest(promised).sentence}"
        return Outcome.UNKNOWN, f"{words} {beyond}".rstrip()
    words = f"Every attack stays within {100 * NEAR:.0f} points of the language model's guess."
    if beyond:
        return Outcome.UNKNOWN, f"{words} {beyond}"
    return Outcome.HELD, words + _standing(findings, adversary, private, premises=premises)


def _standing(findings: Sequence[Finding], adversary: Adversary, private: PrivateFigures, *, premises: bool) -> str:
    """Whether the claim stands: only when all that it rests on was measured."""
    if private.epsilon_claimed is None:
        return ""
    why = []
    if not premises:
        why.append("the audit of epsilon was not made or concluded nothing")
    if not _within(_shown(findings, adversary)):
        why.append("membership was not shown to stay within what the claim allows")
    if why:
        return f" That is no verdict on epsilon {private.epsilon_claimed:g}: {'; '.join(why)}."
    return f" The claim of epsilon {private.epsilon_claimed:g} stands."


def _membership_alone(findings: Sequence[Finding], adversary: Adversary) -> tuple[Outcome, str]:
    """Where no attack on text was made. Held needs whole intervals within what is allowed."""
    promised = _shown(findings, adversary)
    if not promised:
        return Outcome.UNKNOWN, _unmeasured(findings, adversary)
    widest = _widest(promised)
    allowed = f"the claim allows an AUC of {widest.allowed:.2f}"
    if _within(promised):
        words = f"Whether a known record was used is told no better than claimed; {allowed}: {widest.sentence}"
        return Outcome.HELD, words
    return Outcome.UNKNOWN, f"Too few records carry a verdict on membership; {allowed}: {widest.sentence}"


def _read_beyond(findings: Sequence[Finding], adversary: Adversary) -> Iterator[str]:
    for finding in _readings(findings, adversary):
        if finding.value is not None and finding.prior is not None and finding.value.low > finding.prior.high + NEAR:
            yield f"Text was read from noised sums: {finding.sentence}"


def _less_noise(findings: Sequence[Finding], adversary: Adversary) -> Iterator[str]:
    """Recorded sums with less noise than was claimed, by more than the estimate could be off."""
    for finding in findings:
        value = finding.value if finding.unit is Unit.NOISE and able(finding, adversary) else None
        if value is not None and value.high < 1 - _NOISE_OFF:
            yield f"Less noise than claimed: {finding.sentence}"


def _membership_beyond(findings: Sequence[Finding], adversary: Adversary) -> Iterator[str]:
    looks = sum(finding.value is not None for finding in findings if finding.allowed is not None)
    for finding in _promised(findings, adversary):
        value, allowed = finding.value, finding.allowed
        if value is not None and allowed is not None and _exceeds(value, allowed, (1 - SURE) / looks):
            yield f"Membership is told better than the claim allows (AUC {allowed:.2f}): {finding.sentence}"


# ---- membership ----


def _promised(findings: Sequence[Finding], adversary: Adversary) -> list[Finding]:
    """Measured tests of single records, each with what the claim allows it."""
    return [f for f in findings if f.allowed is not None and f.value is not None and able(f, adversary)]


def _shown(findings: Sequence[Finding], adversary: Adversary) -> list[Finding]:
    """Those of them that may speak for a claim: none where the adversary's own were not made."""
    return [] if _left_out(findings, adversary, (Unit.AUC,)) else _promised(findings, adversary)


def _reach(finding: Finding) -> float:
    """How far above the allowed AUC the measured one may be, by its interval."""
    assert finding.value is not None
    assert finding.allowed is not None
    return finding.value.high - finding.allowed


def _widest(promised: Sequence[Finding]) -> Finding:
    """The test whose interval reaches furthest towards what is allowed, or beyond."""
    return max(promised, key=_reach)


def _within(promised: Sequence[Finding]) -> bool:
    return bool(promised) and all(_reach(finding) <= 0 for finding in promised)


def _told_apart(findings: Sequence[Finding], adversary: Adversary) -> Finding | None:
    """The largest AUC above one half, with the error of a 95 % interval over all AUCs together."""
    measured = [f for f in findings if f.unit is Unit.AUC and f.value is not None and able(f, adversary)]
    error = (1 - CONFIDENCE) / 2 / max(1, len(measured))
    told = [f for f in measured if f.value is not None and _exceeds(f.value, 0.5, error)]
    return max(told, key=_value, default=None)


def _exceeds(value: Estimate, most: float, error: float) -> bool:
    """Whether an AUC of at most ``most`` is this large with less than this probability.

    The standard error at ``most`` is the one behind the 95 % interval, scaled as Hanley and McNeil's depends on the
    AUC: larger towards one half. The 95 % interval itself must lie above, too.
    """
    if value.low <= most or value.low >= 1.0:
        return value.low > most
    deviation = (value.value - value.low) / float(stats.norm.isf((1 - CONFIDENCE) / 2))
    scaled = deviation * math.sqrt(_spread(most) / _spread(value.low)) if 0 < most < 1 else deviation
    return value.value - most > float(stats.norm.isf(error)) * scaled


def _spread(auc: float) -> float:
    """The variance of a measured AUC, up to the number of scores."""
    return auc * (1 - auc) * ((1 - auc) / (2 - auc) + auc / (1 + auc))


def _readings(findings: Sequence[Finding], adversary: Adversary) -> Iterator[Finding]:
    """Attacks on text that were measured beside their prior."""
    return (
        f for f in findings if f.unit in READS and able(f, adversary) and f.value is not None and f.prior is not None
    )


def _above_prior(finding: Finding) -> bool:
    assert finding.value is not None
    assert finding.prior is not None
    if finding.gain is not None:  # the same places, paired
        return finding.gain.low > 0
    return finding.value.low > finding.prior.high


def _gain_at_most(finding: Finding) -> float:
    """How much better than its prior an attack may be, by its interval."""
    assert finding.value is not None
    assert finding.prior is not None
    gain = finding.gain
    return gain.high if gain is not None else finding.value.high - finding.prior.value


def _foremost(read: Sequence[Finding], adversary: Adversary) -> Finding:
    """What stands for several attacks: those on sums that the run made, before simulated ones; the adversary's own
    before those that it can play, too; the largest sum; then the most that was read."""
    return min(
        read,
        key=lambda f: (f.simulated, f.adversary is not adversary, -(f.lot or 0), READS.index(f.unit), -_value(f)),
    )


def _played(findings: Sequence[Finding], adversary: Adversary) -> bool:
    """Whether any attack that the adversary can play was measured."""
    return any(able(finding, adversary) and finding.value is not None for finding in findings)


def _left_out(findings: Sequence[Finding], adversary: Adversary, units: Sequence[Unit]) -> bool:
    """Whether the adversary has attacks of its own that count in these units, and none of them was made. Then what
    weaker ones found may contradict a claim and cannot speak for it."""
    own = [f for f in findings if f.adversary is adversary and f.unit in units and not f.reason.startswith(NO_COINS)]
    return bool(own) and all(finding.value is None for finding in own)


def _unmeasured(findings: Sequence[Finding], adversary: Adversary) -> str:
    """The adversary's own reasons; where it has none, those of the attacks that it can play, too."""
    possible = [f for f in findings if able(f, adversary) and f.reason]
    reasons = dict.fromkeys(f.reason for f in [f for f in possible if f.adversary is adversary] or possible)
    why = "; ".join(reasons) or "no attack of this adversary measured what is promised"
    return f"Nothing can be concluded: {why}."


def overall(some: Sequence[Verdict]) -> Outcome:
    """An alarm wins; then, anything that was concluded; an audit without either is inconclusive."""
    outcomes = [verdict.outcome for verdict in some]
    for outcome in (Outcome.ALARM, Outcome.OPEN, Outcome.HELD):
        if outcome in outcomes:
            return outcome
    return Outcome.UNKNOWN


def percent(share: float) -> str:
    """For example ``97.1 %``."""
    return f"{100 * share:.1f} %"


LABELS = {
    RunKind.TOKENS: "`tokens`",
    RunKind.EXPERTS: "`experts` without a budget",
    RunKind.EXPERTS_DP: "`experts` with a budget",
    RunKind.ALONE: "training alone",
}
_SHORT = {
    Outcome.ALARM: "ALARM: something promised is contradicted.",
    Outcome.OPEN: "text can be read.",
    Outcome.HELD: "nothing was read beyond a language model's guess.",
    Outcome.UNKNOWN: "nothing can be concluded.",
}
_READ = {
    Unit.TOKENS: "reads {} of all tokens",
    Unit.PLACES: "ranks {} of next tokens first",
    Unit.NEXT: "reads {} of next tokens",
    Unit.SEEN: "reads {} of the tokens it sees",
    Unit.RECORDS: "reads {} of records whole",
    Unit.SECRETS: "reads {} of secrets whole",
}


def named(part: RunKind, private: PrivateFigures) -> str:
    """A part in words, with its claim."""
    if part is RunKind.EXPERTS_DP and private.epsilon_claimed is not None:
        return f"`experts` within epsilon {private.epsilon_claimed:.3g}"
    return LABELS[part]


def headline(
    some: Sequence[Verdict], findings: Mapping[RunKind, Sequence[Finding]], private: PrivateFigures
) -> tuple[str, ...]:
    """The audit in one sentence for each part: the worst that an adversary did."""
    told = []
    for part in RunKind:
        outcomes = [verdict.outcome for verdict in some if verdict.part is part]
        if outcomes:
            worst = min(outcomes, key=list(Outcome).index)
            some_found = findings.get(part, ())
            read = _read_at_most(some_found) if worst is Outcome.OPEN else ""
            if worst is Outcome.HELD and not any(list(_readings(some_found, adversary)) for adversary in Adversary):
                read = f"{_AS_CLAIMED}."
            if all(verdict.sentence.startswith(_NOTHING_READ) for verdict in some if verdict.part is part):
                read = _on_few_places(some_found)
            words = f"{named(part, private)}: {read or _SHORT[worst]}"
            if worst is Outcome.HELD:
                words += _beyond([verdict for verdict in some if verdict.part is part])
            told.append(words[0].upper() + words[1:])
    return tuple(told) or ("Nothing was audited.",)


def _beyond(some: Sequence[Verdict]) -> str:
    """Who is stronger than everybody that a claim was held against, and was not judged."""
    order = list(Adversary)
    strongest = max(order.index(verdict.adversary) for verdict in some if verdict.outcome is Outcome.HELD)
    beyond = [v for v in some if v.outcome is Outcome.UNKNOWN and order.index(v.adversary) > strongest]
    who = " and ".join(verdict.adversary.label for verdict in beyond)
    return f" Of {who} nothing can be concluded." if who else ""


def _on_few_places(findings: Sequence[Finding]) -> str:
    """What too few places show: nothing was read, and what records told beside it."""
    promised = [finding for adversary in Adversary for finding in _promised(findings, adversary)]
    more = f"; {_AS_CLAIMED}" if _within(promised) else ""
    return f"no attack read more than a language model guesses, on too few places for a verdict{more}."


def _read_at_most(findings: Sequence[Finding]) -> str:
    read = [finding for finding in findings if _above(finding)]
    for adversary, who in ((DEFAULT, "one other party"), (Adversary.ALL_HOSTS, "the coalition of all others")):
        possible = [finding for finding in read if finding.unit in READS and able(finding, adversary)]
        if possible:
            found = _foremost(possible, adversary)
            return f"{who} {_READ[found.unit].format(percent(_value(found)))}{_of_what(found)}."
    told = any(finding.unit is Unit.AUC and finding.value is not None for finding in findings)
    return "whether a known record was used can be told." if told else ""


def _of_what(finding: Finding) -> str:
    """Of sums: how many records were in it."""
    if finding.lot is None:
        return ""
    made = "a simulated" if finding.simulated else "the"
    return f" in {made} sum of {finding.lot} record{'' if finding.lot == 1 else 's'}"


def _above(finding: Finding) -> bool:
    return finding.value is not None and finding.prior is not None and _above_prior(finding)
