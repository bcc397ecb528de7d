"""Label words: a softmax over the classes' words at the answer, bounded per record as any loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coterie import dp
from coterie.config import ModelSpec
from coterie.dp.label_words import LabelWords
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import tiny_model

WORDS = LabelWords((5, 9, 7))
BERT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def causal_batch() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 4, 6, 9, 0, 0], [8, 2, 3, 4, 11, 5], [3, 7, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]])
    labels = torch.full_like(ids, -100)
    for row, place in enumerate((3, 5, 1)):
        labels[row, place] = ids[row, place]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_hand(model: nn.Module, batch: dict[str, Tensor], shift: int) -> Tensor:
    """Each record alone, unpadded."""
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        place = int((labels != -100).nonzero()[0])
        logits = model(input_ids=ids[mask == 1][None], attention_mask=mask[mask == 1][None]).logits[0, place - shift]
        chances = logits[list(WORDS.ids)].softmax(0)
        found.append(-chances[WORDS.ids.index(int(labels[place]))].log())
    return torch.stack(found)


@pytest.fixture(params=["causal", "masked"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor], int]:
    batch = causal_batch()
    if request.param == "causal":
        return tiny_model("olmoe", vocab_size=32, seed=1).eval(), batch, 1
    batch["input_ids"] = batch["input_ids"].where(batch["labels"] == -100, 1)  # 1 masks
    return build_model(ModelSpec(family="bert_moe", config=BERT), seed=1).eval(), batch, 0


def test_the_loss_is_a_softmax_over_the_words_at_the_answer(case: tuple[nn.Module, dict[str, Tensor], int]) -> None:
    model, batch, shift = case
    with torch.no_grad():
        torch.testing.assert_close(WORDS.loss(model, batch), by_hand(model, batch, shift), rtol=1e-5, atol=1e-6)
        scores = WORDS.scores(model, batch)
    assert scores.shape == (3, 3)
    assert WORDS.classes(batch).tolist() == [1, 0, 2]


def test_each_records_gradient_is_that_of_a_batch_of_one(case: tuple[nn.Module, dict[str, Tensor], int]) -> None:
    model, batch, shift = case
    norms = dp.per_sample_norms(model, batch, WORDS.loss)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        model.zero_grad()
        by_hand(model, one, shift).sum().backward()
        squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
        assert float(norms[row]) == pytest.approx(squares**0.5, rel=1e-5)


def test_a_record_without_an_answer_costs_nothing_and_other_words_count_as_one_more() -> None:
    model, batch = tiny_model("olmoe", vocab_size=32, seed=1).eval(), causal_batch()
    batch["labels"][0] = -100
    batch["labels"][1, 5] = 12
    with torch.no_grad():
        losses = WORDS.loss(model, batch)
        logits = model(input_ids=batch["input_ids"][1:2]).logits[0, 4]
    assert losses[0] == 0
    expected = logits[[5, 9, 7, 12]].logsumexp(0) - logits[12]
    assert float(losses[1]) == pytest.approx(float(expected), rel=1e-5)
    assert WORDS.classes(batch).tolist() == [-1, -1, 2]
