"""What a figure of the audit means, and how far it can be trusted.

Every rate comes as an `Estimate` with a 95 % interval. Places of one document are alike, so intervals resample whole
documents. Where all documents agree that would give an interval of no width: none is narrower than the exact one, or
the score interval, of independent places. Fewer than `FEWEST_DOCUMENTS` documents say nothing of others: then the
interval is all that the figure could have been, and no finding shows it (`coterie.audit.findings.carried`).

Shape letters: P places (tokens of the attacked text), D documents, M members, N others (non-members), V vocabulary, U
distinct scores, R resamples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from scipy import optimize, stats
from torch import Tensor

from coterie.errors import AuditError

Id = TypeVar("Id", bound=Hashable)
"""What a record is known by."""
CONFIDENCE = 0.95
RESAMPLES = 1000
FEWEST_DOCUMENTS = 4
"""Documents that an interval over documents needs."""
UNKNOWN = -1
"""A guess that is none."""

_Z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
_TAILS = torch.tensor([0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2], dtype=torch.float64)
_CHUNK = 1 << 22
"""Most float64 values of one table while resampling scores."""


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval.

    Attributes:
        count: what it rests on: places for a rate, scores of both sides for an AUC.
    """

    value: float
    low: float
    high: float
    count: int

    def wider(self, other: tuple[float, float]) -> Estimate:
        """The same value, with the outer bounds of two intervals."""
        return Estimate(self.value, min(self.low, other[0]), max(self.high, other[1]), self.count)


# ---- intervals ----


