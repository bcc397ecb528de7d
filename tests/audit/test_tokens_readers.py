"""Readers of single vectors against planted codes: what is there is read, and where there is nothing, the prior comes
out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coterie.audit.prior import Unigram
from coterie.audit.tokens.decoders import Gaussian, Nearest, Softmax, directions, guesses
from coterie.audit.tokens.link import Linker, pair_up, same_token
from coterie.audit.tokens.routes import Choices, Network, routed

CLASSES, WIDTH = 60, 24


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def tokens(count: int, generator: torch.Generator) -> Tensor:
    """Some are ten times as common as others; the last id never occurs."""
    weights = torch.linspace(1, 0.1, CLASSES)
    weights[-1] = 0
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def coded(token_P: Tensor, code_VD: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Rows that name their token, under noise that is 30 times as strong in one half of the directions."""
    loud = torch.where(torch.arange(WIDTH) % 2 == 0, 30.0, 1.0)
    return code_VD[token_P] + noise * loud * torch.randn(len(token_P), WIDTH, generator=generator)


def planted(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Unigram]:
    code_VD = torch.randn(CLASSES, WIDTH, generator=generator)
    token_P = tokens(4000, generator)
    return code_VD, token_P, coded(token_P, code_VD, 0.3, generator), Unigram.of(token_P, CLASSES)


def right(found: Tensor, truth: Tensor) -> float:
    return float((found == truth).float().mean())


def test_a_code_under_uneven_noise_is_read_as_well_as_the_best_reader_can(generator: torch.Generator) -> None:
    code_VD, token_P, rows_PD, unigram = planted(generator)
    asked = tokens(2000, generator)
    rows = coded(asked, code_VD, 0.3, generator)
    # The best reader knows code, noise and prior: the largest posterior of normal densities.
    loud = torch.where(torch.arange(WIDTH) % 2 == 0, 9.0, 0.3)
    distance = ((rows[:, None] - code_VD[None]) / loud).square().sum(2)
    best = right((unigram.log_V - distance / 2).argmax(1), asked)
    reader = Gaussian.fit(rows_PD, token_P, unigram.log_V)
    assert best > 0.97
    assert right(guesses(reader, rows)[0], asked) > best - 0.01
    softmax = Softmax.fit(reader, rows_PD, token_P, seed=0)
    assert right(guesses(softmax, rows)[0], asked) > best - 0.02
    assert right(Nearest(rows_PD, token_P).look_up(rows)[0], asked) < 0.5, "distance alone drowns in the loud half"


def test_posteriors_are_probabilities_that_hold_what_they_promise(generator: torch.Generator) -> None:
    code_VD, token_P, _, unigram = planted(generator)
    reader = Gaussian.fit(coded(token_P, code_VD, 1.2, generator), token_P, unigram.log_V)
    asked = tokens(3000, generator)
    log_RV = reader.log_posterior(coded(asked, code_VD, 1.2, generator))
    torch.testing.assert_close(log_RV.exp().sum(1), torch.ones(3000))
    sure, guess = log_RV.max(1)
    assert right(guess, asked) == pytest.approx(float(sure.exp().mean()), abs=0.05)
    assert 0.2 < right(guess, asked) < 0.95


def test_rows_that_say_nothing_give_the_prior_exactly(generator: torch.Generator) -> None:
    _, token_P, rows_PD, unigram = planted(generator)
    dealt_P = token_P[torch.randperm(len(token_P), generator=generator)]
    reader = Gaussian.fit(rows_PD, dealt_P, unigram.log_V)
    guess, _ = guesses(reader, rows_PD)
    assert right(guess, torch.full_like(guess, unigram.commonest)) > 0.97
    assert right(guess, token_P) == pytest.approx(
        right(token_P, torch.full_like(token_P, unigram.commonest)), abs=0.005
    )


