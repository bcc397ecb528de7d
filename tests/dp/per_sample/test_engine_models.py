"""Invariant 1 over models: every family, dense models, heads, adapters. The reference is a batch of one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeForSequenceClassification,
)

from coterie.dp.clipping import Flat
from coterie.dp.per_sample import gram_kernel
from coterie.dp.per_sample.engine import Engine
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import tiny_config, tiny_model
from coterie.models.zoo.upcycle import upcycle
from helpers.engine_reference import clipped, distance, gradients, gradients_in_batch, norms, only, token_batch
from helpers.switch_models import small, switch

CLIP = 0.5


def assert_exact(model: nn.Module, batch: dict[str, Tensor], norm_error: float = 1e-5) -> None:
    expected = gradients(model, batch)
    compared = False
    # The compiled pass over segments, where numba is installed, and torch's products: small models take the latter.
    for method, worth_starting in (("book_keeping", 0), ("book_keeping", 1 << 62), ("ghost", 1 << 62)):
        engine = Engine(model, clipping=Flat(CLIP), method=method)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gram_kernel, "_WORTH_STARTING", worth_starting)
            engine.compared = compared  # the engine's own check is the same for every method
            figures = engine.accumulate(batch)
        compared = True
        worst = float((figures.norms / norms(expected) - 1).abs().max())
        if worst > norm_error:
            assert_rounding_of_the_model(model, batch, norms(expected), figures.norms)
        assert distance(engine.take(), clipped(expected, CLIP)) <= 5e-5, method
    assert all(p.grad is None for p in model.parameters())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def assert_rounding_of_the_model(model: nn.Module, batch: dict[str, Tensor], alone: Tensor, ours: Tensor) -> None:
    """A record's float32 gradient itself may depend on how many records share the forward pass: on some processors
    qwen4_exp's by 1.3e-5. Then the engine has to equal plain autograd in the same pass, ten times as closely, and to
    be no farther from the batch of one in float64 than the batch of one in float32 is."""
    together = norms(gradients_in_batch(model, batch))
    assert float((ours / together - 1).abs().max()) <= 1e-6
    exact_model = copy.deepcopy(model).double()
    exact_model.set_experts_implementation("eager")  # the grouped product of torch has no float64
    exact = norms(gradients(exact_model, batch))
    assert (ours / exact - 1).abs().max() <= (alone / exact - 1).abs().max()


@pytest.mark.parametrize("family", causal_lm_types())
def test_invariant_1_exact_for_every_family(family: str) -> None:
    assert_exact(tiny_model(family), token_batch(3, 7))


_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


def test_invariant_1_exact_for_dense_llama_with_tied_embeddings() -> None:
    config = LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    assert_exact(small(LlamaForCausalLM(config)), token_batch(3, 7))


@pytest.mark.parametrize("tokens", [5, 40])
def test_invariant_1_tied_embeddings_get_the_cross_term_in_both_forms(tokens: int) -> None:
    # 5 tokens take the Gram form; 40 tokens of width 32 take the direct one.
    config = LlamaConfig(**{**_SIZES, "max_position_embeddings": 64}, num_key_value_heads=2, tie_word_embeddings=True)
    batch = token_batch(3, tokens, vocabulary=12)  # ids repeat within a record
    assert_exact(small(LlamaForCausalLM(config)), batch)


@pytest.mark.parametrize("tied", [True, False])
def test_invariant_1_the_padding_token_of_an_embedding_gets_no_gradient_from_it(tied: bool) -> None:
    config = LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=5)
    model = small(LlamaForCausalLM(config))
    assert model.get_input_embeddings().padding_idx == 5  # type: ignore[operator]
    assert_exact(model, token_batch(3, 9, vocabulary=8))


def test_invariant_1_exact_for_dense_qwen_with_padding() -> None:
    config = Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    batch = token_batch(3, 9)
    batch["attention_mask"][1, 5:] = 0
    batch["labels"][1, 5:] = -100
    assert_exact(small(Qwen2ForCausalLM(config)), batch)


def test_invariant_1_exact_for_gpt2_whose_positions_are_shared_by_all_records() -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = small(GPT2LMHeadModel(config))
    for records, tokens in ((3, 7), (4, 8), (2, 8)):  # 8 tokens look like rows of 4 or of 2 records
        assert_exact(model, token_batch(records, tokens))


def test_invariant_1_exact_for_bert_masked_lm_and_classifier() -> None:
    config = BertConfig(**_SIZES, num_labels=3)
    batch = token_batch(4, 8)
    batch["labels"][:, ::2] = -100
    assert_exact(small(BertForMaskedLM(config)), batch)
    assert_exact(small(BertForSequenceClassification(config)), {**batch, "labels": torch.tensor([0, 2, 1, 1])})


@pytest.mark.parametrize(
    ("family", "kind"),
    [("mixtral", MixtralForSequenceClassification), ("qwen2_moe", Qwen2MoeForSequenceClassification)],
)
def test_invariant_1_exact_for_moe_classification_heads(family: str, kind: type) -> None:
    config = tiny_config(family)
    config.num_labels = 3
    model = small(kind(config))
    assert_exact(model, {**token_batch(3, 7), "labels": torch.tensor([0, 2, 1])})


def test_invariant_1_exact_for_an_upcycled_classifier() -> None:
    dense = BertForSequenceClassification(BertConfig(**_SIZES, num_labels=3))
    model = small(upcycle(dense, experts=4, top_k=2))
    assert_exact(model, {**token_batch(3, 7), "labels": torch.tensor([0, 2, 1])})


def test_invariant_1_exact_for_switch_transformers_whose_capacity_is_per_sequence() -> None:
    model = switch()
    for records, tokens in ((3, 7), (2, 8)):
        assert_exact(model, token_batch(records, tokens))


def test_invariant_1_switch_padding_on_the_right_changes_nothing() -> None:
    model = switch()
    short = token_batch(1, 6, seed=3)
    longer = token_batch(1, 9, seed=4)
    padded = {name: torch.cat([value, torch.zeros(1, 3, dtype=value.dtype)], 1) for name, value in short.items()}
    padded["labels"][:, 6:] = -100
    both = {name: torch.cat([padded[name], longer[name]]) for name in short}
    alone = Engine(model).norms(short)
    beside = Engine(model).norms(both)
    assert abs(float(beside[0] / alone[0]) - 1) <= 1e-5


def test_invariant_1_swapping_the_other_records_leaves_a_records_gradient_as_it_was() -> None:
    model = tiny_model("qwen2_moe")
    first = token_batch(3, 7, seed=0)
    swapped = {name: torch.cat([value[:1], token_batch(2, 7, seed=9)[name]]) for name, value in first.items()}
    found = []
    for batch in (first, swapped):
        engine = Engine(model, clipping=Flat(CLIP), method="book_keeping")
        engine.accumulate(batch)
        whole = engine.take()
        engine.accumulate({name: value[1:] for name, value in batch.items()})
        others = engine.take()
        found.append({name: whole[name] - others[name] for name in whole})  # what record 0 contributes
    assert distance(found[0], found[1]) <= 1e-4
    expected = clipped(gradients(model, only(first, 0)), CLIP)
    assert distance(found[0], expected) <= 1e-4
