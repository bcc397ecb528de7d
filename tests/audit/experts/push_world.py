"""A small model, public text and private text of one kind for tests of attacks on pushed sums."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from coterie.audit.experts.reader import Reader
from coterie.models import seam
from coterie.models.zoo.tiny import tiny_model


def small_model(family: str = "qwen3_moe", **settings: object) -> PreTrainedModel:
    """Random weights, so nothing of a text can be guessed without a sum."""
    model = tiny_model(family, **settings)
    seam.select(model)
    return model


def small_reader(family: str = "qwen3_moe", **settings: object) -> Reader:
    return Reader(small_model(family, **settings))


def texts(count: int, length: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(row) for row in torch.randint(3, vocabulary, (count, length), generator=generator).tolist()]


def every_expert(reader: Reader) -> list[tuple[int, int]]:
    return [(layer.index, expert) for layer in reader.layers for expert in range(layer.num_experts)]