def proportion(hits: int, total: int) -> Estimate:
    """A share of independent trials with the exact interval (Clopper and Pearson).

    Raises:
        AuditError: no trial, or more hits than trials.
    """
    _need(total, "trial")
    if not 0 <= hits <= total:
        raise AuditError(
            f"{hits} hits of {total} trials is no proportion.",
            code="audit-counts",
            fix="count a hit once for each trial",
        )
    interval = stats.binomtest(hits, total).proportion_ci(CONFIDENCE, "exact")
    return Estimate(hits / total, float(interval.low), float(interval.high), total)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent measurements of a share, with Student's interval.

    Raises:
        AuditError: there is none.
    """
    _need(len(values), "measurement")
    found = torch.tensor(values, dtype=torch.float64)
    value, count = float(found.mean()), len(values)
    if count < FEWEST_DOCUMENTS:
        return Estimate(value, 0.0, 1.0, count)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * found.std() / math.sqrt(count))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), count)


def _few(document_P: Tensor) -> bool:
    return len(torch.unique(document_P)) < FEWEST_DOCUMENTS


def rate(right_P: Tensor, document_P: Tensor | None = None, *, seed: int = 0) -> Estimate:
    """The share of places that are right, over places, with documents resampled.

    Args:
        right_P: bool [P].
        document_P: which document each place lies in, any integers; None: every place stands for itself. Fewer than
            `FEWEST_DOCUMENTS` of them leave the interval at [0, 1].
        seed: of the resampling.

    Raises:
        AuditError: no place, or lengths differ.
    """
    exact = proportion(int(right_P.sum()), len(right_P))
    if document_P is None:
        return exact
    _same(len(right_P), len(document_P))
    if _few(document_P):
        return exact.wider((0.0, 1.0))
    return exact.wider(_resampled_mean(right_P.double(), document_P, seed))


def advantage(right_P: Tensor, prior_P: Tensor, document_P: Tensor | None = None, *, seed: int = 0) -> Estimate:
    """How much larger the share of right places is than a prior's on the same places.

    The interval is paired: the score interval of Tango (1998) for a difference of paired proportions, widened by
    resampled documents. Where the two never disagree it still has the width that this many places allow.

    Args:
        right_P: bool [P], of the attack.
        prior_P: bool [P], of the guess without the attack's channel.
        document_P: as in `rate`; too few of them leave the interval at [-1, 1].
        seed: of the resampling.

    Raises:
        AuditError: no place, or lengths differ.
    """
    _same(len(right_P), len(prior_P))
    _need(len(right_P), "place")
    gained, lost = int((right_P & ~prior_P).sum()), int((prior_P & ~right_P).sum())
    value = (gained - lost) / len(right_P)
    paired = Estimate(value, *_tango(gained, lost, len(right_P)), len(right_P))
    if document_P is None:
        return paired
    _same(len(right_P), len(document_P))
    if _few(document_P):
        return paired.wider((-1.0, 1.0))
    return paired.wider(_resampled_mean(right_P.double() - prior_P.double(), document_P, seed))


def _tango(gained: int, lost: int, total: int) -> tuple[float, float]:
    """The differences that the score test does not reject: |gained - lost - total d| <= z sqrt(variance under d)."""

    def score(difference: float) -> float:
        a = 2 * total
        b = -gained - lost + (2 * total - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = total * (2 * q + difference * (1 - difference))
        return (gained - lost - total * difference) / math.sqrt(max(variance, 1e-300))

    value, edge = (gained - lost) / total, 1 - 1e-9
    low = -1.0 if score(-edge) < _Z else optimize.brentq(lambda d: score(d) - _Z, -edge, value)
    high = 1.0 if score(edge) > -_Z else optimize.brentq(lambda d: score(d) + _Z, value, edge)
    return float(low), float(high)


def _resampled_mean(value_P: Tensor, document_P: Tensor, seed: int) -> tuple[float, float]:
    """The percentile interval of a mean over places, over resampled documents."""
    documents, index_P = torch.unique(document_P, return_inverse=True)
    sum_D = torch.bincount(index_P, value_P, len(documents))
    places_D = torch.bincount(index_P, minlength=len(documents)).double()
    generator, drawn = torch.Generator().manual_seed(seed), []
    for some in _portions(len(documents)):
        chosen_RD = _resample(len(documents), generator, some)
        drawn.append(sum_D[chosen_RD].sum(1) / places_D[chosen_RD].sum(1))
    low, high = torch.quantile(torch.cat(drawn), _TAILS).tolist()
    return low, high


def _portions(width: int) -> list[int]:
    """How many resamples to draw at once, so that a table of this width stays small."""
    at_once = max(1, _CHUNK // width)
    return [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]


def _resample(count: int, generator: torch.Generator, times: int) -> Tensor:
    return torch.randint(count, (times, count), generator=generator)


# ---- scores of members and others ----


@dataclass(frozen=True)
class Scores:
    """Membership scores; larger means "was a member".

    Attributes:
        member_M, other_N: float64.
        member_documents_M, other_documents_N: which document each lies in; intervals resample these.
    """

    member_M: Tensor
    other_N: Tensor
    member_documents_M: Tensor
    other_documents_N: Tensor

    @property
    def of_few(self) -> bool:
        """Whether a side has several scores of one document, and too few documents to resample."""
        sides = self.member_documents_M, self.other_documents_N
        return any(_few(documents) and len(torch.unique(documents)) < len(documents) for documents in sides)

    @classmethod
    def of(
        cls,
        member: Sequence[float] | Tensor,
        other: Sequence[float] | Tensor,
        member_documents: Sequence[int] | Tensor | None = None,
        other_documents: Sequence[int] | Tensor | None = None,
    ) -> Scores:
        """Check and keep them. Without documents every score stands for itself.

        Raises:
            AuditError: one side is empty, a score is not a number, or lengths differ.
        """
        sides = []
        for name, scores, documents in (("member", member, member_documents), ("other", other, other_documents)):
            values = torch.as_tensor(scores, dtype=torch.float64)
            _need(len(values), name)
            if values.isnan().any():
                raise AuditError(
                    f"A score of a {name} is not a number.",
                    code="audit-score",
                    fix="leave out records whose loss is not finite, and say how many they are",
                )
            groups = torch.arange(len(values)) if documents is None else torch.as_tensor(documents)
            _same(len(values), len(groups))
            sides.append((values, torch.unique(groups, return_inverse=True)[1]))
        (member_M, member_documents_M), (other_N, other_documents_N) = sides
        return cls(member_M, other_N, member_documents_M, other_documents_N)

    @classmethod
    def joined(
        cls,
        scores: Mapping[Id, float],
        members: Mapping[Id, bool],
        documents: Mapping[Id, int] | None = None,
    ) -> Scores:
        """Join scores and the truth by the ids of records, never by their order.

        Raises:
            AuditError: an id of one is missing in the other.
        """
        for found in (members, members if documents is None else documents):
            if scores.keys() != found.keys():
                raise AuditError(
                    f"{len(scores.keys() ^ found.keys())} ids have a score or a truth, and not both.",
                    code="audit-unjoined",
                    fix="give a score and a truth for the same ids",
                    why="scores beside the wrong truth would measure nothing",
                )
        inside, outside = [k for k in scores if members[k]], [k for k in scores if not members[k]]
        groups = None if documents is None else ([documents[k] for k in inside], [documents[k] for k in outside])
        return cls.of([scores[k] for k in inside], [scores[k] for k in outside], *(groups or (None, None)))


def area(scores: Scores) -> float:
    """The chance that a member scores above another, ties counted half, without an interval."""
    return float(_area(*_counts(scores))[0])


def auc(scores: Scores, *, seed: int = 0) -> Estimate:
    """The chance that a member scores above another; ties count half.

    The interval resamples documents on both sides, and is no narrower than the score interval of Newcombe (2006). Too
    few documents on a side that has several scores of one leave it at [0, 1].
    """
    members, others = len(scores.member_M), len(scores.other_N)
    value = area(scores)
    found = Estimate(value, *_resampled(scores, seed, _area), members + others)
    return found.wider((0.0, 1.0) if scores.of_few else _newcombe(value, members, others))


def fewest_others(fpr: float) -> int:
    """Others without whom a rate at this false-positive rate is none: one false alarm must be allowed."""
    return math.ceil(round(1 / fpr, 9))


def tpr_at(fpr: float, scores: Scores, *, seed: int = 0) -> Estimate | None:
    """The share of members found at a threshold that at most this share of others reaches.

    Returns:
        None where there are too few others for such a rate; see `fewest_others`.
    """
    members = len(scores.member_M)
    if len(scores.other_N) < fewest_others(fpr):
        return None

    def found(member_UR: Tensor, other_UR: Tensor) -> Tensor:
        reached_UR = other_UR.flip(0).cumsum(0).flip(0)
        allowed_UR = reached_UR <= fpr * other_UR.sum(0) * (1 + 1e-12)
        return (member_UR * allowed_UR).sum(0) / member_UR.sum(0)

    value = float(found(*_counts(scores))[0])
    exact = proportion(round(value * members), members)
    spread = (0.0, 1.0) if scores.of_few else (exact.low, exact.high)
    return Estimate(value, *_resampled(scores, seed, found), members).wider(spread)


def roc(scores: Scores) -> tuple[Tensor, Tensor]:
    """False- and true-positive rates at every threshold, from (0, 0) to (1, 1), float64."""
    member_U1, other_U1 = _counts(scores)
    zero = torch.zeros(1, dtype=torch.float64)
    fpr, tpr = (torch.cat([zero, side[:, 0].flip(0).cumsum(0)]) for side in (other_U1, member_U1))
    return fpr / fpr[-1], tpr / tpr[-1]


def _area(member_UR: Tensor, other_UR: Tensor) -> Tensor:
    below_UR = other_UR.cumsum(0) - other_UR / 2
    return (member_UR * below_UR).sum(0) / (member_UR.sum(0) * other_UR.sum(0))


def _levels(scores: Scores) -> tuple[Tensor, Tensor, int]:
    """Which of the distinct scores, lowest first, each member's and each other's is, and how many there are."""
    levels, index = torch.unique(torch.cat([scores.member_M, scores.other_N]), return_inverse=True)
    level_M, level_N = index.split([len(scores.member_M), len(scores.other_N)])
    return level_M, level_N, len(levels)


def _counts(scores: Scores) -> tuple[Tensor, Tensor]:
    """How many members and others have each distinct score, [U, 1]."""
    level_M, level_N, size = _levels(scores)
    member_U, other_U = (torch.bincount(level, minlength=size).double() for level in (level_M, level_N))
    return member_U[:, None], other_U[:, None]


def _resampled(scores: Scores, seed: int, statistic: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """The percentile interval of a statistic of the counts per score, over resampled documents of both sides."""
    level_M, level_N, size = _levels(scores)
    generator, drawn = torch.Generator().manual_seed(seed), []
    for some in _portions(size + len(scores.member_M) + len(scores.other_N)):
        sides = [
            _drawn_counts(level, documents, size, some, generator)
            for level, documents in ((level_M, scores.member_documents_M), (level_N, scores.other_documents_N))
        ]
        drawn.append(statistic(*sides))
    low, high = torch.quantile(torch.cat(drawn), _TAILS).tolist()
    return low, high


def _drawn_counts(level: Tensor, document: Tensor, size: int, times: int, generator: torch.Generator) -> Tensor:
    chosen_RD = _resample(int(document.max()) + 1, generator, times)
    drawn_RD = torch.zeros(chosen_RD.shape, dtype=torch.float64)
    drawn_RD.scatter_add_(1, chosen_RD, torch.ones(chosen_RD.shape, dtype=torch.float64))
    return torch.zeros(size, times, dtype=torch.float64).index_add_(0, level, drawn_RD.T[document])


def _newcombe(value: float, members: int, others: int) -> tuple[float, float]:
    """The AUCs whose standard error (Hanley and McNeil's, symmetric form) reaches as far as the measured one."""
    each = (members + others) / 2 - 1

    def distance(true: float) -> float:
        spread = 1 + each * (1 - true) / (2 - true) + each * true / (1 + true)
        return abs(true - value) - _Z * math.sqrt(true * (1 - true) * spread / (members * others))

    inside = min(max(value, 1e-9), 1 - 1e-9)  # at 0 and 1 themselves the standard error vanishes
    low = 0.0 if value <= 0 else optimize.brentq(distance, 0.0, inside)
    high = 1.0 if value >= 1 else optimize.brentq(distance, inside, 1.0)
    return float(low), float(high)


# ---- recovered text ----


@dataclass(frozen=True)
class Recovery:
    """How much of a text was read.

    Attributes:
        all: right guesses over all private tokens: what is not seen counts as missed.
        seen: right guesses over the tokens that reached the attacker; None when none did.
        coverage: tokens that reached the attacker over all.
        content: right guesses over all tokens that carry meaning; None when there are none, or no list of them.
    """

    all: Estimate
    seen: Estimate | None
    coverage: Estimate
    content: Estimate | None = None


def token_recovery(
    truth_P: Tensor,
    guess_P: Tensor,
    seen_P: Tensor,
    document_P: Tensor | None = None,
    *,
    content_V: Tensor | None = None,
    seed: int = 0,
) -> Recovery:
    """Compare guesses with the truth, place by place.

    Args:
        truth_P: token ids of all private places.
        guess_P: the attacker's; `UNKNOWN` where it has none.
        seen_P: bool, which places reached the attacker at all.
        document_P: as in `rate`.
        content_V: bool, which ids carry meaning; see `content_ids`.
        seed: of the resampling.

    Raises:
        AuditError: no place, or lengths differ.
    """
    _same(len(truth_P), len(guess_P), len(seen_P))
    right_P = truth_P == guess_P

    def over(chosen_P: Tensor) -> Estimate | None:
        documents = None if document_P is None else document_P[chosen_P]
        return rate(right_P[chosen_P], documents, seed=seed) if chosen_P.any() else None

    return Recovery(
        rate(right_P, document_P, seed=seed),
        over(seen_P),
        rate(seen_P, document_P, seed=seed),
        None if content_V is None else over(content_V[truth_P]),
    )


def content_ids(public_ids: Tensor, vocabulary: int, *, share: float = 0.5) -> Tensor:
    """Which ids carry meaning: all but the most frequent ones that make up this share of public text. Bool [V]."""
    counts_V = torch.bincount(public_ids, minlength=vocabulary).double()
    order_V = counts_V.argsort(descending=True, stable=True)
    before_V = counts_V[order_V].cumsum(0) - counts_V[order_V]
    content_V = torch.empty(vocabulary, dtype=torch.bool)
    content_V[order_V] = before_V >= share * counts_V.sum()
    return content_V


def exact_match(
    right_P: Tensor, document_P: Tensor, lengths: Iterable[int] = (1, 2, 4, 8, 16, 32, 64), *, seed: int = 0
) -> dict[int, Estimate]:
    """For each length, the share of passages of so many tokens in a row that are right in every token.

    Passages overlap and lie within one document. Lengths that no document reaches are left out.

    Args:
        right_P: bool [P], places in the order of the text.
        document_P: the places' documents; those of one document stand together.
        lengths: in tokens.
        seed: of the resampling.
    """
    _same(len(right_P), len(document_P))
    found = {}
    for length in lengths:
        inside = (
            torch.tensor([False])
            if length > len(right_P)
            else document_P.unfold(0, length, 1).eq(document_P[: len(right_P) - length + 1, None]).all(1)
        )
        if inside.any():
            passages = right_P.unfold(0, length, 1).all(1)[inside]
            found[length] = rate(passages, document_P[: len(inside)][inside], seed=seed)
    return found


def rouge_l(truth: Sequence[Hashable], guess: Sequence[Hashable]) -> float:
    """F measure (beta 1) of the longest common subsequence of two sequences of tokens; 0 if one is empty."""
    longest = [0] * (len(guess) + 1)
    for one in truth:
        diagonal = 0
        for place, other in enumerate(guess, 1):
            diagonal, longest[place] = (
                longest[place],
                diagonal + 1 if one == other else max(longest[place], longest[place - 1]),
            )
    return 2 * longest[-1] / (len(truth) + len(guess)) if longest[-1] else 0.0


def bag_f1(truth: Iterable[Hashable], guess: Iterable[Hashable]) -> float:
    """F measure of two multisets of tokens; 0 if they share none."""
    true, guessed = Counter(truth), Counter(guess)
    shared = (true & guessed).total()
    return 2 * shared / (true.total() + guessed.total()) if shared else 0.0


def _need(count: int, what: str) -> None:
    if count == 0:
        raise AuditError(
            f"There is no {what} to measure on.",
            code="audit-nothing",
            fix="give at least one; an attack that was not made has no rate",
            why="a rate over nothing says nothing",
        )


def _same(*lengths: int) -> None:
    if len(set(lengths)) > 1:
        raise AuditError(
            f"Guesses, truth and documents have lengths {', '.join(map(str, lengths))}.",
            code="audit-lengths",
            fix="give all three in one order, with an entry for every place",
            why="a guess beside the truth of another place measures nothing",
        )
