"""The page of an audit: what each adversary could do first, then what was tested, and the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie import pages
from coterie.audit.adversaries import Adversary
from coterie.audit.findings import Channel, Finding, Findings, Outcome, RunKind, Unit, Verdict
from coterie.audit.metrics import Estimate
from coterie.audit.verdicts import READS, best, failed, named, percent
from coterie.pages import Series, Table
from coterie.storage import write_whole

_OUTCOMES = {
    Outcome.ALARM: ("alarm", "alarm: a promise is contradicted"),
    Outcome.OPEN: ("open", "leaks"),
    Outcome.HELD: ("held", "held"),
    Outcome.UNKNOWN: ("unknown", "not concluded"),
}
_CROSSES = {
    Channel.ROWS: "a hidden vector per token and layer",
    Channel.GRADIENTS: "a gradient per hidden vector",
    Channel.IDS: "which experts each token chose",
    Channel.TOKENS: "all of it, put together",
    Channel.PUSHES: "a sum of gradients per expert and round",
    Channel.EMBEDDING: "the same of the embedding",
    Channel.HEAD: "the same of the output head",
    Channel.MODEL: "the weights after training",
    Channel.RELEASES: "clipped and noised sums",
}
_SHARES = (
    Unit.TOKENS,
    Unit.SEEN,
    Unit.COVERAGE,
    Unit.CONTENT,
    Unit.NEXT,
    Unit.PLACES,
    Unit.PAIRS,
    Unit.LOADS,
    Unit.RECORDS,
    Unit.SECRETS,
    Unit.TPR,
)
_OF_PREMISES = (("value", ".5g"), ("expected", ".5g"), ("error", ".2g"))
FOOTER = (
    "Made by `coterie audit`. An attack that finds nothing proves only that this attack finds nothing; what a budget "
    "promises rests on its proof, and the audit looks for contradictions to it. No recovered private text is in this "
    "page. Measurements stand in the JSON beside it."
)


def save_report(findings: Findings, path: Path) -> None:
    """Write the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.resolve(), audit_page(findings).encode())


def audit_page(findings: Findings) -> str:
    """The page as one HTML file."""
    owners = ", ".join(dict.fromkeys(run.owner for run in findings.identification.runs)) or "nothing audited"
    edition = " (edition to pass on)" if findings.left_out else ""
    return pages.page(
        f"coterie audit: {owners}{edition}",
        findings.headline,
        [
            _left_out(findings),
            _alarms(findings),
            _by_adversary(findings),
            _controls(findings),
            _scope(findings),
            pages.section("Channels", pages.table(channel_table(findings))),
            _tokens(findings),
            _experts(findings),
            _membership(findings),
            _epsilon(findings),
            pages.section("What to try next", pages.bullets(findings.next_settings)),
            pages.section("Every attack", *(pages.table(shown) for shown in attack_tables(findings))),
            _identification(findings),
        ],
        footer=FOOTER,
    )


def _left_out(findings: Findings) -> str:
    if not findings.left_out:
        return ""
    return pages.section("Left out of this edition", pages.bullets(findings.left_out))


def _alarms(findings: Findings) -> str:
    raised = dict.fromkeys(v.sentence for v in findings.verdicts if v.outcome is Outcome.ALARM)
    return pages.warning("A promise is contradicted", raised)


def _by_adversary(findings: Findings) -> str:
    parts = []
    for part in RunKind:
        some = [verdict for verdict in findings.verdicts if verdict.part is part]
        if some:
            parts += [f"<h3>{pages.text(named(part, findings.experts_dp))}</h3>", pages.cards(map(_card, some))]
    who = Table(
        "who is meant",
        ("", "adversary"),
        tuple((adversary.label, adversary.sentence) for adversary in Adversary),
    )
    return pages.section("What each adversary could do", *parts, pages.table(who))


def _card(verdict: Verdict) -> str:
    kind, label = _OUTCOMES[verdict.outcome]
    return pages.card(kind, label, f"{verdict.adversary.label}: {_WHO[verdict.adversary]}", verdict.sentence)


_WHO = {
    Adversary.NETWORK: "somebody on the wire",
    Adversary.HOST: "one other party that knows only its experts",
    Adversary.HOST_PUBLIC: "one other party with the public model",
    Adversary.HOST_DOMAIN: "one other party with text of the same kind",
    Adversary.ALL_HOSTS: "all other parties together",
}


