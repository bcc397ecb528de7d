"""The short audit that ends a demo: attacks on what the other parties of its own federations really received."""

from __future__ import annotations

from pathlib import Path

from coterie.audit.findings import Findings
from coterie.audit.report.findings_page import save_report
from coterie.audit.run import Asked, audit
from coterie.demonstration.corpus import PUBLIC
from coterie.demonstration.folder import Folder
from coterie.demonstration.plan import DemoPlan
from coterie.demonstration.screen import Screen


def audited(plan: DemoPlan, root: Path, screen: Screen, page: Path) -> Findings | None:
    """Attack the first party's text in every federation of the demo, and write the page; None without a federation.

    Trained models are left out: who is in their text was not decided by coins, so that they would tell nothing. So
    are masked federations, for time alone: `coterie audit` attacks what they recorded, as the demo's folder says.
    """
    folder = Folder(root, plan)
    owner, *others = plan.parties
    asked = [
        Asked(
            run=folder.run_dir(arm, owner),
            received=tuple(folder.run_dir(arm, party) for party in others),
            public=(root / "data" / PUBLIC / "train.jsonl",),
            start=root / PUBLIC / "run" / "model",
            model=False,
            canaries=plan.canaries,
        )
        for arm in plan.of_kind("federation")
        if not arm.shared_noise
    ]
    if not asked:
        return None
    findings = audit(asked, seed=plan.seed, budget_s=plan.audit_s, progress=screen.progress)
    save_report(findings, page)
    known = findings.identification
    screen.line(f"attacked what others received of {owner} in {known.seconds:.0f} s: {findings.outcome.value}")
    return findings
