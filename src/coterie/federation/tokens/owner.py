"""The `tokens` exchange, owner's side: tokens travel to the experts' hosts, expert outputs come back.

What crosses and what that gives away is told in docs/concepts/tokens-exchange.md. In short: a host reads most of the
text. This exchange is for parties that trust each other.

Shape letters: N tokens of a micro-batch, K experts chosen per token, D model width, M tokens that go to one host,
P (token, expert) pairs at one host, R routed rows over all hosts.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from coterie.errors import MessageError, PlacementError
from coterie.federation.tokens.host import DISPATCH, GRADIENT, TOKENS, CallId, TokensHost
from coterie.federation.tokens.host_math import Rows
from coterie.federation.wire.replies import gather
from coterie.federation.wire.transport import Address, Lane, Message, Transport
from coterie.federation.wire.values import check_own, check_received
from coterie.models.seam import ExpertLayer, ExpertsCall, RoutedRows
from coterie.models.split.placement import Placement

Combine = Literal["host", "owner"]


class TokensOwner:
    """One party's access to all experts of the federation.

    Args:
        transport: to the other parties; every one of them has an `TokensHost` behind its handler.
        host: this party's own experts, which are computed in process.
        layers: the model's MoE layers.
        placement: which party hosts which expert.
        combine: who weights and sums the outputs of a token's experts. ``host``: each host, so one vector per token
            and host comes back. ``owner``: this party, so every expert's output comes back. Layers with a norm behind
            each expert are always combined by the owner.
        deadline_s: longest wait for one reply.
        random_bytes: where the order of rows comes from; anything but the operating system is for tests.
        value_limit: largest size of a number that crosses.
        sent: told of every host that rows are about to leave for, and which tokens [M] of the micro-batch they are.

    Attributes:
        absent: parties that the others agreed to go on without. Their experts are masked: they add nothing to a
            token's output, and the weights of its other experts stay as the router gave them.

    Raises:
        PlacementError: the placement is another model's, or does not fit the own experts.
    """

    def __init__(
        self,
        transport: Transport,
        host: TokensHost,
        layers: Sequence[ExpertLayer],
        placement: Placement,
        *,
        combine: Combine = "host",
        deadline_s: float = 60.0,
        random_bytes: Callable[[int], bytes] = os.urandom,
        value_limit: float = math.inf,
        sent: Callable[[str, Address, Tensor], None] | None = None,
    ) -> None:
        self.transport, self.host, self.combine, self.sent = transport, host, combine, sent
        self.deadline_s, self.random_bytes, self.value_limit = deadline_s, random_bytes, value_limit
        self.absent: frozenset[str] = frozenset()
        _check_placement(placement, layers, host)
        self._hosts = {
            layer.index: {
                name: torch.tensor([by == number for by in placement.hosts[layer.index]])
                for number, name in enumerate(placement.parties)
                if number in placement.hosts[layer.index]
            }
            for layer in layers
        }

    def training(
        self, round_no: int, attempt: int, number: int, cancelled: Future[None] | None = None
    ) -> TokenMicroBatch:
        """The exchange of one training micro-batch.

        Args:
            round_no: counted from 1.
            attempt: counted from 1 within the round.
            number: from 0, without gaps: hosts add gradients in this order.
            cancelled: ends a wait when it completes or fails (`DeviceLock.cancelled`).
        """
        return TokenMicroBatch(self, round_no, attempt, number, cancelled)

    def inference(self, round_no: int = 0, cancelled: Future[None] | None = None) -> TokenMicroBatch:
        """An exchange for forwards without gradients. It belongs to no attempt; hosts remember nothing of it."""
        return TokenMicroBatch(self, round_no, 0, 0, cancelled)

    def declare(self, round_no: int, attempt: int, tokens: int, cancelled: Future[None] | None = None) -> None:
        """Tell all hosts that this party's micro-batches of the attempt are done, and how many tokens they had.

        Args:
            round_no: counted from 1.
            attempt: counted from 1 within the round.
            tokens: sum over the micro-batches.
            cancelled: ends the wait when it completes or fails.

        Raises:
            RoundError: a host misses a backward, or has dropped the attempt; or ``cancelled`` was set.
        """
        message = Message(TOKENS, Address(round=round_no, attempt=attempt), {"count": tokens})
        hosts = {name for layer in self._hosts for name in self.hosts(layer)}
        remote = [name for name in self.transport.peers if name in hosts]
        futures = {
            name: self.transport.request_async(name, Lane.BACKWARD, message, self.deadline_s) for name in remote
        }
        self.host.tokens(self.transport.me, round_no, attempt, tokens)
        gather(futures, cancelled, self.deadline_s, f"tokens of round {round_no}")

    def hosts(self, layer: int) -> dict[str, Tensor]:
        """Hosts of a layer that are there, in roster order, each with a bool [E] of its experts."""
        return {name: experts_E for name, experts_E in self._hosts[layer].items() if name not in self.absent}


@dataclass(frozen=True)
class _Share:
    """What of an experts call goes to one host.

    Attributes:
        token_M: which tokens, in the order in which they leave.
        counts_M: how many experts of each are at this host.
        pair_P: which of the N * K pairs, token after token.
    """

    token_M: Tensor
    counts_M: Tensor
    pair_P: Tensor


@dataclass(frozen=True)
class _Ticket:
    """What a backward needs of its forward: where everything went.

    Attributes:
        hidden_ND, routing_weights_NK: shapes and dtypes only, on the meta device: no activation is held.
        row_P: where `answers_rows`, the row of each of the N * K pairs, else None.
        dtype: of what crosses.
    """

    hidden_ND: Tensor
    routing_weights_NK: Tensor
    call_id: CallId
    shares: dict[str, _Share]
    row_P: Tensor | None
    dtype: torch.dtype


class TokenMicroBatch:
    """The `Exchange` of one micro-batch; see `TokensOwner.training`."""

    def __init__(
        self, owner: TokensOwner, round_no: int, attempt: int, number: int, cancelled: Future[None] | None
    ) -> None:
        self._owner, self._cancelled = owner, cancelled
        self._address = Address(round=round_no, attempt=attempt, micro_batch=number)
        self._calls: Counter[int] = Counter()

    def answers_rows(self, layer: ExpertLayer) -> bool:
        """See `Exchange.answers_rows`."""
        return self._owner.combine == "owner" or layer.layout.has_post_expert_norm

    @torch.no_grad()
    def forward(self, call: ExpertsCall, keep: bool) -> tuple[Tensor, _Ticket]:
        """See `Exchange.forward`."""
        layer, hidden_ND = call.layer, call.hidden_ND.to(_wire_dtype(call.hidden_ND))
        crossing = (hidden_ND, call.routing_weights_NK)
        check_own("hidden vectors", crossing, self._owner.value_limit, where=f"MoE layer {layer.index}")
        row_P = _rows_of_pairs(call) if self.answers_rows(layer) else None
        shares = self._share_out(call)
        if not keep:  # a backward wants every host to know of every micro-batch; an inference does not
            shares = {name: share for name, share in shares.items() if len(share.token_M)}
        ids_P, routing_weights_P = call.expert_ids_NK.reshape(-1), call.routing_weights_NK.reshape(-1)
        rows = {
            name: Rows(
                hidden_ND[share.token_M],
                share.counts_M,
                ids_P[share.pair_P],
                routing_weights_P[share.pair_P] if row_P is None else None,
            )
            for name, share in shares.items()
        }
        call_id = self._next_call_id(layer)
        ids_dtype = torch.uint8 if layer.num_experts <= 256 else torch.int32
        messages = {
            name: Message(DISPATCH, call_id.address, {"keep": keep}, _dispatched(part, ids_dtype))
            for name, part in rows.items()
        }
        host = self._owner.host
        if self._owner.sent is not None:
            for name in messages.keys() - {host.me}:
                self._owner.sent(name, call_id.address, shares[name].token_M)
        replies = self._ask(Lane.FORWARD, messages, lambda: (host.forward(call_id, rows[host.me], keep),))
        width = _output_width(layer)
        if row_P is None:
            out = hidden_ND.new_zeros(len(hidden_ND), width, dtype=_sum_dtype(hidden_ND.dtype))
        else:
            out = hidden_ND.new_zeros(int((row_P >= 0).sum()), width)
        for name, share in shares.items():
            places = share.token_M if row_P is None else row_P[share.pair_P]
            (part,) = self._checked(replies[name], [(len(places), width)], hidden_ND, name, call_id)
            # A token has one row per host (and a pair has one host), so the order of the sums is that of the hosts.
            out.index_add_(0, places, part.to(out.dtype))
        return out.to(call.hidden_ND.dtype), _Ticket(
            call.hidden_ND.to("meta"), call.routing_weights_NK.to("meta"), call_id, shares, row_P, hidden_ND.dtype
        )

    @torch.no_grad()
    def backward(self, ticket: _Ticket, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Exchange.backward`."""
        row_P = ticket.row_P
        where = f"MoE layer {ticket.call_id.address.layer}"
        check_own("gradients behind experts", [grad], self._owner.value_limit, where=where)
        grads = {
            name: grad[share.token_M if row_P is None else row_P[share.pair_P]].to(ticket.dtype)
            for name, share in ticket.shares.items()
        }
        messages = {name: Message(GRADIENT, ticket.call_id.address, tensors=(part,)) for name, part in grads.items()}
        host = self._owner.host

        def compute_own() -> tuple[Tensor, ...]:
            grad_x_MD, grad_routing_weights_P = host.backward(ticket.call_id, grads[host.me])
            return (grad_x_MD,) if grad_routing_weights_P is None else (grad_x_MD, grad_routing_weights_P)

        replies = self._ask(Lane.BACKWARD, messages, compute_own)
        like_ND = ticket.hidden_ND
        grad_hidden = grad.new_zeros(like_ND.shape, dtype=_sum_dtype(ticket.dtype))
        grad_weights = torch.zeros_like(ticket.routing_weights_NK, device=grad.device)
        for name, share in ticket.shares.items():
            shapes: list[tuple[int, ...]] = [(len(share.token_M), like_ND.shape[1])]
            if row_P is None:
                shapes.append((len(share.pair_P),))
            row_grads = self._checked(replies[name], shapes, grad, name, ticket.call_id)
            grad_hidden.index_add_(0, share.token_M, row_grads[0].to(grad_hidden.dtype))
            if row_P is None:
                grad_weights.view(-1)[share.pair_P] = row_grads[1].to(grad_weights.dtype)
        return grad_hidden.to(like_ND.dtype), grad_weights if row_P is None else None

    def _next_call_id(self, layer: ExpertLayer) -> CallId:
        number = self._calls[layer.index]
        self._calls[layer.index] += 1
        address = replace(self._address, layer=layer.index, call=number)
        return CallId(self._owner.transport.me, address)

    def _share_out(self, call: ExpertsCall) -> dict[str, _Share]:
        """Who gets which tokens. Those that leave this party do so in a fresh random order."""
        ids_NK = call.expert_ids_NK
        num_experts, device = call.layer.num_experts, ids_NK.device
        shares = {}
        for name, experts_E in self._owner.hosts(call.layer.index).items():
            there_NK = experts_E.to(device)[ids_NK.clamp(0, num_experts - 1)]
            there_NK &= (ids_NK >= 0) & (ids_NK < num_experts)
            token_M = there_NK.any(1).nonzero().squeeze(1)
            if name != self._owner.host.me:
                token_M = token_M[self._random_order(len(token_M)).to(device)]
            there_MK = there_NK[token_M]
            place, choice = there_MK.nonzero(as_tuple=True)
            shares[name] = _Share(token_M, there_MK.sum(1), token_M[place] * ids_NK.shape[1] + choice)
        return shares

    def _random_order(self, length: int) -> Tensor:
        """A uniformly random permutation: the order of ``length`` random 64-bit numbers."""
        if length == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(bytearray(self._owner.random_bytes(8 * length)), dtype=torch.int64).argsort()

    def _ask(
        self, lane: Lane, messages: Mapping[str, Message], compute_own: Callable[[], tuple[Tensor, ...]]
    ) -> dict[str, tuple[Tensor, ...]]:
        """Ask all hosts at once, compute the own part meanwhile, and wait for all together."""
        transport, deadline_s = self._owner.transport, self._owner.deadline_s
        futures = {}
        for name, message in messages.items():
            if name != transport.me:
                futures[name] = transport.request_async(name, lane, message, deadline_s)
        replies = {transport.me: compute_own()} if transport.me in messages else {}
        first = next(iter(messages.values()), None)
        where = "" if first is None else _where(first.address)
        for name, reply in gather(futures, self._cancelled, deadline_s, where).items():
            replies[name] = reply.tensors
        return replies

    def _checked(
        self,
        tensors: tuple[Tensor, ...],
        shapes: Sequence[tuple[int, ...]],
        like: Tensor,
        name: str,
        call_id: CallId,
    ) -> tuple[Tensor, ...]:
        """A host's answer on this device, if it has the promised shapes and can be computed with."""
        where = _where(call_id.address)
        if [tuple(t.shape) for t in tensors] != list(shapes) or not all(t.is_floating_point() for t in tensors):
            raise MessageError(
                f"{name} answered with shapes {[tuple(t.shape) for t in tensors]}, not {list(shapes)}.",
                code="exchange-reply",
                where=where,
                why="both sides must run the same model, placement and version",
                peer=name,
            )
        if name != self._owner.host.me:
            for tensor in tensors:
                check_received(name, "reply", "rows", tensor, self._owner.value_limit, where=where)
        return tuple(tensor.to(like.device) for tensor in tensors)


