"""Rows that go to the ranks of the experts that they chose, and come back: one row for each (token, rank).

A rank that gets a row learns which of its own experts the token chose, by which weights, and a number of the record;
it computes, weights and adds up what its experts say, and sends one row back. Gradients go the other way, those of
the routing weights too, so that a router learns from experts elsewhere.

Every rank makes each trip, forward and backward, also one whose tokens chose nobody elsewhere and one that holds
nothing that was chosen: the order of exchanges is that of the model's layers at all of them.

Shape letters: N tokens, K experts chosen per token, W ranks, T rows sent (one for each token and rank), A rows that
arrived, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coterie.models.autograd import applied, applied_to_several
from coterie.models.seam import ExpertsCall
from coterie.ranks.ranks import Ranks


@dataclass(frozen=True)
class Trip:
    """Which rows go where, in one layer.

    Attributes:
        ranks: between whom.
        token_T: the token of each row that is sent, by rank and then ascending.
        chosen_TK: bool, which of the token's choices are experts of the row's rank.
        send, receive: rows to and from each rank.
        expert_AK: choices of the rows that arrived, as numbers among this rank's own experts; -1: not one of them.
        record_A: records of the rows that arrived.
        held: how many experts this rank holds.
    """

    ranks: Ranks
    token_T: Tensor
    chosen_TK: Tensor
    send: list[int]
    receive: list[int]
    expert_AK: Tensor
    record_A: Tensor
    held: int

    @classmethod
    def begin(cls, ranks: Ranks, bounds: Sequence[int], ids_NK: Tensor, record_N: Tensor) -> Trip:
        """Tell the other ranks which experts the tokens chose, and hear the same of theirs.

        Args:
            ranks: all of them take part.
            bounds: [W + 1] the first expert of each rank, and one past the last one's last. Ids outside of all mean
                "no expert".
            ids_NK: the choices.
            record_N: a number for each token that its rows carry.
        """
        first_W = torch.tensor(bounds[:-1], device=ids_NK.device)
        end_W = torch.tensor(bounds[1:], device=ids_NK.device)
        ids_N1K = ids_NK.unsqueeze(1)
        chosen_NWK = (ids_N1K >= first_W[:, None]) & (ids_N1K < end_W[:, None])
        rank_T, token_T = chosen_NWK.any(2).t().nonzero(as_tuple=True)
        chosen_TK = chosen_NWK[token_T, rank_T]
        expert_TK = torch.where(chosen_TK, ids_NK[token_T] - first_W[rank_T].unsqueeze(1), -1)
        told_T = torch.cat([expert_TK, record_N[token_T].unsqueeze(1)], 1).to(torch.int32)
        send_W = torch.bincount(rank_T, minlength=ranks.world)
        every = [1] * ranks.world
        send, receive = send_W.tolist(), ranks.exchange(send_W, every, every).tolist()
        told_A = ranks.exchange(told_T, send, receive).long()
        held = bounds[ranks.rank + 1] - bounds[ranks.rank]
        return cls(ranks, token_T, chosen_TK, send, receive, told_A[:, :-1], told_A[:, -1], held)

    def there(self, rows_T: Tensor) -> Tensor:
        """Rows [T, ...] to the ranks of their experts: those that arrived, [A, ...]."""
        return self.ranks.exchange(rows_T, self.send, self.receive)

    def back(self, rows_A: Tensor) -> Tensor:
        """Rows [A, ...] to where they came from: those that were sent, [T, ...]."""
        return self.ranks.exchange(rows_A, self.receive, self.send)

    def by_token(self, rows_T: Tensor, tokens: int) -> Tensor:
        """[N, ...] the rows of each token added up, in the order of ranks. Deterministic: no scattered addition."""
        total = rows_T.new_zeros(tokens, *rows_T.shape[1:])
        for token, rows in zip(torch.split(self.token_T, self.send), torch.split(rows_T, self.send), strict=True):
            total[token] += rows  # a token has one row for a rank
        return total


def there_and_back(anchor: Tensor, call: ExpertsCall, trip: Trip, compute: Callable[[ExpertsCall], Tensor]) -> Tensor:
    """A layer's output where its experts are on several ranks, [N, D] in the hidden states' dtype.

    Args:
        anchor: requires a gradient where there is a backward, so that every rank takes part in all of it.
        call: as the model makes it.
        trip: of its rows.
        compute: computes the rows that arrived with this rank's own experts.
    """
    hidden_AD, weights_AK = applied_to_several(_There, anchor, call.hidden_ND, call.routing_weights_NK, trip)
    own = replace(call.layer, num_experts=trip.held)
    out_AD = compute(ExpertsCall(own, hidden_AD, trip.expert_AK, weights_AK))
    return applied(_Back, anchor, out_AD, trip, call.hidden_ND.shape[0])


class _There(torch.autograd.Function):
    """Hidden states and routing weights of the rows that arrive: [A, D], [A, K]."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden_ND: Tensor, weights_NK: Tensor, trip: Trip) -> tuple[Tensor, Tensor]:
        ctx.trip, ctx.tokens = trip, hidden_ND.shape[0]
        weights_TK = torch.where(trip.chosen_TK, weights_NK[trip.token_T], 0.0)
        return trip.there(hidden_ND[trip.token_T]), trip.there(weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_AD: Tensor, grad_AK: Tensor) -> tuple[Any, ...]:
        trip: Trip = ctx.trip
        grad_ND = trip.by_token(trip.back(grad_AD), ctx.tokens)
        grad_TK = torch.where(trip.chosen_TK, trip.back(grad_AK), 0.0)
        return None, grad_ND, trip.by_token(grad_TK, ctx.tokens), None


class _Back(torch.autograd.Function):
    """What the experts of all ranks say of each token, added up: [N, D]."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, out_AD: Tensor, trip: Trip, tokens: int) -> Tensor:
        ctx.trip = trip
        return trip.by_token(trip.back(out_AD), tokens)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Any, ...]:
        trip: Trip = ctx.trip
        return None, trip.there(grad_ND[trip.token_T]), None, None
