"""The expert host: computes its experts for all parties of a round, and steps them when the round commits.

It holds no autograd graph. Forward and backward are written out, so they can run on any thread at any time, and
never wait for anything but the round to begin.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import FrameError, MessageError, RoundError
from coterie.federation.shard import Shard
from coterie.federation.tokens.host_math import Kept, Rows, host_backward, host_forward
from coterie.federation.tokens.staging import PartyStage
from coterie.federation.wire.messages import LARGEST, check_request, kinds, unfit
from coterie.federation.wire.transport import Address, Lane, Message
from coterie.federation.wire.values import check_own, check_received
from coterie.models.seam import ExpertLayer

DISPATCH = "dispatch"
GRADIENT = "gradient"
TOKENS = "tokens"

RoundId = tuple[int, int]


@dataclass(frozen=True)
class TokensHostLimits:
    """What one party can make a host do.

    Attributes:
        kept_bytes: most memory for forwards whose backward has not come, per party.
        ahead: most micro-batches begun behind one that has not finished.
        begin_s: how long a message may wait for this host to begin the round it belongs to.
        rounds, micro_batches, tokens: most of each, from the signed settings; tokens of one party in one round.
        value: largest size of a number that a party may send, or be sent.
    """

    kept_bytes: int = 8 << 30
    ahead: int = 16
    begin_s: float = 60.0
    rounds: int = LARGEST
    micro_batches: int = 1 << 32
    tokens: int = LARGEST
    value: float = math.inf


@dataclass(frozen=True)
class CallId:
    """One experts call of one party."""

    party: str
    address: Address

    @property
    def round_id(self) -> RoundId:
        return self.address.round, self.address.attempt


class TokensHost:
    """Experts of one party, serving everybody's tokens.

    Args:
        me: this party; its own tokens come through `forward` and `backward` without a wire.
        parties: everybody, in roster order; sums are formed in this order.
        layers: the model's MoE layers.
        shard: the hosted experts.
        recompute: keep only what arrived for the backward, and compute the first product again.
        limits: bounds on what a party can make this host hold.

    All methods can be called from any thread.
    """

    KINDS = kinds("tokens")

    def __init__(
        self,
        me: str,
        parties: Sequence[str],
        layers: Sequence[ExpertLayer],
        shard: Shard,
        *,
        recompute: bool = False,
        limits: TokensHostLimits = TokensHostLimits(),
    ) -> None:
        self.me, self.shard = me, shard
        self.parties = tuple(parties)
        self._layers = {layer.index: layer for layer in layers}
        self._recompute, self._limits = recompute, limits
        self._changed = threading.Condition()
        self._open: RoundId | None = None
        self._last_over: RoundId = (-1, 0)
        self._committed: RoundId | None = None
        self._stages: dict[str, PartyStage] = {}
        self._kept: dict[CallId, Kept] = {}
        self._reserved: Counter[str] = Counter()
        self._computing = 0
        self._stepping = False
        self._closed = False

    # ---- the round ----

    def begin(self, round_no: int, attempt: int, parties: Collection[str] | None = None) -> None:
        """Take part in an attempt at a round; whatever an earlier one staged is dropped. Can be repeated.

        Args:
            round_no: counted from 1.
            attempt: counted from 1 within the round.
            parties: who contributes; default: everybody.

        Raises:
            RoundError: the attempt is over already.
        """
        with self._changed:
            if self._open == (round_no, attempt):
                return
            if (round_no, attempt) <= self._last_over:
                raise _attempt_over(round_no, attempt)
            names = [name for name in self.parties if parties is None or name in parties]
            self._clear()
            self._open = (round_no, attempt)
            self._stages = {name: PartyStage(name, self._limits.ahead) for name in names}
            self._changed.notify_all()

    def drop(self, round_no: int, attempt: int) -> None:
        """Forget whatever an attempt staged, also one that never began here. Its later messages are refused."""
        with self._changed:
            self._last_over = max(self._last_over, (round_no, attempt))
            if self._open is not None and self._open <= self._last_over:
                self._clear()
            self._changed.notify_all()

    def tokens(self, party: str, round_no: int, attempt: int, count: int) -> None:
        """A party finished its part of the round; ``count`` of its tokens share the division at commit.

        Raises:
            RoundError: a backward of it is missing, or the attempt is over.
        """
        if not 0 <= count <= self._limits.tokens:
            raise unfit(party, TOKENS, "count", f"is {count}; {self._limits.tokens} were agreed")
        self._stage(party, (round_no, attempt)).declare(count)

    def missing(self) -> tuple[str, ...]:
        """Parties of the open attempt that have not declared their tokens; nobody where no expert is hosted."""
        if not self.shard.hosted:  # nothing to divide: nobody tells us, see `TokensOwner.declare`
            return ()
        with self._changed:
            return tuple(name for name, stage in self._stages.items() if stage.tokens is None)

    def commit(self, round_no: int, attempt: int, learning_rate: float | None = None) -> None:
        """Step all hosted experts by the summed gradients over all parties' tokens. Repeating it does nothing.

        Args:
            round_no: the round of the open attempt.
            attempt: the open attempt.
            learning_rate: of this round; None leaves the optimiser's.

        Raises:
            RoundError: another attempt is open, or a party has not declared its tokens. Nothing was changed.
        """
        with self._changed:
            if self._committed == (round_no, attempt):
                return
            if self._open != (round_no, attempt):
                raise _attempt_over(round_no, attempt)
            if self.missing():
                raise RoundError(
                    f"round {round_no} cannot commit: no word from {', '.join(self.missing())}.",
                    code="round-incomplete",
                    where=f"expert host {self.me}, attempt {attempt}",
                    why="the sum would leave out a party",
                )
            self._stepping = True
            self._changed.wait_for(lambda: self._computing == 0)
            stages = list(self._stages.values())
        try:
            self._fill_gradients(stages)
            self.shard.step(learning_rate)
            with self._changed:
                self._committed = self._last_over = (round_no, attempt)
                self._clear()
        finally:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()

    def close(self) -> None:
        """Serve nobody any more: what waits for a round to begin fails at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def state_dict(self) -> dict[str, Tensor]:
        """Hosted experts and their optimiser state, by global key; see `Shard.state_dict`."""
        return self.shard.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back a checkpoint's experts. Rounds may be repeated after it: none counts as over any more."""
        with self._changed:
            self._clear()
            self._last_over, self._committed = (-1, 0), None
            self.shard.load_state_dict(state)
            self._changed.notify_all()

    def _fill_gradients(self, stages: Sequence[PartyStage]) -> None:
        tokens = sum(stage.tokens or 0 for stage in stages)
        for layer in self.shard.hosted:
            for name in self._layers[layer].layout.parameter_names:
                gradient = self.shard.gradient(layer, name).zero_()
                total: Tensor | None = None
                for stage in stages:
                    share = stage.sums(layer).get(name)
                    if share is not None:
                        total = share if total is None else total.add_(share)
                if total is not None:
                    gradient.copy_(total.div_(max(tokens, 1)))

    def _clear(self) -> None:
        self._open = None
        self._stages, self._kept, self._reserved = {}, {}, Counter()

    # ---- exchanges ----

    def forward(self, call_id: CallId, rows: Rows, keep: bool) -> Tensor:
        """Outputs of the hosted experts for some tokens; see `host_forward`.

        Args:
            call_id: names the micro-batch and the layer; used once.
            rows: any device; ids are global.
            keep: whether `backward` will follow.

        Returns:
            [M, D] or [P, D] on the computing device, in the tokens' dtype.

        Raises:
            RoundError: the attempt is over or never began here, or the exchange was made before.
            FrameError: shapes, dtypes or ids do not fit, or it is too much.
        """
        layer = self._layer(call_id)
        rows = self._checked(call_id, layer, rows)
        if keep:
            stage = self._stage(call_id.party, call_id.round_id)
            self._reserve(call_id, self._size(layer, rows))
            stage.begin(layer.index, call_id.address.micro_batch)
        with self._weights(layer) as weights:
            out, kept = host_forward(layer, weights, rows, recompute=self._recompute)
        if keep:
            with self._changed:
                self._check_open(call_id)
                self._kept[call_id] = kept
        return out

    def backward(self, call_id: CallId, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients at the tokens [M, D] and routing weights [P]; those of the experts are staged here.

        Args:
            call_id: that of the `forward` it belongs to.
            grad: gradient at what `forward` returned, same shape.

        Raises:
            RoundError: the attempt is over, or there was no such forward.
            FrameError: another shape.
        """
        layer = self._layer(call_id)
        stage = self._stage(call_id.party, call_id.round_id)
        with self._changed:
            kept = self._kept.get(call_id)
            if kept is None:
                raise RoundError(
                    f"{call_id.party} asks for the backward of an exchange that {self.me} does not know.",
                    code="exchange-unknown",
                    where=_where(call_id),
                    why="each forward has one backward",
                )
            tokens = kept.rows.counts_M if kept.rows.routing_weights_P is not None else kept.rows.ids_P
            if grad.shape != (tokens.shape[0], kept.rows.x_MD.shape[1]) or not grad.is_floating_point():
                raise _unfit(call_id, "gradient", f"has shape {tuple(grad.shape)}")
            del self._kept[call_id]
        with self._weights(layer) as weights:
            grad = grad.to(kept.rows.x_MD.device)
            grad_x_MD, grad_routing_weights_P, gradients = host_backward(layer, weights, kept, grad)
            staged = {name: value.cpu() for name, value in gradients.items()}
        check_own(
            "gradients of hosted experts",
            staged.values(),
            self._limits.value * max(1, kept.rows.ids_P.shape[0]),
            where=_where(call_id),
        )
        with self._changed:
            self._check_open(call_id)
            self._reserved[call_id.party] -= kept.num_bytes
        stage.finish(layer.index, call_id.address.micro_batch, staged)
        return grad_x_MD, grad_routing_weights_P

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        """The reply to a message of one of `KINDS`.

        - ``dispatch``, body ``{"keep": bool}``: x_MD, counts_M uint8, ids_P uint8 or int32, and routing_weights_P if
          this host is to weight and sum. Reply: the outputs.
        - ``gradient``: the gradient at the outputs. Reply: the gradient at x_MD, and at routing weights if any came.
        - ``tokens``, body ``{"count": int}``. Reply: nothing.

        Raises:
            MessageError: it is no such message, or holds what cannot be computed with; nothing was touched.
        """
        limits = self._limits
        most = {"round": limits.rounds, "micro_batch": limits.micro_batches - 1, "layer": len(self._layers) - 1}
        row = check_request("tokens", self.me, peer, lane, message, most=most)
        for rule, tensor in zip(row.request.tensors, message.tensors, strict=False):
            if tensor.is_floating_point():
                check_received(peer, message.kind, rule.name, tensor, limits.value)
        call_id = CallId(peer, message.address)
        if message.kind == DISPATCH:
            x_MD, counts_M, ids_P, *weights = message.tensors
            rows = Rows(x_MD, counts_M.long(), ids_P.long(), weights[0] if weights else None)
            out = self.forward(call_id, rows, message.body["keep"])
            check_own("outputs of hosted experts", [out], limits.value, where=_where(call_id))
            return message.reply("outputs", tensors=(out,))
        if message.kind == GRADIENT:
            grad_x_MD, grad_routing_weights_P = self.backward(call_id, message.tensors[0])
            grads = (grad_x_MD,) if grad_routing_weights_P is None else (grad_x_MD, grad_routing_weights_P)
            check_own("gradients behind hosted experts", grads, limits.value, where=_where(call_id))
            return message.reply("gradients", tensors=grads)
        self.tokens(peer, message.address.round, message.address.attempt, message.body["count"])
        return message.reply("counted")

    def _layer(self, call_id: CallId) -> ExpertLayer:
        layer = call_id.address.layer
        if layer not in self.shard.hosted:
            raise _unfit(call_id, "layer", f"{layer} has no expert hosted by {self.me}")
        return self._layers[layer]

    def _checked(self, call_id: CallId, layer: ExpertLayer, rows: Rows) -> Rows:
        """The rows on the computing device, with ids that count the hosted experts. Nothing is trusted."""
        weights, hosted = self.shard.weights(layer.index), self.shard.hosted[layer.index]
        device = weights["down_proj"].device
        width = _input_width(layer, weights)
        x_MD, counts_M, ids_P, routing_weights_P = rows.x_MD, rows.counts_M, rows.ids_P, rows.routing_weights_P
        if x_MD.ndim != 2 or x_MD.shape[1] != width or not x_MD.is_floating_point():
            raise _unfit(call_id, "hidden", f"has shape {tuple(x_MD.shape)} and dtype {x_MD.dtype}, width is {width}")
        if counts_M.shape != x_MD.shape[:1] or ids_P.ndim != 1:
            raise _unfit(call_id, "counts", "is not one number for each token")
        if bool(((counts_M < 1) | (counts_M > len(hosted))).any()) or int(counts_M.sum()) != ids_P.shape[0]:
            raise _unfit(call_id, "counts", "does not add up to the number of ids")
        if routing_weights_P is not None and (
            routing_weights_P.shape != ids_P.shape or not routing_weights_P.is_floating_point()
        ):
            raise _unfit(
                call_id, "weights", f"has shape {tuple(routing_weights_P.shape)} and dtype {routing_weights_P.dtype}"
            )
        if bool(((ids_P < 0) | (ids_P >= layer.num_experts)).any()):
            raise _unfit(call_id, "ids", f"leave the range of {layer.num_experts} experts")
        local_E = torch.full((layer.num_experts,), -1, device=ids_P.device)
        local_E[list(hosted)] = torch.arange(len(hosted), device=ids_P.device)
        local_P = local_E[ids_P]
        if bool((local_P < 0).any()):
            raise MessageError(
                f"{call_id.party} sends tokens to an expert that {self.me} does not host.",
                code="expert-not-hosted",
                where=_where(call_id),
                why="the two sides disagree on who hosts which expert",
                fix="compare the roster hash on both sides: coterie roster show",
                field="ids",
                peer=call_id.party,
            )
        if self._size(layer, rows) > self._limits.kept_bytes:
            raise _too_much(call_id, self._limits.kept_bytes)
        return Rows(x_MD, counts_M, local_P, routing_weights_P).to(device)

    def _size(self, layer: ExpertLayer, rows: Rows) -> int:
        """Bytes that a forward will keep."""
        weights = self.shard.weights(layer.index)
        if self._recompute:
            return rows.num_bytes
        up = weights[layer.layout.up_name]
        width = up.shape[-1] if layer.layout.is_transposed else up.shape[-2]
        return rows.num_bytes + rows.ids_P.shape[0] * width * up.element_size()

    def _reserve(self, call_id: CallId, size: int) -> None:
        with self._changed:
            self._check_open(call_id)
            if call_id in self._kept:
                raise RoundError(
                    f"{call_id.party} makes the same exchange twice.", code="exchange-twice", where=_where(call_id)
                )
            if self._reserved[call_id.party] + size > self._limits.kept_bytes:
                raise _too_much(call_id, self._limits.kept_bytes)
            self._reserved[call_id.party] += size

    def _stage(self, party: str, wanted: RoundId) -> PartyStage:
        """The party's stage, when this host has begun the attempt; a faster party waits for it here."""
        round_no, attempt = wanted
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or wanted <= (self._open or (-1, 0)) or wanted <= self._last_over,
                self._limits.begin_s,
            )
            if self._closed:
                raise RoundError(
                    f"{self.me} is leaving.",
                    code="host-closed",
                    fix="start everybody again with `coterie resume`: all go on from the newest common checkpoint",
                )
            if self._open != wanted:
                raise (
                    _attempt_over(round_no, attempt)
                    if wanted <= max(self._last_over, self._open or self._last_over)
                    else RoundError(
                        f"{self.me} has not begun round {round_no}, attempt {attempt}.",
                        code="round-not-begun",
                        why=f"{party} is ahead of it by more than {self._limits.begin_s:g} s",
                    )
                )
            if party not in self._stages:
                raise RoundError(f"{party} does not take part in round {round_no}.", code="party-not-in-round")
            return self._stages[party]

    def _check_open(self, call_id: CallId) -> None:
        if self._open != call_id.round_id:
            raise _attempt_over(*call_id.round_id)

    @contextmanager
    def _weights(self, layer: ExpertLayer) -> Iterator[dict[str, Tensor]]:
        """The layer's weights, which do not change inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._stepping)
            self._computing += 1
        try:
            yield self.shard.weights(layer.index)
        finally:
            with self._changed:
                self._computing -= 1
                self._changed.notify_all()


def _input_width(layer: ExpertLayer, weights: dict[str, Tensor]) -> int:
    up = weights[layer.layout.up_name]
    return up.shape[-2] if layer.layout.is_transposed else up.shape[-1]


def _where(call_id: CallId) -> str:
    at = call_id.address
    return f"{call_id.party}, round {at.round}, attempt {at.attempt}, micro-batch {at.micro_batch}, layer {at.layer}"


def _attempt_over(round_no: int, attempt: int) -> RoundError:
    return RoundError(
        f"round {round_no}, attempt {attempt} is over or was never open here.",
        code="round-over",
        why="its gradients would be added to another round's",
    )


def _unfit(call_id: CallId, field: str, problem: str) -> MessageError:
    return MessageError(
        f"{call_id.party} sent something that does not fit: {field} {problem}.",
        code="exchange-unfit",
        where=_where(call_id),
        why="both sides must run the same model, placement and version",
        field=field,
        peer=call_id.party,
    )


def _too_much(call_id: CallId, limit: int) -> FrameError:
    return FrameError(
        f"{call_id.party} asks for more than {limit / 2**30:.3g} GiB at once.",
        code="exchange-too-large",
        where=_where(call_id),
        why="a peer must not be able to use up this host's memory",
        fix="smaller micro-batches or fewer in flight",
    )
