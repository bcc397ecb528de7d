"""What an audit found, as its JSON holds it: `Finding` is one attack's outcome, `Findings` the whole audit.

A value that the sample cannot carry is null and its reason stands beside it; there is never a number without ground.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from coterie.audit.adversaries import Adversary
from coterie.audit.metrics import Estimate


class Channel(StrEnum):
    """Through what text could be read."""

    ROWS = "hidden vectors"
    GRADIENTS = "returned gradients"
    IDS = "expert ids"
    TOKENS = "everything of `tokens`"
    PUSHES = "pushed sums"
    EMBEDDING = "embedding's sum"
    HEAD = "head's sum"
    MODEL = "trained model"
    RELEASES = "noised releases"


class Unit(StrEnum):
    """What a value counts. Shares are between 0 and 1."""

    TOKENS = "share of all tokens"
    SEEN = "share of tokens seen"
    COVERAGE = "tokens seen, share of all"
    CONTENT = "share of content tokens"
    NEXT = "share of next tokens"
    PLACES = "share of places ranked first"
    PAIRS = "share of adjacent pairs"
    LOADS = "share of loads told exactly"
    RECORDS = "share of whole records"
    SECRETS = "share of whole secrets"
    BAG = "F1 of the bag of tokens"
    ROUGE = "ROUGE-L"
    AUC = "AUC"
    SIMULATED = "AUC in a simulated push"
    """Of membership, in a push of another size than any that was made."""
    PRESENCE = "AUC of a token's presence"
    TPR = "true positives at fixed false positives"
    NOISE = "noise over what was claimed"
    BITS = "exposure in bits"
    EPSILON = "epsilon"


class Over(StrEnum):
    """Whose text a value was measured on."""

    MEMBERS = "members"
    """The owner's own text: the value is an un-noised fact about it."""
    PUBLIC = "public"
    """Public text, planted or simulated."""


class Outcome(StrEnum):
    """How an audit, or its verdict against one adversary, ended."""

    ALARM = "alarm"
    """Something is contradicted that was promised."""
    OPEN = "open"
    """It leaks, and nothing promises that it does not."""
    HELD = "held"
    """The strongest attacks here found nothing beyond what the claim allows."""
    UNKNOWN = "unknown"
    """Nothing can be concluded; the sentence says why."""


class RunKind(StrEnum):
    """What was audited: a federation by its exchange and promise, or a party's run alone."""

    TOKENS = "tokens"
    EXPERTS = "experts"
    EXPERTS_DP = "experts_dp"
    ALONE = "alone"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Finding(_Model):
    """One attack's outcome.

    Attributes:
        name: the attack.
        layer: of the checkpoint, counted from 0; None where several or none are meant.
        lot: records in the push.
        simulated: of pushes that were made up of the owner's records, wholly or in part.
        value: None where the sample cannot carry it; then ``reason`` says why.
        prior: what the same guesser reaches without the channel.
        gain: ``value`` minus ``prior``, paired over the same places.
        sentence: the outcome in words, with its figures.
        allowed: the largest value that a claim allows this very test; None where nothing is promised of it: without a
            claim, and where a whole document, several records, is in or out.
        over: whose text ``value`` was measured on.
        roc: (false positives, true positives), both shares, in increasing order.
    """

    name: str
    adversary: Adversary
    channel: Channel
    unit: Unit
    value: Estimate | None
    sentence: str
    layer: int | None = None
    lot: int | None = None
    simulated: bool = False
    prior: Estimate | None = None
    gain: Estimate | None = None
    allowed: float | None = None
    over: Over = Over.MEMBERS
    reason: str = ""
    roc: tuple[tuple[float, float], ...] = ()

    @model_validator(mode="after")
    def _reasoned(self) -> Self:
        if (self.value is None) != bool(self.reason):
            raise ValueError(f"{self.name}: a value or the reason why there is none")
        return self


NO_COINS = "members were not chosen by coins"
"""How the reason begins where no attack could tell whether a record is in the owner's data."""

_UNBOUNDED = (Unit.BITS, Unit.EPSILON, Unit.NOISE)
_NOT_CARRIED = "too few documents or pushes: by its interval it could have been anything"


def carried(finding: Finding) -> Finding:
    """The finding; without its value, and with the reason, where the interval is all that the value could be."""
    value = finding.value
    if value is None or finding.unit in _UNBOUNDED or value.low > 0 or value.high < 1:
        return finding
    nothing = {"value": None, "prior": None, "gain": None, "roc": ()}
    return finding.model_copy(
        update=nothing | {"reason": _NOT_CARRIED, "sentence": f"It could not be measured: {_NOT_CARRIED}."}
    )