def test_a_token_that_public_text_lacks_is_not_guessed_everywhere(generator: torch.Generator) -> None:
    code_VD, token_P, rows_PD, unigram = planted(generator)
    reader = Gaussian.fit(rows_PD, token_P, unigram.log_V)
    guess, _ = guesses(reader, rows_PD)
    assert not (guess == CLASSES - 1).any()
    far = torch.full((5,), CLASSES - 1)
    strange = 6 * code_VD[far]  # unlike every known token: then the one that was never seen is likeliest
    assert right(guesses(reader, strange)[0], far) == 1.0


def test_a_reader_follows_rows_that_drifted_by_their_confident_guesses(generator: torch.Generator) -> None:
    code_VD, token_P, rows_PD, unigram = planted(generator)
    reader = Gaussian.fit(rows_PD, token_P, unigram.log_V)
    turn = torch.linalg.matrix_exp(0.17 * torch.randn(WIDTH, WIDTH, generator=generator))
    asked = tokens(1500, generator)
    drifted = coded(asked, code_VD @ turn + 0.3, 0.3, generator)
    stale, followed = (right(guesses(one, drifted)[0], asked) for one in (reader, reader.adapted(drifted)))
    assert stale < 0.97
    assert 1 - followed < 0.7 * (1 - stale)
    taught = reader.taught(drifted[:700], asked[:700])
    assert 1 - right(guesses(taught, drifted[700:])[0], asked[700:]) < 0.7 * (1 - stale)


def test_following_rows_that_did_not_drift_costs_nothing(generator: torch.Generator) -> None:
    code_VD, token_P, rows_PD, unigram = planted(generator)
    reader = Gaussian.fit(rows_PD, token_P, unigram.log_V)
    asked = tokens(800, generator)
    rows = coded(asked, code_VD, 0.3, generator)
    stale, followed = (right(guesses(one, rows)[0], asked) for one in (reader, reader.adapted(rows)))
    assert followed > stale - 0.01
    few = reader.adapted(rows[:10])
    assert few is reader, "too few rows to learn from"


def test_a_dictionary_knows_the_very_vector(generator: torch.Generator) -> None:
    _, token_P, rows_PD, _ = planted(generator)
    found, apart = Nearest(rows_PD, token_P).look_up(torch.cat([rows_PD[7:9], torch.zeros(1, WIDTH)]))
    assert found[:2].tolist() == token_P[7:9].tolist()
    assert apart[:2].max() < 1e-2
    assert apart[2] > 0.5


def test_nobody_reads_nothing() -> None:
    reader = Gaussian.fit(torch.randn(50, 4), torch.arange(50) % 3, torch.zeros(3))
    assert [len(part) for part in guesses(reader, torch.empty(0, 4))] == [0, 0]
    assert [len(part) for part in Nearest(torch.ones(1, 4), torch.zeros(1)).look_up(torch.empty(0, 4))] == [0, 0]


def test_directions_forget_lengths() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert directions(rows).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


# ---- rows that belong together ----


