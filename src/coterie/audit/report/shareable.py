"""The edition of an audit to pass on: without any figure that was measured over the owner's text."""

from __future__ import annotations

from coterie.audit.findings import (
    ExpertsFigures,
    Finding,
    Findings,
    Outcome,
    Over,
    PrivateFigures,
    TokensFigures,
    Verdict,
)

_WITHHELD = "left out: measured over the owner's own text"
_LEFT_OUT = (
    "Every rate, interval and curve over the owner's records: how much text an attack read, a language model's guess "
    "at it, membership. Each is an un-noised fact about private text.",
    "The sentences of the verdicts, which quote those rates. Their outcomes stand; each is one yes or no about the "
    "same text.",
    "The owner's numbers of records and tokens that such rates rest on.",
)
_SENTENCES = {
    Outcome.ALARM: "Something that was promised is contradicted. The owner's edition says what.",
    Outcome.OPEN: "Text can be read, as the documents of this exchange say.",
    Outcome.HELD: "The attacks tested here found nothing beyond a language model's guess.",
    Outcome.UNKNOWN: "Nothing can be concluded. The owner's edition says why.",
}


def shareable(findings: Findings) -> Findings:
    """The same audit without figures over members; it says what it leaves out."""
    from coterie.audit.verdicts import headline

    kept = {part: tuple(map(_withheld, some)) for part, some in findings.findings.items()}
    private = PrivateFigures.model_validate(_without(findings.experts_dp, ("recovery", "prior", "advantage", "auc")))
    verdicts = tuple(
        Verdict(part=v.part, adversary=v.adversary, outcome=v.outcome, sentence=_SENTENCES[v.outcome])
        for v in findings.verdicts
    )
    return findings.model_copy(
        update={
            "headline": headline(verdicts, kept, private),
            "tokens": TokensFigures.model_validate(_without(findings.tokens, ("recovery", "prior")) | {"layers": {}}),
            "experts": ExpertsFigures.model_validate(
                _without(findings.experts, ("recovery", "prior", "auc")) | {"lots": {}}
            ),
            "experts_dp": private,
            "verdicts": verdicts,
            "findings": kept,
            "left_out": _LEFT_OUT,
        }
    )


def _without(figures: TokensFigures | ExpertsFigures | PrivateFigures, names: tuple[str, ...]) -> dict[str, object]:
    values = figures.model_dump()
    values["reasons"] = {**values["reasons"], **{n: values["reasons"].get(n, _WITHHELD) for n in names}}
    values["intervals"] = {n: found for n, found in values["intervals"].items() if n not in names}
    return values | dict.fromkeys(names, None)


def _withheld(finding: Finding) -> Finding:
    if finding.over is not Over.MEMBERS:
        return finding
    reason = finding.reason or _WITHHELD
    nothing = {"value": None, "prior": None, "gain": None, "roc": (), "sentence": reason, "reason": reason}
    return finding.model_copy(update=nothing)