def _controls(findings: Findings) -> str:
    measured = findings.controls
    why = failed(measured)
    judged = (
        "The instruments work: they read what nothing defends, and read nothing where there is nothing."
        if measured.passed
        else f"No verdict counts as held: {why}."
    )
    gap = measured.intervals.get("gap")
    if gap is not None:
        judged += (
            f" The negative control less its prior, paired over the same tokens: {100 * gap.value:+.1f} points "
            f"[{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]."
        )
    shown = {
        "positive, undefended vectors of the first layer": measured.intervals.get("positive"),
        "negative, an instrument that can know nothing": measured.intervals.get("negative"),
        "prior of the negative control": measured.intervals.get("prior"),
    }
    return pages.section(
        "Do the instruments work?",
        pages.paragraph(judged),
        pages.figure("tokens read, with 95 % intervals", pages.bars(dict(map(_bar, shown.items())), x="share")),
    )


def _bar(pair: tuple[str, Estimate | None]) -> tuple[str, tuple[float, float, float] | None]:
    name, found = pair
    return name, None if found is None else (found.value, found.low, found.high)


def _scope(findings: Findings) -> str:
    return pages.beside(
        pages.section("What was tested", pages.bullets(findings.tested)),
        pages.section("What was not", pages.bullets(findings.untested)),
    )


def channel_table(findings: Findings) -> Table:
    """Every channel: what crosses, the strongest attack, what it reached, and the prior."""
    rows = []
    for part, some in findings.findings.items():
        for channel in Channel:
            here = [finding for finding in some if finding.channel is channel]
            for adversary in Adversary:
                own = [finding for finding in here if finding.adversary is adversary]
                found = best(own, adversary, [*READS, *(unit for unit in Unit if unit not in READS)])
                if found is None:
                    continue
                cells = (
                    found.name,
                    _shown(found.value, found.unit),
                    _shown(found.prior, found.unit),
                    found.unit.value,
                )
                rows.append(
                    (channel.value, named(part, findings.experts_dp), _CROSSES[channel], adversary.label, *cells)
                )
    title = "the strongest attack on each channel that could be measured; intervals are 95 %"
    columns = ("channel", "of", "what crosses", "adversary", "strongest attack", "reached", "prior", "of what")
    return Table(title, columns, tuple(rows))


def _tokens(findings: Findings) -> str:
    some = findings.findings.get(RunKind.TOKENS, ())
    drawn = []
    for unit, caption in (
        (Unit.SEEN, "tokens read, as a share of those that crossed there"),
        (Unit.NEXT, "next tokens read from gradients, as a share of those that crossed"),
        (Unit.TOKENS, "tokens read, as a share of all"),
        (Unit.COVERAGE, "tokens that crossed there, as a share of all"),
    ):
        rows = _by_layer(some, unit)
        if rows:
            drawn.append(pages.figure(caption, pages.heat_map(rows, column="MoE layer")))
    return pages.section("Layer by attack", pages.beside(*drawn)) if drawn else ""


def _by_layer(some: Iterable[Finding], unit: Unit) -> Mapping[str, Mapping[int, float]]:
    rows: dict[str, dict[int, float]] = {}
    for finding in some:
        if finding.layer is not None and finding.value is not None and finding.unit is unit:
            rows.setdefault(f"{finding.name}, {finding.adversary.label}", {})[finding.layer] = finding.value.value
    return rows


def _experts(findings: Findings) -> str:
    drawn = []
    for part in (RunKind.EXPERTS, RunKind.EXPERTS_DP):
        some = [f for f in findings.findings.get(part, ()) if f.unit is Unit.PLACES and f.value is not None]
        if not some:
            continue
        shown = {f"{f.name}, {f.adversary.label}" + (f", {_records(f.lot)}" if f.lot else ""): f.value for f in some}
        priors = [f.prior.value for f in some if f.prior is not None]
        rules = {"prior": max(priors)} if priors else None
        drawing = pages.bars(dict(map(_bar, shown.items())), x="share of places", rules=rules)
        drawn.append(pages.figure(f"{named(part, findings.experts_dp)}: next tokens ranked first", drawing))
    return pages.section("Reading pushed sums", pages.beside(*drawn)) if drawn else ""


def _records(lot: int) -> str:
    return "1 record in the push" if lot == 1 else f"{lot} records in the push"


def _membership(findings: Findings) -> str:
    drawn = []
    for part, some in findings.findings.items():
        curves = [f for f in some if f.roc]
        if not curves:
            continue
        series = [
            Series(f"{f.name}, {f.adversary.label}" + (f", {_records(f.lot)}" if f.lot else ""), f.roc)
            for f in curves
        ]
        if part is RunKind.EXPERTS_DP and findings.experts_dp.roc_allowed:
            series.append(Series("the most that the claim allows", findings.experts_dp.roc_allowed, faint=True))
        low = max(1e-4, min(point[0] for f in curves for point in f.roc if point[0] > 0))
        series.append(Series("guessing", [(low, low), (1.0, 1.0)], faint=True))
        drawing = pages.lines(
            series, x="false positives", y="true positives", log=True, x_range=(low, 1.0), y_range=(low, 1.0)
        )
        drawn.append(pages.figure(f"{named(part, findings.experts_dp)}: was this record used?", drawing))
    return pages.section("Membership", pages.beside(*drawn)) if drawn else ""


