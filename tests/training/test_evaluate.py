"""Held-out loss is a mean over tokens, and intervals know a tie from a win."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from coterie.errors import DataError
from coterie.training.data.packing import pack
from coterie.training.evaluate import Evaluation, evaluate, paired_bootstrap


def evaluation(losses: torch.Tensor, tokens: torch.Tensor | None = None) -> Evaluation:
    return Evaluation(losses.double(), torch.full(losses.shape, 10) if tokens is None else tokens)


def test_loss_equals_a_mean_over_all_tokens_computed_by_hand(make_tiny: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny().train()
    sequences = pack([[5, 9, 11, 30], [7, 8], [4] * 9], sequence_length=6, packing="chunks", end_id=2)
    measured = evaluate(model, sequences, batch_size=2)
    model.eval()
    per_token = []
    with torch.no_grad():
        for row in range(len(sequences)):
            ids = sequences[row]["input_ids"]
            logits = model(input_ids=ids[None]).logits[0, :-1]
            per_token.append(functional.cross_entropy(logits, ids[1:], reduction="none"))
    assert measured.loss == pytest.approx(float(torch.cat(per_token).mean()), rel=1e-5)
    assert measured.tokens == sequences.predicted_tokens
    assert measured.perplexity == pytest.approx(float(torch.cat(per_token).mean().exp()), rel=1e-4)


def test_evaluation_leaves_the_model_as_it_was(make_tiny: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny().train()
    evaluate(model, pack([[5, 9, 11]], sequence_length=6, packing="chunks", end_id=2))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_small_but_steady_gain_is_no_tie_although_the_losses_overlap() -> None:
    generator = torch.Generator().manual_seed(1)
    base = 30 + 10 * torch.rand(200, generator=generator)
    better = base - 0.3 + 0.2 * torch.randn(200, generator=generator)
    difference = paired_bootstrap(evaluation(better), evaluation(base))
    assert not difference.is_tie
    assert difference.low < difference.mean < difference.high < 0
    assert difference.mean == pytest.approx(-0.03, abs=0.005)


def test_noise_without_gain_is_a_tie() -> None:
    generator = torch.Generator().manual_seed(2)
    base = 30 + 10 * torch.rand(200, generator=generator)
    same = base + 0.2 * torch.randn(200, generator=generator)
    assert paired_bootstrap(evaluation(same), evaluation(base)).is_tie


def test_the_interval_has_the_width_that_theory_gives() -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(400, generator=generator)
    difference = paired_bootstrap(evaluation(30 + noise), evaluation(torch.full((400,), 30.0)), resamples=4000)
    expected = 2 * 1.96 * float(noise.std()) / 400**0.5 / 10
    assert difference.high - difference.low == pytest.approx(expected, rel=0.1)


def test_evaluations_of_different_text_are_not_compared() -> None:
    with pytest.raises(DataError, match="cover different text"):
        paired_bootstrap(evaluation(torch.ones(4)), evaluation(torch.ones(4), torch.tensor([1, 2, 3, 4])))
    with pytest.raises(DataError, match="cover different text"):
        paired_bootstrap(evaluation(torch.ones(4)), evaluation(torch.ones(5)))


def test_saved_losses_are_read_back(tmp_path: Path) -> None:
    before = evaluation(torch.rand(7), torch.arange(1, 8))
    before.save(tmp_path / "e.safetensors")
    after = Evaluation.load(tmp_path / "e.safetensors")
    assert torch.equal(before.loss_S, after.loss_S)
    assert torch.equal(before.tokens_S, after.tokens_S)
    with pytest.raises(DataError, match="no evaluation"):
        Evaluation.load(tmp_path / "none.safetensors")
