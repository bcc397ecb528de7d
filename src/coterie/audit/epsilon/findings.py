"""What an audit of epsilon found, in figures and in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

CONFIDENCE = 0.999
"""Of every alarm, over all looks of one part of the audit together."""

SHOWN = 0.95
"""Of bounds that are shown, by one law over all scores together. They raise no alarm: an honest run would break a
tight one once in twenty."""


class ClaimVerdict(StrEnum):
    """How a claim stands."""

    CONSISTENT = "consistent"
    ALARM = "ALARM"
    OPEN = "cannot conclude"


def worst(verdicts: list[ClaimVerdict]) -> ClaimVerdict:
    """An alarm wins over everything, and something left open over what is consistent."""
    return next(
        (each for each in (ClaimVerdict.ALARM, ClaimVerdict.OPEN) if each in verdicts), ClaimVerdict.CONSISTENT
    )


@dataclass(frozen=True)
class Premise:
    """One thing that the accounting takes for granted, measured.

    Attributes:
        name: of the premise.
        value: measured.
        expected: what it should be; of contributions, what it may be at most.
        error: standard error of the value; 0 where it is exact.
        chance: probability with which an honest run is as far off; None where nothing is left to chance.
        verdict: of this premise.
        sentence: in words.
    """

    name: str
    value: float
    expected: float
    error: float
    chance: float | None
    verdict: ClaimVerdict
    sentence: str


@dataclass(frozen=True)
class OneRun:
    """What canaries of one run prove against the small claim of the audit.

    Attributes:
        canaries: how many coins were tossed.
        claimed, delta: the claim of this run of its own.
        score: what the canaries were told apart by.
        auc: of that score.
        lower, gaussian_lower: bounds at 95 % for all scores together, by the (epsilon, delta) law and by the Gaussian
            one.
        ceiling, gaussian_ceiling: what as many canaries would prove with no guess wrong.
        alarm_lower: the larger of both bounds at 99.9 %, corrected for all looks; above ``claimed`` is an alarm.
        ratio, ratio_ceiling: sensitivity over noise behind ``gaussian_lower`` and its ceiling, over the claimed one.
        verdict: of this score.
    """

    canaries: int
    claimed: float
    delta: float
    score: str
    auc: float
    lower: float
    ceiling: float
    gaussian_lower: float
    gaussian_ceiling: float
    alarm_lower: float
    ratio: float
    ratio_ceiling: float
    verdict: ClaimVerdict


@dataclass(frozen=True)
class EpsilonFindings:
    """Epsilon from below.

    Attributes:
        epsilon_claimed, delta: of the run.
        epsilon_lower: what the canaries' Gaussian bound at 95 % comes to at the run's own noise, sampling and rounds;
            None where no canaries were run.
        epsilon_ceiling: the most that so many canaries could have shown of it.
        epsilon_measured: what the measured noise and the furthest-reaching record cost over the run; infinite without
            noise.
        premises: each with its verdict.
        one_run: each score of the canaries.
        auc_allowed: the largest AUC of membership that the run's mechanism allows.
        tpr_allowed: the largest share of members found at 1 % false alarms.
        auc_by_claim: the largest AUC that epsilon and delta alone allow.
        verdict: of all.
        sentences: the outcome in words, for people.
        seconds: how long the parts took.
    """

    epsilon_claimed: float
    delta: float
    epsilon_lower: float | None
    epsilon_ceiling: float | None
    epsilon_measured: float | None
    premises: tuple[Premise, ...]
    one_run: tuple[OneRun, ...]
    auc_allowed: float
    tpr_allowed: float
    auc_by_claim: float
    verdict: ClaimVerdict
    sentences: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)