def _epsilon(findings: Findings) -> str:
    private = findings.experts_dp
    shown = {
        "audited lower bound": private.epsilon_lower,
        "largest bound these canaries could give": private.epsilon_ceiling,
        "claimed": private.epsilon_claimed,
    }
    known = [value for value in shown.values() if value is not None]
    if not known:
        return ""
    why = [f"{name.replace('_', ' ')}: {reason}" for name, reason in private.reasons.items() if "epsilon" in name]
    drawing = pages.marks(shown, x="epsilon", high=1.1 * max(known))
    return pages.section(
        "Epsilon from below",
        pages.figure("a bound above the claim would be an alarm", drawing),
        pages.bullets(why),
        *map(pages.table, epsilon_tables(findings)),
        pages.bullets((findings.epsilon or {}).get("sentences", ())),
    )


def epsilon_tables(findings: Findings) -> Sequence[Table]:
    """Premises of the claim, each measured; and what canaries of one run prove."""
    epsilon = findings.epsilon or {}
    premises = tuple(
        (each["name"], *(_told(each, *of) for of in _OF_PREMISES), each["verdict"])
        for each in epsilon.get("premises", ())
    )
    runs = tuple(
        (
            run["score"],
            f"{run['canaries']}",
            f"{run['claimed']:g}",
            _told(run, "auc", ".3f"),
            f"{run['lower']:.2f}, {run['gaussian_lower']:.2f}",
            f"{run['ceiling']:.2f}, {run['gaussian_ceiling']:.2f}",
            run["verdict"],
        )
        for run in epsilon.get("one_run", ())
    )
    return (
        Table(
            "what the accounting takes for granted, measured",
            ("premise", "measured", "expected", "standard error", "verdict"),
            premises,
        ),
        Table(
            "canaries under a small claim of the audit's own; bounds by the (epsilon, delta) law, the Gaussian law",
            ("told apart by", "canaries", "claim", "AUC", "lower bounds", "ceilings", "verdict"),
            runs,
        ),
    )


def _told(of: Mapping[str, Any], name: str, form: str) -> str:
    """A number; a dash where this edition leaves it out."""
    return format(of[name], form) if name in of else "-"


def attack_tables(findings: Findings) -> Sequence[Table]:
    """All findings, a table for each part."""
    found = []
    for part, some in findings.findings.items():
        rows = tuple(
            (
                finding.name,
                finding.adversary.label,
                "-" if finding.layer is None else f"{finding.layer}",
                "-" if finding.lot is None else f"{finding.lot}",
                _shown(finding.value, finding.unit) if finding.value is not None else finding.reason,
                _shown(finding.prior, finding.unit),
                "-" if finding.allowed is None else f"{finding.allowed:.3f}",
                "-" if finding.value is None else f"{finding.value.count}",
                finding.unit.value,
            )
            for finding in some
        )
        columns = ("attack", "adversary", "layer", "lot", "reached", "prior", "allowed", "count", "of what")
        found.append(Table(named(part, findings.experts_dp), columns, rows))
    return found


def _shown(found: Estimate | None, unit: Unit) -> str:
    """With its interval; shares as percentages."""
    if found is None:
        return "-"
    if unit in _SHARES:
        return f"{percent(found.value)} ({100 * found.low:.1f} to {100 * found.high:.1f})"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _identification(findings: Findings) -> str:
    known = findings.identification
    versions = ", ".join(f"{name} {version}" for name, version in known.packages.items())
    tool = {
        "coterie": known.version + (f", commit {known.commit}" if known.commit else ""),
        "with": versions,
        "seed": f"{known.seed}",
        "compute": f"{known.seconds:.0f} s, {known.cpu_s:.0f} s of processor time, {known.machine}",
        "of them": ", ".join(f"{piece} {seconds:.0f} s" for piece, seconds in known.pieces.items()) or "-",
        "made": known.at,
    }
    parts = [pages.pairs(tool)]
    for run in known.runs:
        claimed = "none" if run.claimed is None else f"epsilon {run.claimed[0]:.4g}, delta {run.claimed[1]:g}"
        parts += [
            f"<h3>{pages.text(named(run.part, findings.experts_dp))}</h3>",
            pages.pairs(
                {
                    "owner under attack": run.owner,
                    "parties": ", ".join(run.parties),
                    "agreement": run.config_hash,
                    "model": run.model,
                    "public start": run.start,
                    "rounds": f"{run.rounds}, {run.recorded} recorded",
                    "claimed": claimed,
                }
            ),
        ]
    return pages.section("What was audited, with what", *parts)
