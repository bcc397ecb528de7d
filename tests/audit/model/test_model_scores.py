"""Each membership score against values worked out by hand, and one pass over many records against one at a time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.audit.metrics import Scores, auc
from coterie.audit.model import scoring
from coterie.audit.model.membership import corrected
from coterie.audit.model.scoring import TokenScores, score_tokens, token_statistics
from coterie.audit.model.signals import Population, lowest_mean, mean_loss, rmia, zlib_ratio

MakeTiny = Callable[..., PreTrainedModel]
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16], [20, 21, 22, 23, 24], [9, 8, 7, 6, 5, 4, 3, 2, 1]]


def of(log_p: list[list[float]]) -> TokenScores:
    values = torch.tensor([value for sequence in log_p for value in sequence])
    starts = torch.tensor([0, *(len(sequence) for sequence in log_p)]).cumsum(0)
    return TokenScores(values, values, values > -0.1, starts)


def test_a_token_is_scored_by_its_prediction() -> None:
    # p = 1/2, 1/4, 1/8, 1/8: in units of ln 2 the mean of log p is -1.75, of its square 3.75, so its spread is
    # sqrt(3.75 - 1.75^2) = 0.829156.
    logits_PV = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().expand(3, -1) + torch.tensor([[0.0], [7.0], [-3.0]])
    log_p_P, surprise_P, first_P = token_statistics(logits_PV, torch.tensor([0, 1, 3]))
    assert log_p_P.tolist() == pytest.approx([-math.log(2), -2 * math.log(2), -3 * math.log(2)], rel=1e-5)
    assert surprise_P.tolist() == pytest.approx([0.75 / 0.829156, -0.25 / 0.829156, -1.25 / 0.829156], rel=1e-4)
    assert first_P.tolist() == [True, False, False]


def test_a_prediction_without_doubt_or_without_preference_has_a_finite_score() -> None:
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0]])
    log_p_P, surprise_P, _ = token_statistics(certain, torch.tensor([0, 2]))
    assert log_p_P.tolist() == pytest.approx([0.0, -math.log(3)])
    assert surprise_P.abs().max() < 0.5


def test_min_k_is_the_mean_of_the_lowest_fifth_and_of_one_token_at_least() -> None:
    scores = of([[-1.0, -9.0, -2.0, -3.0, -7.0, -1.0, -1.0, -1.0, -1.0, -1.0], [-4.0, -2.0]])
    assert lowest_mean(scores.log_p_P, scores).tolist() == [-8.0, -4.0]
    assert lowest_mean(scores.log_p_P, scores, 0.3).tolist() == pytest.approx([-19 / 3, -4.0])
    assert mean_loss(scores).tolist() == [2.7, 3.0]


def test_zlib_divides_by_the_compressed_length() -> None:
    texts = [b"a" * 200, b"the quick brown fox"]
    found = zlib_ratio(torch.tensor([2.0, 3.0], dtype=torch.float64), texts)
    assert found.tolist() == [-2.0 / len(zlib.compress(texts[0])), -3.0 / len(zlib.compress(texts[1]))]


def test_offline_rmia_counts_the_population_below_a_record() -> None:
    def loss(*chances: float) -> torch.Tensor:
        return -torch.tensor(chances, dtype=torch.float64).log()

    # Two references at 0.25 and 0.75 give 0.5; a = 0.3 makes of it (1.3 * 0.5 + 0.7) / 2 = 0.675, and of a model at
    # 0.5 the ratio 0.7407. The population's references stand at 1, so its ratios are its own chances.
    references_RS = torch.stack([loss(0.25), loss(0.75)])
    population = Population(loss(0.5, 0.7, 0.75, 0.9), torch.stack([loss(1, 1, 1, 1)] * 2))
    assert rmia(loss(0.5), references_RS, population).tolist() == [0.5]
    assert rmia(loss(0.5), references_RS, population, gamma=1.1).tolist() == [0.25]
    assert rmia(loss(0.65), references_RS, population).tolist() == [1.0]
    # Without the pull the ratio is 0.5 / 0.75 = 0.667.
    assert rmia(loss(0.5), references_RS, population, pull=0.0).tolist() == [0.25]


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral"])
def test_records_scored_together_are_what_each_is_alone(
    make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = make_tiny(family, seed=3).train()
    whole = score_tokens(model, SEQUENCES)
    assert model.training
    monkeypatch.setattr(scoring, "_TOKENS", 10)
    parts = score_tokens(model, SEQUENCES)
    model.eval()
    for row, ids in enumerate(SEQUENCES):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        expected = -F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        for found in (whole, parts):
            assert torch.allclose(found.log_p_P[found.of(row)], expected, atol=1e-5)
            assert found.first_P[found.of(row)].tolist() == (logits.argmax(-1) == torch.tensor(ids[1:])).tolist()
        assert whole.loss_S()[row] == pytest.approx(-float(expected.sum()), abs=1e-4)


def test_a_model_that_is_its_own_control_is_left_with_one_half() -> None:
    generator = torch.Generator().manual_seed(0)
    member_M, other_N = torch.randn(60, generator=generator) + 1, torch.randn(50, generator=generator)
    documents = (torch.arange(60) // 3, torch.arange(50) // 2)
    skewed, fair = Scores.of(member_M, other_N, *documents), Scores.of(member_M - 1, other_N, *documents)
    own = corrected(skewed, [skewed], seed=0)
    assert (own.value, own.low, own.high) == (0.5, 0.5, 0.5)
    found = corrected(skewed, [fair], seed=0)
    assert found.value == pytest.approx(0.5 + auc(skewed).value - auc(fair).value)
    assert 0.5 < found.low < found.value < found.high <= 1
