"""Experts computed from the files of a split."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from coterie.models.seam import ExpertsCall, RoutedRows, expert_rows
from coterie.models.split.shards import expert_key, load_tensors


class ShardExperts:
    """Computes experts from shard files, weights read one expert at a time: the slow twin of a federation."""

    def __init__(self, folder: Path) -> None:
        self.weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("experts-*.safetensors")):
            self.weights |= load_tensors(file)

    def __call__(self, call: ExpertsCall) -> Tensor:
        layer = call.layer

        def linear(name: str, x_RI: Tensor, ends_E: Tensor) -> Tensor:
            parts, start = [], 0
            for expert, end in enumerate(ends_E.tolist()):
                weight = self.weights[expert_key(layer.index, expert, name)]
                rows = x_RI[start:end].to(weight.dtype)
                out = rows @ (weight if layer.layout.is_transposed else weight.T)
                parts.append(
                    out + self.weights[expert_key(layer.index, expert, f"{name}_bias")]
                    if layer.layout.has_bias
                    else out
                )
                start = end
            return torch.cat(parts)

        rows = RoutedRows.of(call.expert_ids_NK, layer.num_experts)
        out_RD = expert_rows(layer, call.hidden_ND[rows.token_R], rows.ends_E, linear)
        return rows.combine(out_RD, call.routing_weights_NK, call.hidden_ND.dtype)
