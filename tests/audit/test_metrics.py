"""Each metric against a value computed by hand, and each interval against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import optimize, stats

from coterie.audit import metrics
from coterie.audit.adversaries import DEFAULT, Adversary
from coterie.audit.metrics import Estimate, Scores
from coterie.errors import AuditError

Z = 1.959963984540054


def test_adversaries_are_named_from_the_weakest_to_the_strongest() -> None:
    assert [one.label for one in Adversary] == ["T0", "T1", "T2", "T3", "T4"]
    assert DEFAULT.label == "T2"
    assert len({one.sentence for one in Adversary}) == 5


# ---- intervals ----


@pytest.mark.parametrize("hits", [0, 7, 50])
def test_a_proportion_has_the_exact_interval(hits: int) -> None:
    found = metrics.proportion(hits, 50)
    # Clopper and Pearson: beta quantiles; without hits 1 - 0.025 ** (1 / n) in closed form.
    assert found.low == pytest.approx(0.0 if hits == 0 else stats.beta.ppf(0.025, hits, 51 - hits))
    assert found.high == pytest.approx(1.0 if hits == 50 else stats.beta.ppf(0.975, hits + 1, 50 - hits))
    assert (found.value, found.count) == (hits / 50, 50)
    if hits == 0:
        assert found.high == pytest.approx(1 - 0.025 ** (1 / 50))


def test_a_rate_over_like_documents_has_an_interval_over_documents() -> None:
    right_P = torch.arange(40).repeat_interleave(50) < 20  # 20 documents all right, 20 all wrong
    by_place = metrics.rate(right_P)
    by_document = metrics.rate(right_P, torch.arange(40).repeat_interleave(50))
    assert by_place.value == by_document.value == 0.5
    # The mean of 40 coin flips has standard error 0.079; that of 2,000 places 0.011.
    assert by_document.high - by_document.value == pytest.approx(1.96 * math.sqrt(0.25 / 40), rel=0.15)
    assert by_place.high - by_place.value == pytest.approx(1.96 * math.sqrt(0.25 / 2000), rel=0.05)
    assert by_document.count == 2000


def test_a_rate_that_every_document_shares_still_has_the_width_of_its_places() -> None:
    found = metrics.rate(torch.ones(40, dtype=torch.bool), torch.arange(4).repeat_interleave(10))
    assert found == Estimate(1.0, pytest.approx(0.025 ** (1 / 40)), 1.0, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize(("documents", "says"), [(1, False), (3, False), (4, True)])
def test_a_rate_on_too_few_documents_says_nothing_of_others(documents: int, says: bool) -> None:
    right_P = torch.arange(1200) % 10 == 0
    document_P = torch.arange(1200) % documents
    found, prior_P = metrics.rate(right_P, document_P), torch.zeros(1200, dtype=torch.bool)
    gain = metrics.advantage(right_P, prior_P, document_P)
    assert found.value == gain.value == 0.1
    assert ((found.low, found.high) != (0.0, 1.0)) is ((gain.low, gain.high) != (-1.0, 1.0)) is says


@pytest.mark.parametrize(("documents", "says"), [(1, False), (3, False), (4, True)])
def test_scores_of_too_few_documents_say_nothing_of_others(documents: int, says: bool) -> None:
    member, other = torch.arange(40.0) + 100, torch.arange(40.0)
    scores = Scores.of(member, other, torch.arange(40) % documents, torch.arange(40))
    found, rate = metrics.auc(scores), metrics.tpr_at(0.1, scores)
    assert rate is not None
    assert found.value == rate.value == 1.0
    assert (found.low > 0.5) is (rate.low > 0.5) is says
    assert metrics.auc(Scores.of(member[:3], other)).low > 0, "each score stands for itself"


def test_the_mean_of_a_few_measurements_has_student_s_interval() -> None:
    found = metrics.mean([0.2, 0.4, 0.4, 0.6, 0.9])
    # Mean 0.5, deviation sqrt(0.28 / 4), t(4) at 97.5 % = 2.776.
    assert found.value == pytest.approx(0.5)
    assert found.high - found.value == pytest.approx(2.776 * math.sqrt(0.28 / 4 / 5), rel=1e-3)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert metrics.mean([0.9, 0.9, 0.9]) == Estimate(pytest.approx(0.9), 0.0, 1.0, 3)  # type: ignore[arg-type]
    assert metrics.mean([0.0, 1.0, 0.0, 1.0]).low == 0.0


def test_documents_count_by_their_places() -> None:
    right_P = torch.tensor([1, 0, 0, 0, 1, 1]).bool()
    assert metrics.rate(right_P, torch.tensor([7, 7, 7, 7, 3, 3])).value == 0.5


@pytest.mark.parametrize("places", [120, 1000])
def test_an_advantage_without_any_disagreement_is_no_proof_of_none(places: int) -> None:
    same = torch.arange(places) % 6 == 0
    found = metrics.advantage(same, same.clone(), torch.arange(places) // 20)
    assert found.value == 0
    assert found.high == pytest.approx(Z**2 / (places + Z**2))  # Tango's interval in closed form
    assert found.low == pytest.approx(-(Z**2) / (places + Z**2))


@pytest.mark.parametrize(("gained", "lost", "total"), [(9, 4, 60), (1, 0, 44), (0, 6, 30), (30, 0, 30)])
def test_the_paired_interval_ends_where_the_score_test_rejects(gained: int, lost: int, total: int) -> None:
    both = total - gained - lost
    right = torch.tensor([True] * gained + [False] * lost + [True] * both)
    prior = torch.tensor([False] * gained + [True] * lost + [True] * both)
    found = metrics.advantage(right, prior)

    def score(difference: float) -> float:
        """The most likely shares under this difference by a numerical search, then the score."""

        def unlikely(only_prior: float) -> float:
            shares = (only_prior + difference, only_prior, 1 - difference - 2 * only_prior)
            return -sum(n * math.log(max(p, 1e-300)) for n, p in zip((gained, lost, both), shares, strict=True))

        bounds = (max(0.0, -difference), (1 - difference) / 2)
        q = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        variance = (2 * q + difference * (1 - difference)) / total
        return ((gained - lost) / total - difference) / math.sqrt(variance)

    assert found.value == pytest.approx((gained - lost) / total)
    assert score(found.low) == pytest.approx(Z, rel=1e-3)
    if found.high < 1:
        assert score(found.high) == pytest.approx(-Z, rel=1e-3)


def test_an_advantage_that_comes_from_one_document_is_as_wide_as_documents_are() -> None:
    document_P = torch.arange(10).repeat_interleave(100)
    right_P, prior_P = document_P == 0, torch.zeros(1000, dtype=torch.bool)
    assert metrics.advantage(right_P, prior_P).low > 0.08
    assert metrics.advantage(right_P, prior_P, document_P).low <= 0


# ---- scores ----


def test_auc_counts_pairs_and_half_of_ties() -> None:
    # pairs: (3>1, 3>2, 3>3 half), (2>1, 2=2 half, 2<3)
    assert metrics.auc(Scores.of([3.0, 2.0], [1.0, 2.0, 3.0])).value == pytest.approx((2.5 + 1.5) / 6)
    assert metrics.auc(Scores.of([0.0], [1.0])).value == 0.0


def test_auc_of_normal_scores_has_the_known_value_inside_its_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    member, other = torch.randn(2, 800, generator=generator)
    found = metrics.auc(Scores.of(member + 1, other))
    assert found.low < stats.norm.cdf(1 / math.sqrt(2)) < found.high
    assert found.high - found.low < 0.06
    assert found.count == 1600


def test_auc_of_few_separated_scores_is_not_certain() -> None:
    found = metrics.auc(Scores.of([1.0, 2.0, 3.0], [-1.0, -2.0, 0.0]))
    assert found.value == found.high == 1.0
    # Newcombe's interval at 1: 1 - t = z sqrt(t (1 - t) (1 + 2 (1 - t) / (2 - t) + 2 t / (1 + t)) / 9)
    t = found.low
    assert 1 - t == pytest.approx(Z * math.sqrt(t * (1 - t) * (1 + 2 * (1 - t) / (2 - t) + 2 * t / (1 + t)) / 9))
    assert t < 0.75


def test_auc_over_documents_is_less_certain_than_over_records() -> None:
    generator = torch.Generator().manual_seed(1)
    effect = torch.randn(20, generator=generator).repeat_interleave(40)
    scores = effect + 0.1 * torch.randn(800, generator=generator)
    documents = torch.arange(20).repeat_interleave(40)
    records = metrics.auc(Scores.of(scores[:400], scores[400:]))
    grouped = metrics.auc(Scores.of(scores[:400], scores[400:], documents[:400], documents[400:]))
    assert grouped.value == records.value
    assert grouped.high - grouped.low > 3 * (records.high - records.low)


def test_tpr_is_taken_where_no_more_others_pass_than_allowed() -> None:
    others = torch.arange(100.0)
    members = torch.tensor([99.5, 99.0, 98.5, 98.0, 50.0])
    found = metrics.tpr_at(0.01, Scores.of(members, others))  # one other may pass: thresholds above 98
    assert found is not None
    assert (found.value, found.count) == (3 / 5, 5)
    two = metrics.tpr_at(0.02, Scores.of(members, others))
    assert two is not None
    assert two.value == 4 / 5


def test_a_threshold_never_stands_between_equal_scores() -> None:
    found = metrics.tpr_at(0.01, Scores.of([1.0, 1.0], [1.0] * 5 + [0.0] * 95))
    assert found is not None
    assert found.value == 0.0


@pytest.mark.parametrize(("fpr", "fewest"), [(0.01, 100), (0.001, 1000), (0.1, 10)])
def test_a_rate_that_too_few_others_carry_is_not_given(fpr: float, fewest: int) -> None:
    assert metrics.fewest_others(fpr) == fewest
    members = torch.ones(2000)
    assert metrics.tpr_at(fpr, Scores.of(members, torch.zeros(fewest - 1))) is None
    assert metrics.tpr_at(fpr, Scores.of(members, torch.zeros(fewest))) is not None


def test_roc_goes_through_every_threshold() -> None:
    fpr, tpr = metrics.roc(Scores.of([3.0, 2.0], [1.0, 2.0]))
    assert list(zip(fpr.tolist(), tpr.tolist(), strict=True)) == [(0, 0), (0, 0.5), (0.5, 1), (1, 1)]
    area = torch.trapezoid(tpr, fpr)
    assert float(area) == pytest.approx(metrics.auc(Scores.of([3.0, 2.0], [1.0, 2.0])).value)


def test_scores_are_joined_by_id_and_misordered_members_do_not_matter() -> None:
    scores = {"a": 0.9, "b": 0.1, "c": 0.8, "d": 0.2}
    members = {"d": False, "c": True, "b": False, "a": True}
    assert metrics.auc(Scores.joined(scores, members)).value == 1.0
    assert metrics.auc(Scores.joined(scores, members, {"b": 1, "a": 0, "d": 1, "c": 0})).value == 1.0


@pytest.mark.parametrize("missing", ["scores", "members", "documents"])
def test_an_id_without_partner_fails(missing: str) -> None:
    tables: dict[str, dict] = {
        "scores": {"a": 1.0, "b": 0.0},
        "members": {"a": True, "b": False},
        "documents": {"a": 0, "b": 1},
    }
    del tables[missing]["b"]
    with pytest.raises(AuditError) as caught:
        Scores.joined(tables["scores"], tables["members"], tables["documents"])
    assert caught.value.code == "audit-unjoined"


@pytest.mark.parametrize(
    ("member", "other", "code"),
    [([], [1.0], "audit-nothing"), ([1.0], [], "audit-nothing"), ([math.nan], [1.0], "audit-score")],
)
def test_scores_that_measure_nothing_are_refused(member: list[float], other: list[float], code: str) -> None:
    with pytest.raises(AuditError) as caught:
        Scores.of(member, other)
    assert caught.value.code == code


# ---- recovered text ----


def test_recovery_counts_what_was_not_seen_as_missed() -> None:
    truth = torch.tensor([5, 6, 7, 8, 9, 5, 6, 7])
    guess = torch.tensor([5, 6, 0, 8, metrics.UNKNOWN, 5, metrics.UNKNOWN, metrics.UNKNOWN])
    seen = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()
    content = torch.zeros(10, dtype=torch.bool)
    content[[7, 8]] = True
    found = metrics.token_recovery(truth, guess, seen, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), content_V=content)
    assert found.all.value == 4 / 8
    assert found.seen is not None
    assert (found.seen.value, found.seen.count) == (4 / 6, 6)
    assert found.coverage.value == 6 / 8
    assert found.content is not None
    assert (found.content.value, found.content.count) == (1 / 3, 3)


def test_content_leaves_out_the_ids_that_make_up_half_of_public_text() -> None:
    public = torch.tensor([0] * 40 + [1] * 15 + [2] * 30 + [3] * 15)
    # 40 + 30 of 100 reach half: ids 0 and 2 are common; an id that never occurs carries meaning.
    assert metrics.content_ids(public, 5).tolist() == [False, True, False, True, True]


def test_exact_matches_lie_within_one_document_and_count_every_passage() -> None:
    right = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    document = torch.tensor([0, 0, 0, 1, 1, 1])
    found = metrics.exact_match(right, document, (1, 2, 3, 4))
    assert {length: (one.value, one.count) for length, one in found.items()} == {
        1: (5 / 6, 6),
        2: (3 / 4, 4),  # (1, 1), (1, 0) and twice (1, 1)
        3: (1 / 2, 2),
    }


@pytest.mark.parametrize(
    ("truth", "guess", "value"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        ("a b c d e", "b d", 2 * 2 / 7),
        ("a", "", 0.0),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(truth: str, guess: str, value: float) -> None:
    # The first two are Lin's own examples (2004), section 3.
    assert metrics.rouge_l(truth.split(), guess.split()) == pytest.approx(value)


def test_bag_f1_counts_multiples() -> None:
    assert metrics.bag_f1([1, 1, 2, 3], [1, 2, 2]) == pytest.approx(2 * 2 / 7)
    assert metrics.bag_f1([1], [2]) == metrics.bag_f1([], []) == 0.0


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(AuditError) as caught:
        metrics.rate(torch.ones(3, dtype=torch.bool), torch.zeros(2))
    assert caught.value.code == "audit-lengths"
    with pytest.raises(AuditError) as caught:
        metrics.proportion(4, 3)
    assert caught.value.code == "audit-counts"
