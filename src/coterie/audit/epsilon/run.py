"""The audit of epsilon: premises, canaries, and what both say together."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from coterie.audit.epsilon import one_run, premises
from coterie.audit.epsilon.allowed import by_claim, by_mechanism
from coterie.audit.epsilon.canaries import FAMILIES, CanaryFamily
from coterie.audit.epsilon.findings import ClaimVerdict, EpsilonFindings, OneRun, Premise, worst
from coterie.audit.epsilon.premises import MeasuredPremises
from coterie.audit.epsilon.subject import Claim, Subject
from coterie.audit.evidence import Evidence
from coterie.config import TrainConfig
from coterie.dp.accounting.accountant import epsilon

_PREMISES_SHARE = 0.45
_FPR = 0.01


def audit_epsilon(
    evidence: Evidence | TrainConfig | Subject,
    *,
    seed: int | None = None,
    budget_s: float = 30.0,
    canaries: int = one_run.CANARIES,
    families: tuple[CanaryFamily, ...] = FAMILIES,
) -> EpsilonFindings:
    """Ask from below whether a run's epsilon holds. Nothing is written, counted, applied or sent.

    Args:
        evidence: of a party's run; or settings of `coterie train`, whose run may be there or not; or what
            `Subject` made of either.
        seed: for tests; None: canaries, coins, lots and noise are the operating system's randomness.
        budget_s: about how long the premises may take together with the canaries; the canaries' number sets their own
            part, about 0.05 s each on a small model.
        canaries: how many; 0 leaves this part out.
        families: how canaries are made.

    Raises:
        AuditError: the run claims no epsilon.
    """
    subject = evidence if isinstance(evidence, Subject) else _subject(evidence)
    claim = subject.claim
    began = time.monotonic()
    measured = premises.measure(subject, seed=seed, budget_s=_PREMISES_SHARE * budget_s)
    halfway = time.monotonic()
    runs: tuple[OneRun, ...] = ()
    found = measured.premises
    if canaries:
        runs, outside = one_run.audit(subject, canaries=canaries, families=families, seed=seed)
        found = (*found, outside)
    ended = time.monotonic()
    allowed = by_mechanism([(claim.mechanism, claim.rounds)])
    lower, ceiling = (_carried(claim, runs, what) for what in ("ratio", "ratio_ceiling"))
    spent = measured.epsilon(subject)
    verdict = worst([*(each.verdict for each in found), *(each.verdict for each in runs)])
    return EpsilonFindings(
        epsilon_claimed=claim.epsilon,
        delta=claim.delta,
        epsilon_lower=lower,
        epsilon_ceiling=ceiling,
        epsilon_measured=spent,
        premises=found,
        one_run=runs,
        auc_allowed=allowed.auc,
        tpr_allowed=allowed.tpr(_FPR),
        auc_by_claim=by_claim(claim.epsilon, claim.delta).auc,
        verdict=verdict,
        sentences=_sentences(claim, found, runs, measured, spent, lower, ceiling, allowed.auc),
        seconds={"premises": halfway - began, "one_run": ended - halfway},
    )


def _subject(evidence: Evidence | TrainConfig) -> Subject:
    if isinstance(evidence, TrainConfig):
        return Subject.of_settings(evidence)
    return Subject.of_run(evidence.run_folder, evidence.start)


def _carried(claim: Claim, runs: tuple[OneRun, ...], what: str) -> float | None:
    """What a ratio of sensitivity to noise, seen in the audit's own round, comes to over the run.

    The same code makes both; only the number that noise is multiplied with differs.
    """
    if not runs:
        return None
    # The larger of several bounds: `one_run` divides their error by the number of scores.
    ratio = max(float(getattr(each, what)) for each in runs)
    if ratio == 0:
        return 0.0
    sigma = claim.mechanism.noise_multiplier / ratio
    return epsilon([(replace(claim.mechanism, noise_multiplier=sigma), claim.rounds)], claim.delta)


def _sentences(
    claim: Claim, found: tuple[Premise, ...], runs: tuple[OneRun, ...], measured: MeasuredPremises, spent: float,
    lower: float | None, ceiling: float | None, auc: float,
) -> tuple[str, ...]:  # fmt: skip
    wrong = [each for each in found if each.verdict is ClaimVerdict.ALARM]
    told = []
    if wrong:
        told.append(f"ALARM: the claim of epsilon {claim.epsilon:g} does not hold.")
        told += [f"{each.name}: {each.sentence}" for each in wrong]
    else:
        told.append(
            f"The {len(found)} premises of epsilon {claim.epsilon:g} hold as far as they were measured: noise is "
            f"{found[1].value:.4f} times the claimed, and the record that reached furthest added "
            f"{measured.contribution:.4f} times the clip norm."
        )
    words = "without bound" if math.isinf(spent) else f"epsilon {spent:.3g}"
    told.append(f"With the measured noise and that record the run costs {words}; it claims {claim.epsilon:g}.")
    for each in runs:
        alarm = f"ALARM: above its claim, at 99.9 % confidence ({each.alarm_lower:.2f}). "
        open_ = "That many canaries cannot contradict the claim. "
        first = {ClaimVerdict.ALARM: alarm, ClaimVerdict.OPEN: open_, ClaimVerdict.CONSISTENT: ""}[each.verdict]
        told.append(
            f"{first}{each.canaries} canaries in one round at epsilon {each.claimed:g}, by the {each.score}: AUC "
            f"{each.auc:.2f}, at least {each.lower:.2f} (at most {each.ceiling:.1f} could be shown) by the "
            f"(epsilon, delta) law, {each.gaussian_lower:.2f} (at most {each.gaussian_ceiling:.1f}) by the Gaussian."
        )
    if lower is not None and ceiling is not None:
        shown = "any epsilon" if math.isinf(ceiling) else f"{ceiling:.3g}"
        least = "without bound" if math.isinf(lower) else f"{lower:.3g}"
        told.append(f"Carried over to the run: epsilon at least {least}; up to {shown} could have been shown.")
    told.append(f"Epsilon {claim.epsilon:g} over this run allows a membership test an AUC of up to {auc:.3f}.")
    return tuple(told)