class _Figures(_Model):
    """Figures of which each is a number or null with its reason under ``reasons``."""

    reasons: dict[str, str] = Field(default_factory=dict)
    intervals: dict[str, Estimate] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _reasoned(self) -> Self:
        for name in type(self).model_fields:
            if (getattr(self, name) is None) != (name in self.reasons):
                raise ValueError(f"{name}: a value or the reason why there is none")
        return self


class TokensFigures(_Figures):
    """The exchange `tokens` against its default adversary.

    Attributes:
        recovery: share of all tokens that crossed and were read, by the best attack.
        layers: the same by layer, counted from 0, of the tokens seen there.
        prior: share that a language model guesses without the channel.
    """

    recovery: float | None
    layers: dict[str, float]
    prior: float | None


class ExpertsFigures(_Figures):
    """The exchange `experts` without a budget, against its default adversary.

    Attributes:
        recovery: share of next tokens ranked first in this run's own pushes.
        lots: the same by records in the push.
        simulated: those of these sizes that no push of the run had: such pushes were made up of the owner's records.
        prior: share that a language model guesses without the push.
        auc: of membership of one known record in one push that was made.
    """

    recovery: float | None
    lots: dict[str, float]
    simulated: tuple[str, ...] = ()
    prior: float | None
    auc: float | None


class PrivateFigures(_Figures):
    """The exchange `experts` under a budget, against its default adversary.

    Attributes:
        advantage: recovery minus prior.
        auc: of membership in a lot, or of what the trained model tells.
        auc_limit: the largest AUC that the claim allows the very test which ``auc`` is of.
        auc_allowed: the largest AUC that the claim allows a test of one record by the whole run.
        roc_allowed: (false positives, most true positives) that it allows.
        epsilon_lower: audited lower bound.
        epsilon_ceiling: the largest bound that the number of canaries could have given.
    """

    recovery: float | None
    prior: float | None
    advantage: float | None
    auc: float | None
    auc_limit: float | None
    auc_allowed: float | None
    roc_allowed: tuple[tuple[float, float], ...] = ()
    epsilon_claimed: float | None
    epsilon_lower: float | None
    epsilon_ceiling: float | None


class Controls(_Figures):
    """Whether the instruments work.

    Attributes:
        positive: share of tokens read from undefended hidden vectors of the first MoE layer.
        negative: share of tokens that an instrument reads which can know nothing of them.
        prior: share of the same tokens that is guessed without an instrument.
        gap: ``negative`` less ``prior``, paired over the same tokens.
        passed: positive and negative are where they must be, and the prior is measured.
    """

    positive: float | None
    negative: float | None
    prior: float | None
    gap: float | None
    passed: bool


class Verdict(_Model):
    """What one adversary could do, in words."""

    part: RunKind
    adversary: Adversary
    outcome: Outcome
    sentence: str


class Audited(_Model):
    """One run that was audited.

    Attributes:
        owner: the party under attack.
        config_hash: of the settings all members signed.
        start: digest of the public starting checkpoint.
        claimed: (epsilon, delta) of the owner's ledger, or None.
    """

    part: RunKind
    owner: str
    parties: tuple[str, ...]
    config_hash: str
    model: str
    start: str
    rounds: int
    recorded: int
    claimed: tuple[float, float] | None = None


class Identification(_Model):
    """What was run, so that it can be run again.

    Attributes:
        commit: that coterie was built from; None where nobody knows.
        seconds, cpu_s: of the whole audit, by the clock and of the processor.
        pieces: seconds by the clock of each attack on an exchange, on a model, on epsilon, and of the controls.
    """

    version: str
    commit: str | None
    packages: dict[str, str]
    seed: int
    seconds: float
    cpu_s: float
    pieces: dict[str, float] = Field(default_factory=dict)
    machine: str
    at: str
    runs: tuple[Audited, ...]


class Findings(_Model):
    """A whole audit.

    Attributes:
        outcome: of the audit; an alarm wins over everything.
        headline: the audit in a sentence for each part.
        epsilon: what ``experts_dp`` says of epsilon, with everything behind it.
        tested, untested: in words.
        next_settings: what to try next.
        left_out: what the edition to pass on does not hold; empty in the owner's.
    """

    outcome: Outcome
    headline: tuple[str, ...]
    tokens: TokensFigures
    experts: ExpertsFigures
    experts_dp: PrivateFigures
    epsilon: dict[str, Any] | None = None
    controls: Controls
    verdicts: tuple[Verdict, ...]
    findings: dict[RunKind, tuple[Finding, ...]]
    tested: tuple[str, ...]
    untested: tuple[str, ...]
    next_settings: tuple[str, ...]
    identification: Identification
    left_out: tuple[str, ...] = ()

    def every(self) -> Iterator[tuple[RunKind, Finding]]:
        """All findings with the part they belong to."""
        for part, some in self.findings.items():
            yield from ((part, finding) for finding in some)

    def as_json(self) -> Mapping[str, object]:
        """Plain values for a JSON file."""
        return self.model_dump(mode="json")
