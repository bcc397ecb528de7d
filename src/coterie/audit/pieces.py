"""The pieces of an audit, each with its reason where it cannot be made. `coterie.audit.run` puts them in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.audit.adversaries import DEFAULT, Adversary
from coterie.audit.evidence import Evidence
from coterie.audit.findings import Channel, Controls, Finding, RunKind, Unit, carried
from coterie.audit.verdicts import controls
from coterie.config import ModelSpec
from coterie.errors import CoterieError
from coterie.models.zoo.build import build_model

CANARIES = 200
"""As many as have power at the small claim of the audit's own."""


def on_exchange(evidence: Evidence, part: RunKind, seed: int, budget_s: float) -> list[Finding]:
    """Attacks on what other parties received."""
    from coterie.audit.experts.attack import attack as on_experts
    from coterie.audit.tokens.attack import attack as on_tokens

    name = f"attacks on `{evidence.exchange}`"
    if evidence.masked and not evidence.received:
        return [nothing(name, part, _under_masks(evidence))]
    if not evidence.received:
        return [nothing(name, part, "no transcript was given: name the other parties' run folders with --received")]
    if evidence.answers is None:
        return [nothing(name, part, "the owner kept no key to score with")]
    try:
        attack = on_tokens if part is RunKind.TOKENS else on_experts
        return [carried(found) for found in attack(evidence, seed=seed, budget_s=budget_s)]
    except CoterieError as error:
        return [nothing(name, part, error.message)]


def _under_masks(evidence: Evidence) -> str:
    """What each adversary holds where pushes were masked and no transcript was given."""
    left = "exact" if evidence.privacy is None else "noised"
    one = ", ".join(each.label for each in (Adversary.HOST, Adversary.HOST_PUBLIC, Adversary.HOST_DOMAIN))
    return (
        "no transcript was given: name the other parties' run folders with --received. Pushes were masked: one "
        f"other party ({one}) holds the sums of all parties on what it hosts, and can subtract its own; all "
        f"others together ({Adversary.ALL_HOSTS.label}) subtract all of theirs and are left with this party's "
        f"sums, {left}. Neither was attacked"
    )


def on_model(
    run: Path,
    seed: int,
    budget_s: float,
    *,
    whole: Path | None = None,
    parties: Sequence[Path] = (),
    references: Sequence[Path] = (),
    public: Sequence[Path] = (),
) -> list[Finding] | str:
    """Attacks on the trained model, or why there are none. What is named is as in `Target.of_run`."""
    from coterie.audit.model.attacking import attack
    from coterie.audit.model.target import Target

    try:
        target = Target.of_run(run, model=whole, parties=parties, references=references, public=public)
        return [carried(found) for found in attack(target, seed=seed, budget_s=budget_s)]
    except CoterieError as error:
        return error.message


def on_epsilon(
    run: Path, start: Path | None, seed: int, budget_s: float, canaries: int = CANARIES
) -> dict[str, Any] | str:
    """Epsilon from below, as `coterie.audit.findings.Findings` keeps it, or why it was not measured."""
    from coterie.audit.epsilon.run import audit_epsilon
    from coterie.audit.epsilon.subject import Subject

    try:
        subject = Subject.of_run(run, start)
        return dataclasses.asdict(audit_epsilon(subject, seed=seed, budget_s=budget_s, canaries=canaries))
    except CoterieError as error:
        return error.message


def instruments(evidence: Evidence | None, seed: int) -> Controls:
    """The controls, on public text through the public starting checkpoint."""
    from coterie.audit.tokens.controls import negative_control, positive_control

    if evidence is None:
        return _untried("only runs of a federation have undefended hidden vectors to try the instruments on")
    if not evidence.public:
        return _untried("no public text was given: name a folder with --public")
    try:
        model = build_model(ModelSpec(path=evidence.start, provenance="public"))
        positive = positive_control(model, evidence.public, seed=seed)
        negative = negative_control(model, evidence.public, seed=seed)
    except CoterieError as error:
        return _untried(error.message.rstrip("."))
    return controls(positive.value, negative.value, negative.prior, negative.gap, {})


def nothing(name: str, part: RunKind, why: str) -> Finding:
    """An attack that could not be made."""
    channel, unit = (Channel.TOKENS, Unit.TOKENS) if part is RunKind.TOKENS else (Channel.PUSHES, Unit.PLACES)
    reason = why.rstrip(".")
    return Finding(
        name=name, adversary=DEFAULT, channel=channel, unit=unit, value=None, reason=reason, sentence=f"{reason}."
    )


def _untried(why: str) -> Controls:
    return controls(None, None, None, None, dict.fromkeys(("positive", "negative", "prior", "gap"), why))
