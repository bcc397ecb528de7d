"""Layers of a spread model where all ranks of a group run the same records: no row travels, each adds its part.

Slower than letting rows travel, and another way to the same values: what travelling is compared with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coterie.models.autograd import applied, applied_to_several
from coterie.models.seam import ExpertsCall, ExpertsImplementation, LocalExperts
from coterie.models.spread.spread import Spread
from coterie.ranks.ranks import Ranks


class InUnison:
    """Computes layers at all ranks of a group at once, which run the same records, forward and backward.

    Args:
        spread: of the model.
        own: computes this rank's own experts; None: with the weights in the module.
    """

    def __init__(self, spread: Spread, own: ExpertsImplementation | None = None) -> None:
        self._spread, self._own = spread, own or LocalExperts()

    def __call__(self, call: ExpertsCall) -> Tensor:
        ranks, ids_NK = self._spread.ranks, call.expert_ids_NK
        first, end = self._spread.bounds(call.layer.num_experts)[ranks.rank :][:2]
        here_NK = torch.where((ids_NK >= first) & (ids_NK < end), ids_NK - first, -1)
        hidden_ND, weights_NK = applied_to_several(_Given, call.hidden_ND, call.routing_weights_NK, ranks)
        layer = replace(call.layer, num_experts=end - first)
        return applied(_Added, self._own(ExpertsCall(layer, hidden_ND, here_NK, weights_NK)), ranks)


class _Given(torch.autograd.Function):
    """The same at all ranks; gradients of all of them are added up."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weights_NK: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        ctx.ranks = ranks
        return hidden_ND.view_as(hidden_ND), weights_NK.view_as(weights_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor, grad_NK: Tensor) -> tuple[Any, ...]:
        return _added(ctx.ranks, grad_ND), _added(ctx.ranks, grad_NK), None


class _Added(torch.autograd.Function):
    """What the experts of all ranks say, added up; every rank has the same gradient of it."""

    @staticmethod
    def forward(ctx: Any, out_ND: Tensor, ranks: Ranks) -> Tensor:
        return _added(ranks, out_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Any, ...]:
        return grad_ND, None


def _added(ranks: Ranks, own: Tensor) -> Tensor:
    """In the order of ranks, as rows that travelled are added up: routing then falls alike."""
    total = torch.zeros_like(own, memory_format=torch.contiguous_format)
    for rank in range(ranks.world):
        part = own.detach().clone(memory_format=torch.contiguous_format)
        ranks.hand_out([part], rank)
        total += part
    return total
