"""A spread model from a checkpoint, a decoder layer in memory at a time: no rank ever holds the whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from coterie.config import ModelSpec
from coterie.models.split.partial import compute_buffers
from coterie.models.split.read_checkpoint import stream_checkpoint
from coterie.models.spread.spread import spread_experts
from coterie.models.zoo.build import build_model
from coterie.ranks.ranks import Ranks


def build_spread(
    spec: ModelSpec,
    ranks: Ranks,
    over: int | None = None,
    *,
    gathered: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """The model of a spec with this rank's experts alone; every rank calls it.

    A folder is read layer by layer. Random weights, which are drawn for the whole model, and those of the hub are
    built whole before the rest is let go.

    Args:
        spec: of the whole model.
        ranks: that hold the experts.
        over: ranks of a group, which hold every expert once; None: all.
        gathered: see `coterie.models.spread.spread.spread_experts`.
        device: of what this rank holds.
        seed: of random weights.

    Raises:
        ModelError: it cannot be built or spread.
    """
    if spec.path is None:
        whole = build_model(spec, device=torch.device(device), seed=seed)
        spread_experts(whole, ranks, over, gathered=gathered)
        return whole
    reader, model = build_model(spec, meta=True), build_model(spec, meta=True)
    spread = spread_experts(model, ranks, over, gathered=gathered)
    compute_buffers(model, device)
    own: dict[str, Tensor] = {}
    for group in stream_checkpoint(Path(spec.path), reader):
        for name, tensor in group.items():
            cut = spread.cuts.get(name)
            part = tensor if cut is None else cut.part(tensor, spread.held(cut))
            own[name] = part.to(device, copy=True)
    model.load_state_dict(own, strict=False, assign=True)
    model.tie_weights()
    if (Path(spec.path) / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(spec.path)
    return model
