"""What a host computes for one exchange: rows in, outputs back; gradients in, gradients back.

Tokens arrive once each, with the list of their experts here:

- ``x_MD``: M tokens;
- ``counts_M``: how many of the hosted experts each one chose, at least 1;
- ``ids_P``: those experts, token after token; P pairs in all;
- ``routing_weights_P``: their routing weights, if the host is to weight and sum the outputs.

Shape letters besides: D model width, E hosted experts, R rows sorted by expert (R = P), G width before the gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.models.expert_math import Weights, apply_linear, backward_rows, forward_rows, weight_gradients
from coterie.models.seam import ExpertLayer, RoutedRows


@dataclass(frozen=True)
class Rows:
    """Tokens and their experts at one host, all on the computing device; ids count from 0 among the hosted ones."""

    x_MD: Tensor
    counts_M: Tensor
    ids_P: Tensor
    routing_weights_P: Tensor | None

    def to(self, device: torch.device) -> Rows:
        weights = None if self.routing_weights_P is None else self.routing_weights_P.to(device)
        return Rows(self.x_MD.to(device), self.counts_M.to(device), self.ids_P.to(device), weights)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.x_MD, self.counts_M, self.ids_P, self.routing_weights_P) if t is not None)


@dataclass(frozen=True)
class Kept:
    """What a backward needs of its forward. ``pre_RG`` is None where it is computed again."""

    rows: Rows
    pre_RG: Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.rows.num_bytes + (0 if self.pre_RG is None else self.pre_RG.nbytes)


@torch.no_grad()
def host_forward(layer: ExpertLayer, weights: Weights, rows: Rows, *, recompute: bool = False) -> tuple[Tensor, Kept]:
    """Outputs of the hosted experts, in the tokens' dtype.

    Args:
        layer: names the layout and the activation.
        weights: of the hosted experts, {name: [E, ...]}.
        rows: tokens and the hosted experts that they chose.
        recompute: keep only what arrived; costs one more product in the backward.

    Returns:
        [M, D], weighted and summed, or [P, D] where there are no routing weights; and what `host_backward` needs.
    """
    pairs, token_R = _sort(rows, weights)
    out_RD, pre_RG = forward_rows(layer, weights, rows.x_MD[token_R], pairs.ends_E)
    out_PD = _unsort(out_RD, pairs)
    if rows.routing_weights_P is not None:
        out_PD = _sum_pairs(out_PD * rows.routing_weights_P.unsqueeze(-1), rows.counts_M)
    return out_PD.to(rows.x_MD.dtype), Kept(rows, None if recompute else pre_RG)


@torch.no_grad()
def host_backward(
    layer: ExpertLayer, weights: Weights, kept: Kept, grad: Tensor
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Gradients at what arrived, and summed over the rows at the hosted experts' weights.

    Args:
        layer: as in `host_forward`.
        weights: as in `host_forward`.
        kept: what `host_forward` returned for these rows.
        grad: gradient at what `host_forward` returned.

    Returns:
        [M, D] in the tokens' dtype; [P] float32 or wider, or None without routing weights; {name: [E, ...]}.
    """
    rows = kept.rows
    pairs, token_R = _sort(rows, weights)
    x_RD, pre_RG = rows.x_MD[token_R], kept.pre_RG
    if pre_RG is None:
        pre_RG = apply_linear(layer, weights, layer.layout.up_name, x_RD, pairs.ends_E)
    routing_weights_R = None if rows.routing_weights_P is None else rows.routing_weights_P[pairs.pair_R]
    grad_RD = grad[pairs.pair_R] if routing_weights_R is None else grad[token_R]
    row_grads = backward_rows(layer, weights, pre_RG, grad_RD, pairs.ends_E, routing_weights_R)
    if routing_weights_R is not None:
        grad_RD = grad_RD * routing_weights_R.unsqueeze(-1)
    gradients = weight_gradients(layer, x_RD, row_grads, grad_RD, pairs.ends_E)
    grad_x_MD = _sum_pairs(_unsort(row_grads.grad_x_RD, pairs), rows.counts_M).to(rows.x_MD.dtype)
    grad_routing_weights_P = (
        None if row_grads.grad_routing_weights_R is None else _unsort(row_grads.grad_routing_weights_R, pairs)
    )
    return grad_x_MD, grad_routing_weights_P, gradients


def _sort(rows: Rows, weights: Weights) -> tuple[RoutedRows, Tensor]:
    """The pairs sorted by expert, and the token of each sorted row."""
    pairs = RoutedRows.of(rows.ids_P.unsqueeze(-1), weights["down_proj"].shape[0])
    tokens = torch.arange(rows.x_MD.shape[0], device=rows.x_MD.device)
    return pairs, torch.repeat_interleave(tokens, rows.counts_M)[pairs.pair_R]


def _unsort(sorted_R: Tensor, pairs: RoutedRows) -> Tensor:
    """Rows in the order of the pairs again."""
    return torch.empty_like(sorted_R).index_copy_(0, pairs.pair_R, sorted_R)


def _sum_pairs(pairs_PD: Tensor, counts_M: Tensor) -> Tensor:
    """The sum over each token's pairs, [M, D] float32 or wider. One adder per output: the order never changes."""
    if pairs_PD.shape[0] == 0:
        return pairs_PD.new_zeros(counts_M.shape[0], pairs_PD.shape[1])
    dtype = torch.promote_types(pairs_PD.dtype, torch.float32)
    return torch.segment_reduce(pairs_PD.to(dtype), "sum", lengths=counts_M, axis=0)
