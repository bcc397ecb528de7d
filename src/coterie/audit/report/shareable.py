"""The edition of an audit to pass on: without any figure that was measured over the owner's text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.audit.figures import NOT_AUDITED
from coterie.audit.findings import (
    Controls,
    ExpertsFigures,
    Finding,
    Findings,
    Outcome,
    Over,
    PrivateFigures,
    TokensFigures,
    Verdict,
)
from coterie.audit.verdicts import LABELS, headline

_WITHHELD = "left out: measured over the owner's own text"
_UNMEASURED = "not measured; the owner's edition says why"
_PUBLIC = "Measured over public text, planted or simulated."
_MORE = "The owner's edition says why, and what else was not."
_BOUNDS = (
    "epsilon_claimed",
    "delta",
    "epsilon_lower",
    "epsilon_ceiling",
    "auc_allowed",
    "tpr_allowed",
    "auc_by_claim",
    "verdict",
)
_RUN_BOUNDS = (
    "canaries",
    "claimed",
    "delta",
    "score",
    "lower",
    "ceiling",
    "gaussian_lower",
    "gaussian_ceiling",
    "alarm_lower",
    "verdict",
)
_LEFT_OUT = (
    "Every rate, interval and curve over the owner's records: how much text an attack read, a language model's guess "
    "at it, membership. Each is an un-noised fact about private text.",
    "The sentences of the verdicts, which quote those rates. Their outcomes stand; each is one yes or no about the "
    "same text.",
    "The owner's numbers of records and tokens that such rates rest on, sizes of lots, and what the premises of "
    "epsilon were measured to be: only bounds, ceilings, the claim and outcomes stand here.",
    "Why something was not measured; reasons quote numbers of records.",
)
_SENTENCES = {
    Outcome.ALARM: "Something that was promised is contradicted. The owner's edition says what.",
    Outcome.OPEN: "Text can be read, as the documents of this exchange say.",
    Outcome.HELD: "The attacks tested here found nothing beyond a language model's guess.",
    Outcome.UNKNOWN: "Nothing can be concluded. The owner's edition says why.",
}


def shareable(findings: Findings) -> Findings:
    """The same audit without figures over members; it says what it leaves out.

    Sentences and reasons are written anew from names: what stood there may quote anything. Of an edition that leaves
    things out already nothing more is taken.
    """
    from coterie.audit.run import next_settings

    if findings.left_out:
        return findings
    kept = {part: tuple(map(_withheld, some)) for part, some in findings.findings.items()}
    private = PrivateFigures.model_validate(_without(findings.experts_dp, ("recovery", "prior", "advantage", "auc")))
    measured = Controls.model_validate(
        findings.controls.model_dump() | {"reasons": dict.fromkeys(findings.controls.reasons, _UNMEASURED)}
    )
    verdicts = tuple(
        Verdict(part=v.part, adversary=v.adversary, outcome=v.outcome, sentence=_SENTENCES[v.outcome])
        for v in findings.verdicts
    )
    return findings.model_copy(
        update={
            "headline": headline(verdicts, kept, private),
            "tokens": TokensFigures.model_validate(_without(findings.tokens, ("recovery", "prior")) | {"layers": {}}),
            "experts": ExpertsFigures.model_validate(
                _without(findings.experts, ("recovery", "prior", "auc")) | {"lots": {}, "simulated": ()}
            ),
            "experts_dp": private,
            "epsilon": _bounds(findings.epsilon),
            "controls": measured,
            "verdicts": verdicts,
            "findings": kept,
            "tested": _tested(findings),
            "untested": _untested(findings),
            "next_settings": tuple(next_settings(verdicts, private, measured, kept)),
            "left_out": _LEFT_OUT,
        }
    )


def _without(figures: TokensFigures | ExpertsFigures | PrivateFigures, names: tuple[str, ...]) -> dict[str, object]:
    values = figures.model_dump() | dict.fromkeys(names, None)
    missing = {name: _WITHHELD if name in names else _UNMEASURED for name in (*figures.reasons, *names)}
    missing |= {name: reason for name, reason in figures.reasons.items() if reason == NOT_AUDITED}
    return values | {"reasons": missing, "intervals": {}}


def _withheld(finding: Finding) -> Finding:
    if finding.value is not None and finding.over is Over.PUBLIC:
        return finding.model_copy(update={"sentence": _PUBLIC})
    reason = _UNMEASURED if finding.value is None else _WITHHELD
    nothing = {"value": None, "prior": None, "gain": None, "roc": (), "lot": None}
    return finding.model_copy(update=nothing | {"sentence": reason, "reason": reason})


def _bounds(epsilon: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The claim, bounds, ceilings and outcomes. What was measured of lots and records on the way tells of them."""
    if epsilon is None:
        return None
    return {
        **{name: epsilon[name] for name in _BOUNDS if name in epsilon},
        "premises": [{name: each[name] for name in ("name", "verdict")} for each in epsilon["premises"]],
        "one_run": [{name: each[name] for name in _RUN_BOUNDS if name in each} for each in epsilon["one_run"]],
    }


def _tested(findings: Findings) -> tuple[str, ...]:
    some = [
        f"{LABELS[part]}: {each.name}, on {each.channel.value}"
        for part, each in findings.every()
        if each.value is not None
    ]
    premises = [f"premise: {each['name']}" for each in (findings.epsilon or {}).get("premises", ())]
    return tuple(dict.fromkeys([*some, *premises]))


def _untested(findings: Findings) -> tuple[str, ...]:
    from coterie.audit.run import ALWAYS_UNTESTED, played_instead

    some = [f"{LABELS[part]}: {each.name}." for part, each in findings.every() if each.value is None]
    always = [sentence for sentence in findings.untested if sentence in ALWAYS_UNTESTED]
    more = [_MORE] if len(findings.untested) > len(always) else []
    return tuple(dict.fromkeys([*some, *more, *played_instead(findings.findings), *always]))
