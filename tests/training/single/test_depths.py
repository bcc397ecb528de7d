"""Of which depths a plan measures models: apart enough for short times; and what it makes of two of them."""

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


@pytest.mark.parametrize(
    ("amounts", "seconds", "expected"),
    [
        ((2, 6), (1.5, 2.5), (1.0, 0.25)),
        ((3, 3), (1.5, 1.5), (0.0, 0.5)),  # a text with a single record: no slope, all of it is work
        ((2, 6), (2.0, 1.0), (2.0, 0.0)),  # a moment of the machine: work takes no less than nothing
        ((2, 6), (0.5, 2.5), (0.0, 0.5)),
    ],
)
def test_two_times_tell_what_work_takes_and_what_takes_time_without_it(
    amounts: tuple[int, int], seconds: tuple[float, float], expected: tuple[float, float]
) -> None:
    assert calibrated.line(amounts, seconds) == pytest.approx(expected)