def chain(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Rows and those that follow them: a follower shares a third of its variance with what it follows."""
    first = torch.randn(count, WIDTH, generator=generator)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))).Q
    return first, first @ mix * 0.6 + 0.8 * torch.randn(count, WIDTH, generator=generator) + 3


def test_shuffled_pairs_are_put_together_again(generator: torch.Generator) -> None:
    linker = Linker.fit(*chain(generator, 3000))
    first, second = chain(generator, 80)
    order = torch.randperm(80, generator=generator)
    partner = pair_up(linker.scores(first, second[order]))
    assert right(order[partner], torch.arange(80)) > 0.75
    assert len(set(partner[partner >= 0].tolist())) == int((partner >= 0).sum()), "each row is used once"


def test_scores_are_the_log_likelihood_ratio_of_jointly_normal_pairs(generator: torch.Generator) -> None:
    first = torch.randn(200_000, 1, generator=generator).double()
    second = 0.6 * first + 0.8 * torch.randn(200_000, 1, generator=generator)
    found = Linker.fit(first, second).scores(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    joint = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    alone = torch.distributions.Normal(0.0, 1.0)
    ratio = (
        joint.log_prob(torch.tensor([1.0, 0.5]))
        - alone.log_prob(torch.tensor(1.0))
        - alone.log_prob(torch.tensor(0.5))
    )
    assert found.item() == pytest.approx(ratio.item(), abs=0.02)


def test_unrelated_rows_are_not_linked(generator: torch.Generator) -> None:
    first, second = torch.randn(2, 3000, WIDTH, generator=generator)
    linker = Linker.fit(first, second)
    assert len(linker.correlation_C) == 0
    assert (pair_up(linker.scores(first[:50], second[:50])) == -1).all()


def test_two_posteriors_are_of_one_token_by_bayes() -> None:
    prior = torch.tensor([0.5, 0.25, 0.25])
    first, second = torch.tensor([[0.8, 0.1, 0.1]]), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    expected = [
        [0.8 * 0.7 / 0.5 + 0.1 * 0.2 / 0.25 + 0.1 * 0.1 / 0.25, 0.8 * 0.1 / 0.5 + 0.1 * 0.1 / 0.25 + 0.1 * 0.8 / 0.25]
    ]
    torch.testing.assert_close(same_token(first.log(), second.log(), prior.log()).exp(), torch.tensor(expected))


def test_a_pairing_obeys_what_is_allowed_and_leaves_bad_pairs_out() -> None:
    scores = torch.tensor([[5.0, 4.0], [4.5, -3.0]])
    assert pair_up(scores).tolist() == [1, 0]  # 4 + 4.5 beats 5 - 3
    assert pair_up(scores, allowed_AB=torch.tensor([[True, False], [True, True]])).tolist() == [0, -1]
    assert pair_up(torch.tensor([[-1.0]])).tolist() == [-1]


# ---- expert ids ----


def test_chosen_experts_tell_the_token_that_chooses_them(generator: torch.Generator) -> None:
    experts_VK = torch.stack([torch.arange(CLASSES) % 8, 8 + torch.arange(CLASSES) // 8], 1)  # all sets differ
    token_P, asked = tokens(3000, generator), tokens(400, generator)
    unigram = Unigram.of(token_P, CLASSES)
    known, received = (
        routed(experts_VK[of], torch.rand(len(of), 2, generator=generator) + 0.1, 16) for of in (token_P, asked)
    )
    assert right(Choices.fit(known, token_P, unigram.log_V).guess(received), asked) == 1.0
    assert right(Network.fit(known, token_P, unigram.log_V, seed=0, epochs=6, batch=64).guess(received), asked) > 0.95
    hosted = torch.arange(16) < 8  # a host that sees the first choice alone: eight sets, each of several tokens
    partly = Choices.fit(known * hosted, token_P, unigram.log_V).guess(received * hosted)
    commonest = torch.stack([torch.bincount(token_P[token_P % 8 == each]).argmax() for each in range(8)])
    assert partly.tolist() == commonest[asked % 8].tolist()


def test_experts_that_say_nothing_give_the_commonest_token(generator: torch.Generator) -> None:
    token_P = tokens(2000, generator).repeat(2)  # every token half the times with either expert
    unigram = Unigram.of(token_P, CLASSES)
    chosen = routed(torch.arange(2).repeat_interleave(2000)[:, None], torch.ones(4000, 1), 2)
    assert (Choices.fit(chosen, token_P, unigram.log_V).guess(chosen) == unigram.commonest).all()
    unseen = torch.ones(1, 2)
    assert Choices.fit(chosen, token_P, unigram.log_V).guess(unseen).item() == unigram.commonest


def test_routing_weights_stand_at_their_experts_and_no_expert_counts_for_none() -> None:
    found = routed(torch.tensor([[2, 0], [3, 1]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]), 3)
    assert found.tolist() == [[pytest.approx(0.3), 0, pytest.approx(0.7)], [0, pytest.approx(0.4), 0]]
