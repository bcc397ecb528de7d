"""Switch Transformers, whose experts have a capacity."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from coterie.models.zoo.tiny import fill_random


def small(model: nn.Module) -> nn.Module:
    fill_random(model, torch.Generator().manual_seed(0))
    return model.eval()


def switch(**settings: object) -> nn.Module:
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 4}
    layers = {
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    }
    config = SwitchTransformersConfig(
        **{**sizes, **layers, "expert_capacity": 3, "decoder_start_token_id": 0, "pad_token_id": 0, **settings}
    )
    return small(SwitchTransformersForConditionalGeneration(config))