def _where(address: Address) -> str:
    return f"round {address.round}, micro-batch {address.micro_batch}, layer {address.layer}"


def _check_placement(placement: Placement, layers: Sequence[ExpertLayer], host: TokensHost) -> None:
    expected = tuple(layer.num_experts for layer in layers)
    if placement.num_experts != expected or placement.parties != host.parties:
        raise PlacementError(
            "The placement was made for another model or other parties.",
            code="placement-unfit",
            why=f"it places {placement.num_experts} experts per layer, the model has {expected}",
            fix="check `placement` and `parties` in federation.yaml",
        )
    hosted = {layer: list(experts) for layer, experts in host.shard.hosted.items()}
    if hosted != placement.hosted(host.me):
        raise PlacementError(
            f"{host.me} does not hold the experts that the placement gives it.",
            code="placement-shard",
            why="tokens would be sent to an expert that is not there",
            fix="write this party's shard again with `coterie split`",
        )


def _dispatched(rows: Rows, ids_dtype: torch.dtype) -> tuple[Tensor, ...]:
    tensors = (rows.x_MD, rows.counts_M.to(torch.uint8), rows.ids_P.to(ids_dtype))
    return tensors if rows.routing_weights_P is None else (*tensors, rows.routing_weights_P)


def _rows_of_pairs(call: ExpertsCall) -> Tensor:
    """For each of the N * K pairs its row in the order of `RoutedRows`; -1 for one without an expert."""
    rows = RoutedRows.of(call.expert_ids_NK, call.layer.num_experts)
    row_P = torch.full((call.expert_ids_NK.numel(),), -1, device=rows.pair_R.device)
    row_P[rows.pair_R] = torch.arange(len(rows.pair_R), device=rows.pair_R.device)
    return row_P


def _wire_dtype(hidden: Tensor) -> torch.dtype:
    """The hidden states' dtype; under autocast the one that experts would cast them to anyway."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _output_width(layer: ExpertLayer) -> int:
    down = layer.parameters()["down_proj"]
    return down.shape[-1] if layer.layout.is_transposed else down.shape[-2]
