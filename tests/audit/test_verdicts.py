"""What figures amount to: nothing is green unless the instruments work."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from coterie.audit.adversaries import Adversary
from coterie.audit.findings import NO_COINS, Channel, Finding, Outcome, RunKind, Unit
from coterie.audit.metrics import Estimate, Scores, auc
from coterie.audit.verdicts import best, controls, failed, headline, overall, verdicts
from helpers.synthetic_findings import estimate, finding, findings, member, noised, private, tokens, working


def judged(part: RunKind, *some: Finding, measured: object = None, **budget: float | None) -> tuple[Outcome, str]:
    found = verdicts(part, some, measured or working(), private(**budget), premises=True)  # type: ignore[arg-type]
    default = next(verdict for verdict in found if verdict.adversary is Adversary.HOST_PUBLIC)
    return default.outcome, default.sentence


@pytest.mark.parametrize(
    ("positive", "negative", "prior", "passed"),
    [
        (0.9601, 0.15, 0.15, True),
        (0.9599, 0.15, 0.15, False),
        (1.0, 0.1649, 0.15, True),
        (1.0, 0.1651, 0.15, False),
        (1.0, 0.1349, 0.15, False),
        (1.0, 0.1351, 0.15, True),
    ],
)
def test_controls_pass_by_their_intervals_at_95_percent_and_within_two_points(
    positive: float, negative: float, prior: float, passed: bool
) -> None:
    assert working(positive, negative, prior).passed is passed
    assert bool(failed(working(positive, negative, prior))) is not passed


def test_a_negative_control_on_too_few_tokens_carries_nothing() -> None:
    few = working(negative=0.15, prior=0.15, half=0.03)
    assert not few.passed
    assert "0.0 points from the prior, by its interval as many as 3.0" in failed(few)
    assert judged(RunKind.EXPERTS_DP, *noised(), measured=few)[0] is Outcome.UNKNOWN


@pytest.mark.parametrize("absent", ["positive", "negative", "prior", "gap"])
def test_a_control_that_was_not_measured_fails_with_its_reason(absent: str) -> None:
    given: dict[str, Estimate | None] = {
        "positive": estimate(1.0),
        "negative": estimate(0.15),
        "prior": estimate(0.15),
        "gap": Estimate(0.0, -0.01, 0.01, 1000),
        absent: None,
    }
    found = controls(**given, reasons={absent: "no public text"})
    assert not found.passed
    assert "no public text" in failed(found)
    assert found.reasons == {absent: "no public text"}


def test_a_budget_holds_when_every_gain_is_within_two_points() -> None:
    outcome, words = judged(RunKind.EXPERTS_DP, *noised(0.015))
    assert outcome is Outcome.HELD
    assert "within 2 points" in words
    assert "epsilon 8 stands" in words


def test_too_few_places_are_no_verdict() -> None:
    outcome, words = judged(RunKind.EXPERTS_DP, *noised(0.05))
    assert outcome is Outcome.UNKNOWN
    assert '"within 5 points of it", not "within 2"' in words


def test_too_few_places_for_text_hide_no_verdict_on_membership() -> None:
    reading, in_lot = noised(0.05)
    words = judged(RunKind.EXPERTS_DP, reading, in_lot)[1]
    assert "told no better than claimed" in words
    assert in_lot.sentence in words
    wide = in_lot.model_copy(update={"value": Estimate(0.58, 0.4, 0.76, 40)})
    assert "than claimed" not in judged(RunKind.EXPERTS_DP, reading, wide)[1]
    for some, said in (((reading, in_lot), True), ((reading, wide), False)):
        found = verdicts(RunKind.EXPERTS_DP, some, working(), private(), premises=True)
        (line,) = headline(found, {RunKind.EXPERTS_DP: list(some)}, private())
        assert "no attack read more than a language model guesses, on too few places for a verdict" in line
        assert ("told no better than claimed" in line) is said


def test_reading_a_little_is_not_called_reading_nothing() -> None:
    told = {"unit": Unit.PLACES, "channel": Channel.RELEASES}
    read = finding(0.2, 0.02, 0.17, gain=Estimate(0.03, 0.005, 0.055, 900), **told).model_copy(
        update={"prior": Estimate(0.17, 0.165, 0.175, 900)}
    )
    found = verdicts(RunKind.EXPERTS_DP, [read], working(), private(), premises=True)
    assert "read a little more" in found[0].sentence
    assert "no attack read" not in headline(found, {RunKind.EXPERTS_DP: [read]}, private())[0]


@pytest.mark.parametrize("measured", [working(positive=0.6), working(negative=0.4)])
def test_without_working_instruments_nothing_holds(measured: object) -> None:
    outcome, words = judged(RunKind.EXPERTS_DP, *noised(0.015), measured=measured)
    assert outcome is Outcome.UNKNOWN
    assert "not shown to work" in words


def test_text_read_from_noised_sums_is_an_alarm_even_when_the_instruments_fail() -> None:
    told = {"unit": Unit.PLACES, "channel": Channel.RELEASES, "sentence": "40 % of places"}
    read = finding(0.4, 0.05, 0.17, gain=Estimate(0.23, 0.2, 0.26, 900), **told)
    assert judged(RunKind.EXPERTS_DP, read, measured=working(positive=0.1)) == (
        Outcome.ALARM,
        "Text was read from noised sums: 40 % of places",
    )


def test_a_reading_within_two_points_by_its_interval_is_no_alarm() -> None:
    told = {"unit": Unit.PLACES, "channel": Channel.RELEASES}
    read = finding(0.2, 0.02, 0.17, gain=Estimate(0.03, 0.005, 0.055, 900), **told)  # low end within two points
    assert judged(RunKind.EXPERTS_DP, read)[0] is Outcome.UNKNOWN


def test_a_bound_on_epsilon_at_95_percent_raises_no_alarm() -> None:
    assert judged(RunKind.EXPERTS_DP, *noised(), epsilon_lower=8.01)[0] is Outcome.HELD


def test_a_claim_stands_only_where_premises_and_membership_were_measured() -> None:
    reading, in_lot = noised()
    for some, premises in (((reading, in_lot), False), ((reading,), True)):
        found = verdicts(RunKind.EXPERTS_DP, some, working(), private(), premises=premises)
        assert found[0].outcome is Outcome.HELD
        assert "stands" not in found[0].sentence
        assert "no verdict on epsilon 8" in found[0].sentence
    wide = in_lot.model_copy(update={"value": Estimate(0.58, 0.4, 0.76, 40)})
    assert "stands" not in judged(RunKind.EXPERTS_DP, reading, wide)[1]
    assert "stands" in judged(RunKind.EXPERTS_DP, reading, in_lot)[1]


def test_membership_is_measured_against_what_the_claim_allows_not_against_a_half() -> None:
    assert judged(RunKind.EXPERTS_DP, *noised(), member(0.76, 2.0, allowed=0.741))[0] is Outcome.HELD  # 0.73 to 0.79
    outcome, words = judged(RunKind.EXPERTS_DP, *noised(), member(0.85, 2.0, allowed=0.741))
    assert outcome is Outcome.ALARM
    assert "than the claim allows (AUC 0.74)" in words


def test_every_test_of_membership_has_its_own_limit() -> None:
    """A lot without the draw allows more than the run with it; a document of several records is promised nothing."""
    assert judged(RunKind.EXPERTS_DP, *noised(), member(0.85, 2.0, allowed=0.86))[0] is Outcome.HELD
    assert judged(RunKind.EXPERTS_DP, *noised(), member(0.95, 2.0))[0] is Outcome.HELD
    small, large = member(0.7, 2.0, allowed=0.6), member(0.85, 2.0, allowed=0.86)
    assert judged(RunKind.EXPERTS_DP, *noised(), small, large)[0] is Outcome.ALARM, (
        "not only the largest is looked at"
    )


def test_honest_runs_raise_an_alarm_once_in_a_thousand_however_many_looks() -> None:
    """Gaussian scores whose AUC is just the allowed one; 95 % would be wrong in 1 of 8 runs of 5 looks."""
    allowed, looks, runs = 0.76, 5, 60
    shift = math.sqrt(2) * NormalDist().inv_cdf(allowed)
    generator = torch.Generator().manual_seed(2)
    above = 0
    for _ in range(runs):
        values = [
            auc(Scores.of(torch.randn(60, generator=generator) + shift, torch.randn(60, generator=generator)))
            for _ in range(looks)
        ]
        above += any(value.low > allowed for value in values)
        some = [member(0.5, 1.0, allowed=allowed).model_copy(update={"value": value}) for value in values]
        assert judged(RunKind.EXPERTS_DP, *some)[0] is not Outcome.ALARM
    assert above > 2, "else nothing was tried"


def test_what_is_far_above_the_allowed_is_an_alarm_from_perfect_scores_too() -> None:
    perfect = auc(Scores.of(torch.arange(60.0) + 100, torch.arange(60.0)))
    some = [member(0.5, 1.0, allowed=0.76).model_copy(update={"value": perfect})]
    assert judged(RunKind.EXPERTS_DP, *some)[0] is Outcome.ALARM


def test_without_a_promise_several_attacks_share_the_error_of_one() -> None:
    once = member(0.533, 1.0)  # 0.503 to 0.563
    assert judged(RunKind.EXPERTS, once)[0] is Outcome.OPEN
    assert judged(RunKind.EXPERTS, *[once] * 6)[0] is Outcome.UNKNOWN
    assert judged(RunKind.EXPERTS, *[once] * 6, member(0.56, 1.0))[0] is Outcome.OPEN


def test_membership_alone_holds_only_where_its_whole_interval_is_allowed() -> None:
    assert judged(RunKind.ALONE, member(0.7, 1.5, allowed=0.741))[0] is Outcome.HELD  # up to 0.73
    outcome, words = judged(RunKind.ALONE, member(0.72, 1.5, allowed=0.741))  # up to 0.75
    assert outcome is Outcome.UNKNOWN
    assert "Too few records" in words
    assert judged(RunKind.ALONE, member(0.6, 1.5))[0] is Outcome.UNKNOWN, "of a group nothing is promised"


def test_an_alarm_of_the_epsilon_audit_counts_against_every_adversary() -> None:
    some = (*noised(), member(0.58, 1.4, adversary=Adversary.ALL_HOSTS))
    found = verdicts(RunKind.EXPERTS_DP, some, working(), private(), ["Noise is half of what is claimed."])
    assert {verdict.outcome for verdict in found} == {Outcome.ALARM}
    assert {verdict.sentence for verdict in found} == {"Noise is half of what is claimed."}


def test_reading_what_nothing_defends_is_a_leak_and_no_alarm() -> None:
    assert judged(RunKind.TOKENS, *tokens()) == (Outcome.OPEN, "98.1 % of all tokens were read")
    assert judged(RunKind.EXPERTS, member(0.9, 3.0))[0] is Outcome.OPEN


def test_without_a_promise_nothing_read_is_not_called_held() -> None:
    outcome, words = judged(RunKind.TOKENS, finding(0.17, prior=0.17))
    assert outcome is Outcome.UNKNOWN
    assert "nothing promises" in words


def test_an_attack_without_a_figure_says_why() -> None:
    nothing = finding(None, sentence="too few places", prior=None)
    assert judged(RunKind.EXPERTS_DP, nothing) == (Outcome.UNKNOWN, "Nothing can be concluded: too few places.")


@pytest.mark.parametrize("part", [RunKind.EXPERTS, RunKind.EXPERTS_DP])
def test_what_was_not_attacked_is_not_said_to_have_withstood(part: RunKind) -> None:
    missing = controls(None, None, None, None, dict.fromkeys(("positive", "negative", "prior", "gap"), "no text"))
    nothing = finding(None, sentence="no transcript", prior=None)
    assert judged(part, nothing, measured=missing) == (
        Outcome.UNKNOWN,
        "Nothing can be concluded: too few places.",
    )
    assert failed(missing).count("no text") == 1


def test_a_stronger_adversary_plays_the_attacks_of_weaker_ones_and_not_the_other_way() -> None:
    host, everybody = finding(0.5, name="host"), finding(0.9, name="all", adversary=Adversary.ALL_HOSTS)
    domain = finding(0.7, name="domain", adversary=Adversary.HOST_DOMAIN)
    some = [host, everybody, domain]
    names = {a: best(some, a, [Unit.TOKENS]) for a in Adversary}
    assert {a: found and found.name for a, found in names.items()} == {
        Adversary.NETWORK: None,
        Adversary.HOST: None,
        Adversary.HOST_PUBLIC: "host",
        Adversary.HOST_DOMAIN: "domain",
        Adversary.ALL_HOSTS: "all",
    }


def test_an_alarm_wins_and_silence_is_inconclusive() -> None:
    open_ = verdicts(RunKind.TOKENS, tokens(), working(), private())
    alarm = verdicts(RunKind.EXPERTS_DP, noised(), working(), private(), ["Noise is half of what is claimed."])
    unknown = verdicts(RunKind.EXPERTS_DP, noised(0.1), working(), private())
    assert overall([*open_, *alarm, *unknown]) is Outcome.ALARM
    assert overall([*unknown, *open_]) is Outcome.OPEN
    assert overall(unknown) is Outcome.UNKNOWN
    assert overall([]) is Outcome.UNKNOWN


def test_the_headline_has_the_worst_of_every_part() -> None:
    assert findings().headline == (
        "`tokens`: one other party reads 98.1 % of all tokens.",
        "`experts` without a budget: one other party ranks 28.0 % of next tokens first in the sum of 16 records.",
        "`experts` within epsilon 8: nothing was read beyond a language model's guess.",
        "Training alone: whether a known record was used is told no better than claimed.",
    )
    budget = private()
    alarm = verdicts(RunKind.EXPERTS_DP, noised(), working(), budget, ["Noise is half of what is claimed."])
    assert headline(alarm, {RunKind.EXPERTS_DP: noised()}, budget) == (
        "`experts` within epsilon 8: ALARM: something promised is contradicted.",
    )


def test_the_headline_names_who_is_stronger_than_all_that_were_judged() -> None:
    unmade = finding(None, adversary=Adversary.ALL_HOSTS, reason="a recording is missing")
    some = [*noised(0.015), unmade]
    found = verdicts(RunKind.EXPERTS_DP, some, working(), private())
    assert {v.adversary: v.outcome for v in found}[Adversary.ALL_HOSTS] is Outcome.UNKNOWN
    assert headline(found, {RunKind.EXPERTS_DP: some}, private()) == (
        "`experts` within epsilon 8: nothing was read beyond a language model's guess. "
        "Of T4 nothing can be concluded.",
    )


def test_an_adversarys_own_attack_stands_before_one_that_it_can_play_on_larger_sums() -> None:
    """Under masks one host opens larger sums than all of them together."""
    one = finding(0.22, prior=0.1, lot=32, sentence="Of two parties.")
    every = finding(0.43, prior=0.1, lot=16, sentence="Of one.", adversary=Adversary.ALL_HOSTS)
    found = verdicts(RunKind.EXPERTS, [one, every], working(), private())
    assert {v.adversary: v.sentence for v in found} == {
        Adversary.HOST_PUBLIC: "Of two parties.",
        Adversary.ALL_HOSTS: "Of one.",
    }


def test_a_simulated_sum_stands_for_the_run_only_where_nothing_was_read_from_its_own_and_is_called_so() -> None:
    made_up = finding(0.9, prior=0.1, lot=8, unit=Unit.PLACES, simulated=True)
    own = finding(0.4, 0.2, 0.25, lot=32, unit=Unit.PLACES, gain=Estimate(0.15, 0.01, 0.3, 100))
    for some, told in (
        ([made_up], "ranks 90.0 % of next tokens first in a simulated sum of 8 records"),
        ([made_up, own], "ranks 40.0 % of next tokens first in the sum of 32 records"),
    ):
        judged_ = verdicts(RunKind.EXPERTS, some, working(), private())
        (line,) = headline(judged_, {RunKind.EXPERTS: some}, private())
        assert told in line


def test_sums_that_the_run_made_stand_before_simulated_ones_of_a_stronger_adversary() -> None:
    told = {"prior": 0.1, "unit": Unit.PLACES}
    some = [
        finding(0.95, lot=1, simulated=True, adversary=Adversary.ALL_HOSTS, sentence="Simulated.", **told),
        finding(0.105, lot=16, adversary=Adversary.ALL_HOSTS, gain=Estimate(0.005, -0.01, 0.02, 2000), **told),
        finding(0.5, lot=32, sentence="Made.", **told),
    ]
    found = {v.adversary: v.sentence for v in verdicts(RunKind.EXPERTS, some, working(), private())}
    assert found[Adversary.ALL_HOSTS] == "Made."


@pytest.mark.parametrize(("read", "outcome"), [(0.6, Outcome.OPEN), (0.1, Outcome.UNKNOWN)])
def test_whom_the_claim_does_not_cover_contradicts_nothing_and_lets_no_claim_stand(
    read: float, outcome: Outcome
) -> None:
    beyond = {Adversary.ALL_HOSTS: "Noise is shared: the claim is against any 1."}
    gain = Estimate(read - 0.1, read - 0.11, read - 0.09, 4000)
    some = [finding(read, 0.001, 0.1, gain=gain, adversary=Adversary.ALL_HOSTS)]
    (found,) = verdicts(RunKind.EXPERTS_DP, some, working(), private(), premises=True, unpromised=beyond)
    assert found.outcome is outcome
    assert "the claim is against any 1" in found.sentence
    few = [finding(0.1, 0.001, 0.1, gain=Estimate(0.0, -0.3, 0.3, 8), adversary=Adversary.ALL_HOSTS)]
    (open_,) = verdicts(RunKind.EXPERTS_DP, few, working(), private(), premises=True, unpromised=beyond)
    assert "the claim is against any 1" in open_.sentence
    (covered,) = verdicts(RunKind.EXPERTS_DP, some, working(), private(), premises=True)
    assert covered.outcome is (Outcome.ALARM if outcome is Outcome.OPEN else Outcome.HELD)


MASKED = {"value": None, "prior": None, "adversary": Adversary.ALL_HOSTS, "reason": "masks hide what it opens"}


def against_all(*some: Finding) -> tuple[Outcome, str]:
    found = verdicts(RunKind.EXPERTS_DP, some, working(), private(), premises=True)
    return next((v.outcome, v.sentence) for v in found if v.adversary is Adversary.ALL_HOSTS)


def of_all(*some: Finding) -> list[Finding]:
    """The same findings, as those of the coalition."""
    return [each.model_copy(update={"adversary": Adversary.ALL_HOSTS}) for each in some]


@pytest.mark.parametrize("reached", [(), (Unit.NOISE,), (Unit.AUC,), (Unit.AUC, Unit.NOISE)])
def test_what_a_weaker_adversary_could_not_read_says_nothing_of_a_stronger_one_whose_attack_was_not_made(
    reached: tuple[Unit, ...],
) -> None:
    reading, in_lot = noised()
    share = finding(1.0, prior=None, unit=Unit.NOISE, channel=Channel.RELEASES)
    own = [
        of_all(each)[0] if each.unit in reached else each.model_copy(update=MASKED)
        for each in (reading, in_lot, share)
    ]
    outcome, words = against_all(reading, in_lot, share, *own)
    assert outcome is Outcome.UNKNOWN
    assert words == "Nothing can be concluded: masks hide what it opens."
    assert judged(RunKind.EXPERTS_DP, reading, in_lot, share, *own)[0] is Outcome.HELD


def test_a_claim_stands_against_all_only_by_what_all_were_measured_to_tell_of_members() -> None:
    reading, in_lot = noised()
    words = against_all(reading, in_lot, *of_all(reading), in_lot.model_copy(update=MASKED))[1]
    assert "membership was not shown to stay within what the claim allows" in words
    wide = reading.model_copy(update={"gain": Estimate(0.001, -0.05, 0.05, 2000)})
    few = against_all(reading, in_lot, *of_all(wide), in_lot.model_copy(update=MASKED))[1]
    assert "than claimed" not in few
    assert "stands" in against_all(reading, in_lot, *of_all(reading, in_lot))[1]
    by_person = in_lot.model_copy(update=MASKED | {"reason": NO_COINS})
    assert "stands" in against_all(reading, in_lot, *of_all(reading), by_person)[1]


def test_an_alarm_of_a_weaker_adversary_counts_for_a_stronger_one_whose_attack_was_not_made() -> None:
    reading, in_lot = noised()
    beyond = in_lot.model_copy(update={"value": Estimate(0.95, 0.93, 0.97, 900)})
    own = [each.model_copy(update=MASKED) for each in (reading, in_lot)]
    assert against_all(reading, beyond, *own)[0] is Outcome.ALARM


@pytest.mark.parametrize(("share", "alarm"), [(0.5, True), (0.97, True), (1.0, False), (1.4, False)])
def test_recorded_sums_with_less_noise_than_claimed_are_an_alarm(share: float, alarm: bool) -> None:
    seen = finding(share, prior=None, unit=Unit.NOISE, channel=Channel.RELEASES).model_copy(
        update={"value": Estimate(share, 0.999 * share, 1.001 * share, 10**6)}
    )
    outcome, sentence = judged(RunKind.EXPERTS_DP, *noised(), seen)
    assert (outcome is Outcome.ALARM) is alarm
    assert ("Less noise than claimed" in sentence) is alarm
