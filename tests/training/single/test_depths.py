"""Of which depths a plan measures models: apart enough for short times, at most half of what the run adds."""

from __future__ import annotations

import pytest
import torch
from transformers import OlmoeConfig, PretrainedConfig

from coterie.training.single import calibrated


def olmoe(layers: int, *, width: int, experts: int) -> PretrainedConfig:
    return OlmoeConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=2,
    )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, (1, 1, 1)),
        (2, (2, 2, 2)),
        (3, (1, 2, 3)),
        (5, (1, 3, 5)),
        (8, (1, 4, 8)),
        (12, (1, 5, 12)),
        (48, (1, 5, 48)),
    ],
)
def test_small_models_differ_by_up_to_four_layers_and_half_of_the_runs(
    layers: int, expected: tuple[int, int, int]
) -> None:
    assert calibrated.depths(olmoe(layers, width=16, experts=4), torch.float32) == expected


def test_of_large_layers_there_is_one_more() -> None:
    """OLMoE-1B-7B's: 0.4 billion weights each."""
    assert calibrated.depths(olmoe(16, width=1024, experts=64), torch.bfloat16) == (1, 2, 16)
