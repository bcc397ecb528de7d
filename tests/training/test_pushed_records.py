"""What others can read without a budget is said with sizes, from the model's own dimensions."""

from __future__ import annotations

import pytest
import torch

from coterie.config import LoraSpec, ModelSpec
from coterie.models.zoo.build import build_model
from coterie.training.planning.exposure import Reach, of_pushes, of_tokens
from helpers.federations import settings

SMALL = {
    "hidden_size": 96, "moe_intermediate_size": 96, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "num_experts": 16, "num_experts_per_tok": 2,
    "vocab_size": 1024,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "config", "tokens"),
    [
        ("olmoe", {}, 16_384),  # OLMoE-1B-7B: 2048 * 64 / 8
        ("qwen3_moe", SMALL, 768),  # the demo's: 96 * 16 / 2
    ],
)
def test_the_size_follows_from_width_and_experts(family: str, config: dict[str, int], tokens: int) -> None:
    model = build_model(ModelSpec(family=family, config=config), meta=True)
    assert Reach.of_model(model).tokens == tokens
    assert Reach.of_model(model, LoraSpec(rank=8)).tokens == 8 * tokens // model.config.hidden_size


@pytest.mark.parametrize("tokens_per_expert", [4, 24])
def test_a_span_tells_its_tokens_until_it_is_as_large_as_the_width(tokens_per_expert: int) -> None:
    """The rule itself: the rows of a first projection's summed gradient, and a vector that is not among them."""
    generator = torch.Generator().manual_seed(0)
    width, inner = 16, 32
    hidden, back, stranger = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens_per_expert, width), (tokens_per_expert, inner), (width,))
    )
    rows = torch.linalg.svd(back.T @ hidden, full_matrices=False)
    basis = rows.Vh[(rows.S / rows.S[0]) > 1e-9]

    def outside(vector: torch.Tensor) -> float:
        return float((vector - basis.T @ (basis @ vector)).norm() / vector.norm())

    assert max(outside(vector) for vector in hidden) < 1e-9, "its own tokens lie in the span"
    assert (outside(stranger) > 0.1) is (tokens_per_expert < width), "another one does only when the span is full"


def test_words_say_sizes_and_the_way_out() -> None:
    reach = Reach(96, 16, 2)
    shared = settings(exchange="experts", privacy="none", trunk="shared")
    text = " ".join(of_pushes(shared, reach, 1024))
    for part in ("gives whole records back", "in every round", "about 768 tokens", "up to 1,024: beyond", "a budget"):
        assert part in text
    assert "all of it can be read" in " ".join(of_pushes(shared, reach, 768))
    private = settings(exchange="experts", privacy="none", trunk="private")
    assert "in the first rounds" in " ".join(of_pushes(private, reach))


def test_held_out_text_is_said_to_cross_unless_it_does_not() -> None:
    assert "every 5 rounds and after the last one" in of_tokens(settings(train__eval_every=5))[1]
    assert "after the last round" in of_tokens(settings(train__eval_every=0))[1]
    assert len(of_tokens(settings(evaluate=False))) == 1
