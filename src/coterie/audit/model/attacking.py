"""Every attack on a trained model, in order, and what each of them found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coterie.audit.adversaries import Adversary
from coterie.audit.findings import NO_COINS, Channel, Finding, Unit
from coterie.audit.metrics import Scores, auc, fewest_others, proportion, tpr_at
from coterie.audit.model import membership
from coterie.audit.model.membership import Candidates, ModelScores, corrected, loaded, measure, signals
from coterie.audit.model.planted import secret_findings, text_findings
from coterie.audit.model.scoring import TokenScores, score_tokens
from coterie.audit.model.target import Design, Target
from coterie.audit.model.words import can, shown, thinned

DOCUMENTS = 2000
"""Most documents of each side that are scored, with time for them."""
ALTERNATIVES = (200, 1000)
"""Codes that a secret is ranked among: these at least, so many with time for them."""
FEWEST = 10
"""Documents of each side without which an AUC is none."""
RATES = (0.01, 0.001)
_SECRET_TOKENS = 28
_LEAST_COMPLETED = 16

NAIVE = (
    "This is no measure of leakage: who is in the training text was not decided by coins, and documents that were "
    "chosen to train on differ from those held out. On such a split a model that had never seen the text reached "
    "0.59 [0.53, 0.67]. Prepare a run with coins, or name a reference model that saw none of this text."
)
"""Why a difference between training text and held-out text is not called leakage."""


@dataclass(frozen=True)
class Effort:
    """How much is looked at.

    Attributes:
        documents: of each side, at most.
        alternatives: codes that each secret is ranked among.
    """

    documents: int = DOCUMENTS
    alternatives: int = ALTERNATIVES[1]

    @classmethod
    def within(cls, target: Target, budget_s: float, seed: int) -> Effort:
        """What fits the time, by the speed of the attacked model on a few records. Secrets come first."""
        few = Candidates.of(target, 4, seed)
        model = loaded(target.model)
        began = time.perf_counter()
        score_tokens(model, few.sequences)
        tokens = sum(map(len, few.sequences))
        affordable = 0.8 * budget_s * tokens / (time.perf_counter() - began)
        secrets = sum(canary.kind == "secret" for canary in target.canaries)
        least, most = ALTERNATIVES
        wanted = min(most, max(least, int(0.3 * affordable / (_SECRET_TOKENS * max(1, secrets)))))
        left = max(0.0, affordable - secrets * wanted * _SECRET_TOKENS)
        each = tokens / max(1, len(set(few.document_ids))) * 2 * (2 + len(target.references))
        return cls(min(DOCUMENTS, max(FEWEST, int(left / each))), wanted)


def attack(
    run: Target | Path, *, seed: int, budget_s: float | None = None, effort: Effort | None = None
) -> list[Finding]:
    """Attack a trained model: membership, planted secrets, and text that it writes by itself.

    Args:
        run: a run's folder, or `Target.of_run` with more than that.
        seed: of what is drawn: records, alternatives, resampled documents.
        budget_s: seconds to stay within, roughly; None: everything. Less time means fewer records and alternatives,
            and wider intervals.
        effort: exactly so much, whatever it takes.

    Raises:
        AuditError: see `Target.of_run`; the model does not predict next tokens.
    """
    target = Target.of_run(run) if isinstance(run, Path) else run
    if effort is None:
        effort = Effort() if budget_s is None else Effort.within(target, budget_s, seed)
    candidates = Candidates.of(target, effort.documents, seed)
    found = []
    if min(candidates.count(True), candidates.count(False)) < FEWEST:
        found.append(_too_few(candidates))
    else:
        found += _membership(target, candidates, effort.documents, seed)
    return found + secret_findings(target, effort.alternatives, seed) + text_findings(target, seed)


# ---- membership ----


def _membership(target: Target, candidates: Candidates, most: int, seed: int) -> list[Finding]:
    attacked, *controls = measure(target, candidates, most_population=most, seed=seed)
    texts = [target.tokenizer.decode(ids).encode() for ids in candidates.sequences]
    scored = signals(attacked, texts)
    completed = _completed(candidates, attacked.own)
    if target.design is Design.SPLIT:
        return [_naive(candidates.scores(scored[membership.RATIO]), seed), completed]
    compared = [signals(control, texts) for control in controls]
    found = []
    for name, score_S in scored.items():
        others = [candidates.scores(control[name]) for control in compared]
        found.append(_auc_finding(target, candidates, name, score_S, others, attacked, seed))
    if target.design is Design.COIN:
        found += _by_document(target, candidates, scored[membership.RATIO], seed)
    return [*found, completed]


def _auc_finding(
    target: Target,
    candidates: Candidates,
    name: str,
    score_S: Tensor,
    controls: Sequence[Scores],
    attacked: ModelScores,
    seed: int,
) -> Finding:
    scores = candidates.scores(score_S)
    raw = auc(scores, seed=seed)
    if controls:
        value = corrected(scores, controls, seed=seed)
        prior = auc(controls[0], seed=seed)
        words = (
            f"{shown(value)} by {name}, which is {shown(raw)} less what a model that saw none of the members reaches "
            f"above 0.5 ({shown(prior)}). Coins would say more: the two models differ in more than the members."
        )
    else:
        value, prior = raw, auc(candidates.scores(-attacked.start_S), seed=seed)
        words = f"{shown(value)} by {name}; without the trained model {shown(prior)}."
    return Finding(
        name=f"membership of a record, {name}",
        adversary=Adversary.HOST_DOMAIN if name == membership.AGAINST else Adversary.HOST_PUBLIC,
        channel=Channel.MODEL,
        unit=Unit.AUC,
        value=value,
        prior=prior,
        sentence=f"{can(value)} whether a record was trained on: AUC {words}{_beside(target)}",
        roc=thinned(scores) if name == membership.RATIO and not controls else (),
    )


def _by_document(target: Target, candidates: Candidates, ratio_S: Tensor, seed: int) -> list[Finding]:
    """One score a document, and what share of them is found with hardly any false alarm."""
    scores = candidates.by_document(ratio_S)
    whole = auc(scores, seed=seed)
    found = [
        Finding(
            name="membership of a document, " + membership.RATIO,
            adversary=Adversary.HOST_PUBLIC,
            channel=Channel.MODEL,
            unit=Unit.AUC,
            value=whole,
            prior=None,
            sentence=f"{can(whole)} whether a document was trained on: AUC {shown(whole)}.{_beside(target)}",
            roc=thinned(scores),
        )
    ]
    for fpr in RATES:
        value = tpr_at(fpr, scores, seed=seed)
        few = f"{candidates.count(False)} documents held out carry no rate at {fpr:.1%}; {fewest_others(fpr)} would."
        found.append(
            Finding(
                name=f"documents found at {fpr:.1%} false alarms",
                adversary=Adversary.HOST_PUBLIC,
                channel=Channel.MODEL,
                unit=Unit.TPR,
                value=value,
                sentence=few
                if value is None
                else f"{shown(value)} of the documents are found at {fpr:.1%} false alarms.",
                reason=few if value is None else "",
            )
        )
    return found


def _completed(candidates: Candidates, own: TokenScores) -> Finding:
    """Records that the model writes out by itself, word for word, when it is given their first half."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for row, record in enumerate(candidates.ids):
        first_P = own.first_P[own.of(row)]
        if len(first_P) >= _LEAST_COMPLETED:
            hits[candidates.members[record]].append(bool(first_P[len(first_P) // 2 :].all()))
    read, total = sum(hits[True]), len(hits[True])
    known, unseen = sum(hits[False]), len(hits[False])
    reason = "" if total else f"no record has {_LEAST_COMPLETED + 1} tokens"
    beside = f"; of records that it never saw, {known} of {unseen}" if unseen else ""
    return Finding(
        name="records completed from their first half",
        adversary=Adversary.HOST_DOMAIN,
        channel=Channel.MODEL,
        unit=Unit.RECORDS,
        value=proportion(read, total) if total else None,
        prior=proportion(known, unseen) if total and unseen else None,
        sentence=f"Whether records are written out was not measured: {reason}."
        if reason
        else f"Given the first half of a record, the model writes the second word for word for {read} of {total} "
        f"records it was trained on{beside}.",
        reason=reason,
    )


def _naive(scores: Scores, seed: int) -> Finding:
    figure = auc(scores, seed=seed)
    return Finding(
        name="membership of a record, " + membership.RATIO,
        adversary=Adversary.HOST_PUBLIC,
        channel=Channel.MODEL,
        unit=Unit.AUC,
        value=None,
        sentence=f"Training text and held-out text differ by AUC {shown(figure)}. {NAIVE}",
        reason=f"{NO_COINS}, and no model without them was given",
    )


def _too_few(candidates: Candidates) -> Finding:
    counts = f"{candidates.count(True)} documents trained on and {candidates.count(False)} not"
    return Finding(
        name="membership of a record, " + membership.RATIO,
        adversary=Adversary.HOST_PUBLIC,
        channel=Channel.MODEL,
        unit=Unit.AUC,
        value=None,
        sentence=f"Membership was not measured: there are {counts}, and an AUC needs {FEWEST} of each.",
        reason=f"there are {counts}",
    )


def _beside(target: Target) -> str:
    """What the claim allows, for one record; documents of several are groups."""
    if target.claim is None:
        return ""
    allowed = target.claim.allowed
    return (
        f" {str(target.claim).capitalize()} allows {allowed.auc:.2f}; a document of several records is a group, of "
        "which less is promised."
    )
