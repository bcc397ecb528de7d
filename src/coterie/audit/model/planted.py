"""What a trained model gives away of what was planted: exposure of secrets, whole secrets, membership of texts."""

from __future__ import annotations

from collections.abc import Sequence

from coterie.audit.adversaries import Adversary
from coterie.audit.findings import Channel, Finding, Over, Unit
from coterie.audit.metrics import Estimate, Scores, auc, proportion
from coterie.audit.model.canaries import Canary, Kind
from coterie.audit.model.exposure import ABSENT, TRIES, Exposed, chance_of, expose, exposure, mean_bits
from coterie.audit.model.membership import loaded
from coterie.audit.model.scoring import score_tokens
from coterie.audit.model.target import Target
from coterie.audit.model.words import can, shown

FEWEST = 10
"""Texts of each side without which an AUC is none."""
_LEAST_CHANCE = 0.01


def secret_findings(target: Target, alternatives: int, seed: int) -> list[Finding]:
    """Exposure by the number of copies, and whole secrets that the model writes."""
    planted = [canary for canary in target.canaries if canary.kind == "secret"]
    if not planted:
        return []
    exposed = expose(loaded(target.model), target.tokenizer, planted, alternatives=alternatives, seed=seed)
    groups: dict[int, list[Exposed]] = {}
    for one in exposed:
        groups.setdefault(one.copies, []).append(one)
    absent = groups.pop(0, [])
    prior = mean_bits(absent, alternatives) if len(absent) > 1 else None
    found = []
    for copies, some in sorted(groups.items()):
        found += [
            _exposure_finding(copies, some, prior, alternatives, len(groups)),
            _written_finding(target, copies, some, absent),
        ]
    return found


def _exposure_finding(
    copies: int, some: Sequence[Exposed], prior: Estimate | None, alternatives: int, looks: int
) -> Finding:
    value, chance = mean_bits(some, alternatives), min(1.0, looks * chance_of(some))
    first = sum(one.first for one in some)
    told = "stand out" if chance < _LEAST_CHANCE else "do not stand out"
    return Finding(
        name=f"exposure of a secret in {_copies(copies)}",
        adversary=Adversary.HOST_PUBLIC,
        channel=Channel.MODEL,
        unit=Unit.BITS,
        value=value,
        prior=prior,
        over=Over.PUBLIC,
        sentence=f"{len(some)} planted secrets in {_copies(copies)} each {told}: exposure {shown(value)} bits, where "
        f"one that was never seen averages {ABSENT:.2f} and {exposure(1, alternatives):.2f} is the most; {first} of "
        f"{len(some)} rank first among {alternatives + 1} codes. As much comes by chance with probability "
        f"{chance:.2g}.",
    )


def _written_finding(target: Target, copies: int, some: Sequence[Exposed], absent: Sequence[Exposed]) -> Finding:
    greedy, sampled = sum(one.greedy for one in some), sum(one.sampled >= 0.5 for one in some)
    written = [one.greedy or one.sampled >= 0.5 for one in absent]
    # Under a claim a handful of secrets decides nothing, and copies are a group: no prior, so no verdict.
    compared = bool(written) and target.claim is None
    return Finding(
        name=f"secrets in {_copies(copies)} written by the model",
        adversary=Adversary.HOST_PUBLIC,
        channel=Channel.MODEL,
        unit=Unit.SECRETS,
        value=proportion(sum(one.greedy or one.sampled >= 0.5 for one in some), len(some)),
        prior=proportion(sum(written), len(written)) if compared else None,
        over=Over.PUBLIC,
        sentence=f"After the words that lead to it, the model writes {greedy} of {len(some)} secrets in "
        f"{_copies(copies)} whole when it takes the likeliest token, and {sampled} within {TRIES} samples as likely "
        "as not.",
    )


def _copies(count: int) -> str:
    return "one copy" if count == 1 else f"{count} copies"


def canary_scores(target: Target, kind: Kind) -> tuple[dict[str, float], dict[str, bool]]:
    """Loss of the start less that of the trained model on each text canary of a kind, and whether it was in the text.

    Both by the canary's text; for an audit of epsilon in one run, whose coins these are. A new-token canary is scored
    on what follows its prefix.
    """
    chosen = {canary.text: canary for canary in target.canaries if canary.kind == kind}
    texts = list(chosen)
    if not texts:
        return {}, {}
    ids: list[list[int]] = target.tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
    known = [_known(target, chosen[text]) for text in texts]
    own, start = (score_tokens(loaded(load), ids) for load in (target.model, target.start))
    gains = [
        float((own.log_p_P[own.of(row)] - start.log_p_P[start.of(row)])[known[row] :].mean())
        for row in range(len(ids))
    ]
    return dict(zip(texts, gains, strict=True)), {text: chosen[text].copies > 0 for text in texts}


def _known(target: Target, canary: Canary) -> int:
    """Predicted tokens of a canary that belong to its prefix."""
    if not canary.prefix:
        return 0
    ids: list[int] = target.tokenizer(canary.prefix, add_special_tokens=True, verbose=False)["input_ids"]
    return len(ids) - 1


def text_findings(target: Target, seed: int) -> list[Finding]:
    """Membership of planted texts, each one record and in by its own coin: here the claim for one record holds."""
    kinds: dict[Kind, str] = {"sampled": "sampled text", "new_token": "text with a new token"}
    found = []
    for kind, words in kinds.items():
        scores, truth = canary_scores(target, kind)
        sides = (sum(truth.values()), len(truth) - sum(truth.values()))
        if not truth:
            continue
        value = auc(Scores.joined(scores, truth), seed=seed) if min(sides) >= FEWEST else None
        reason = "" if value is not None else f"{sides[0]} are in the text and {sides[1]} are not"
        allowed = f" {str(target.claim).capitalize()} allows {target.claim.allowed.auc:.2f}." if target.claim else ""
        found.append(
            Finding(
                name=f"membership of a planted record, {words}",
                adversary=Adversary.HOST_PUBLIC,
                channel=Channel.MODEL,
                unit=Unit.AUC,
                value=value,
                allowed=target.claim.allowed.auc if target.claim else None,
                over=Over.PUBLIC,
                sentence=f"{can(value)} which planted records ({words}) were trained on: AUC {shown(value)}."
                + allowed
                if value is not None
                else f"Membership of planted records ({words}) was not measured: {reason}.",
                reason=reason,
            )
        )
    return found
