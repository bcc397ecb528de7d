"""Noised sums on their way up: an owner pushes spooled bytes, a host stages them once and sums over parties.

A push is identified by (party, round, part) and its digest. The same bytes may come any number of times, after a
broken line, a restart or a retry of the attempt, and count once; other bytes under the same name are refused.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from coterie.errors import FrameError, RoundError, TransportError
from coterie.federation.messages import answer, unfit
from coterie.federation.parts import AHEAD, CHUNK, Part, digest_of, span
from coterie.federation.transport import Lane, Message, Transport
from coterie.federation.values import check_received

BEGIN, CHUNK_KIND, END = "push-begin", "push-chunk", "push-end"
LANE = Lane.BACKWARD

Limit = Callable[[str, str], float]
"""``limit(party, name)``: largest size of a value in a party's sum of the tensor of that name."""


@dataclass
class _Incoming:
    digest: str
    blob: Tensor
    seen: set[int] = field(default_factory=set)

    @property
    def chunks(self) -> int:
        return -(-self.blob.numel() // CHUNK)


class PushService:
    """The host's side: pushes of the present round, staged until the commit.

    Args:
        parts: the parts this party stores.
        dtype: what crosses, float32 or bfloat16.
        parties: who may push, in the order in which sums are added up.
        limit: see `Limit`; asked when a push is whole.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        dtype: torch.dtype,
        parties: tuple[str, ...],
        limit: Limit = lambda party, name: math.inf,
    ) -> None:
        self._limit = limit
        self._parts = {part.number: part for part in parts}
        self._dtype = dtype
        self._parties = parties
        self._round = -1
        self._weights: Mapping[int, str] = {}
        self._incoming: dict[tuple[str, int], _Incoming] = {}
        self._staged: dict[tuple[str, int], tuple[str, Tensor]] = {}
        self._lock = threading.Lock()

    def begin_round(self, round: int, weights: Mapping[int, str]) -> None:
        """Take pushes of this round, computed on weights with these digests by part number.

        What was staged for the same round and weights stays: a retry of the attempt need not send it again.
        """
        with self._lock:
            if (round, weights) != (self._round, self._weights):
                self._incoming.clear()
                self._staged.clear()
            self._round, self._weights = round, dict(weights)

    def handle(self, peer: str, message: Message) -> Message:
        """Answer one step of a push; the reply of ``push-begin`` names the chunks that are missing.

        Raises:
            RoundError: another round, another version of the weights, a party outside the roster, or other bytes
                than before (code push-changed).
            MessageError: wrong size or span, or values that no honest sum has.
        """
        with self._lock:
            part = self._check(peer, message)
            key = (peer, part.number)
            if message.kind == BEGIN:
                missing = self._begin(key, part, message)
                return answer(message, BEGIN, {"missing": missing})
            if message.kind == CHUNK_KIND:
                self._chunk(key, message)
            elif key not in self._staged:
                self._finish(key, part)
            return answer(message, message.kind)

    def stage(self, party: str, number: int, round: int, blob: Tensor, weights: str) -> None:
        """Stage a whole part at once, as the party itself does for what it hosts; the same checks as `handle`."""
        body = {"digest": digest_of(blob), "size": blob.numel(), "weights": weights}
        missing = self.handle(party, Message(BEGIN, round, layer=number, body=body)).body["missing"]
        with self._lock:
            incoming = self._incoming.get((party, number))
            if incoming is not None:
                incoming.blob.copy_(blob)
                incoming.seen.update(missing)
        self.handle(party, Message(END, round, layer=number))

    def sums(self, number: int, contributing: tuple[str, ...]) -> dict[str, Tensor]:
        """The staged sums of one part added up in roster order, float32.

        Raises:
            RoundError: a contributing party's push is not complete.
        """
        with self._lock:
            part, total = self._parts[number], None
            for party in self._parties:
                if party not in contributing:
                    continue
                if (party, number) not in self._staged:
                    raise RoundError(f"the push of {party} for part {number} is not complete.", code="push-missing")
                values = self._staged[party, number][1].view(self._dtype).to(torch.float32)
                total = values.clone() if total is None else total.add_(values)
            if total is None:
                total = torch.zeros(part.num_values)
            return part.decode(total.view(torch.uint8), torch.float32)

    def complete(self, party: str) -> bool:
        """Whether every part of this party's push is staged."""
        with self._lock:
            return all((party, number) in self._staged for number, part in self._parts.items() if part.trained)

    def _check(self, peer: str, message: Message) -> Part:
        if peer not in self._parties:
            raise RoundError(f"{peer} is not a party of this federation.", code="push-stranger")
        if message.round != self._round:
            raise RoundError(
                f"{peer} pushed for round {message.round}; round {self._round} is open.", code="push-round"
            )
        part = self._parts.get(message.layer)
        if part is None:
            raise RoundError(f"part {message.layer} is not stored here.", code="push-not-here")
        return part

    def _begin(self, key: tuple[str, int], part: Part, message: Message) -> list[int]:
        digest, size, due = message.body["digest"], message.body["size"], part.num_bytes(self._dtype)
        if size != due:
            raise unfit(key[0], BEGIN, "size", f"of part {part.number} is {size} bytes, not {due}")
        if message.body["weights"] != self._weights.get(part.number):
            raise RoundError(
                f"{key[0]} computed part {part.number} on other weights than this round's.",
                code="push-stale-weights",
                why="a sum for one version of the weights must not be applied to another",
                fix="the round is burned at that party and drawn anew",
            )
        known = self._staged[key][0] if key in self._staged else None
        if key in self._incoming:
            known = self._incoming[key].digest
        if known is not None and known != digest:
            raise RoundError(
                f"{key[0]} pushed part {part.number} of round {message.round} twice with different bytes.",
                code="push-changed",
                why="two noised results for one lot would reveal more than the ledger says",
                fix="the second one is refused; the party's spool should hold the first",
            )
        if key in self._staged:
            return []
        incoming = self._incoming.setdefault(
            key, _Incoming(digest, torch.empty(part.num_bytes(self._dtype), dtype=torch.uint8))
        )
        return [number for number in range(incoming.chunks) if number not in incoming.seen]

    def _chunk(self, key: tuple[str, int], message: Message) -> None:
        if key in self._staged:
            return
        incoming, number = self._incoming.get(key), message.exchange
        if incoming is None:
            raise RoundError(f"{key[0]} sends a chunk of a push that it did not begin.", code="push-not-begun")
        if number >= incoming.chunks:
            raise unfit(key[0], CHUNK_KIND, "exchange", f"is {number} of {incoming.chunks} chunks")
        start, end = span(incoming.blob.numel(), number)
        (chunk,) = message.tensors
        if chunk.numel() != end - start:
            raise unfit(key[0], CHUNK_KIND, "bytes", f"of chunk {number} are {chunk.numel()}, not {end - start}")
        incoming.blob[start:end] = chunk
        incoming.seen.add(number)

    def _finish(self, key: tuple[str, int], part: Part) -> None:
        incoming = self._incoming.get(key)
        if incoming is None:
            raise RoundError(f"{key[0]} ends a push that it did not begin.", code="push-not-begun")
        if len(incoming.seen) != incoming.chunks:
            raise unfit(key[0], END, "chunks", f"came {len(incoming.seen)} of {incoming.chunks}")
        del self._incoming[key]
        if digest_of(incoming.blob) != incoming.digest:
            raise unfit(key[0], END, "digest", f"of part {part.number} is another than was announced")
        for name, values in part.decode(incoming.blob, self._dtype).items():
            where = f"part {part.number}, round {self._round}"
            check_received(key[0], END, f"sum of {name}", values, self._limit(key[0], name), where=where)
        self._staged[key] = (incoming.digest, incoming.blob)


@dataclass(frozen=True)
class Push:
    """One part to be brought to its host.

    Attributes:
        blob: uint8, exactly the spooled bytes.
        weights: digest of this part's weights that the sum was computed on.
    """

    part: Part
    blob: Tensor
    weights: str

    @cached_property
    def digest(self) -> str:
        """Of the blob."""
        return digest_of(self.blob)


class Pusher:
    """The owner's side: sends bytes that were already spooled, as often as needed."""

    def __init__(self, transport: Transport, *, deadline_s: float, retries: int = 3) -> None:
        self._transport = transport
        self._deadline_s = deadline_s
        self._retries = retries

    def push(self, part: Part, round: int, blob: Tensor, weights: str) -> None:
        """Bring one part to its host; returns when the host has staged it.

        Args:
            blob: uint8, exactly the spooled bytes.
            weights: digest of this part's weights that the sum was computed on.

        Raises:
            TransportError: the host did not answer, also after retries.
            RoundError, FrameError: the host refused it.
        """
        for tries_left in range(self._retries, -1, -1):
            try:
                self._once(Push(part, blob, weights), round)
                return
            except TransportError as error:
                if tries_left == 0 or isinstance(error, FrameError):
                    raise

    def push_all(self, items: Sequence[Push], round: int) -> None:
        """Bring parts to one host in their order; returns when it has staged them all.

        The next parts begin before the host has answered for one, so that a slow line never idles between two. A
        part whose line breaks is brought again by `push`.

        Raises:
            As `push`.
        """
        begun: deque[tuple[Push, Future[Message]]] = deque()
        sent: deque[tuple[Push, list[Future[Message]]]] = deque()
        ends: list[tuple[Push, Future[Message]]] = []
        announced = under_way = 0
        for item in items:
            begun.append((item, self._announce(item, round)))
            announced += item.blob.numel()
            while begun and (announced >= AHEAD or item is items[-1]):
                first, reply = begun.popleft()
                announced -= first.blob.numel()
                sent.append((first, self._send_chunks(first, round, reply)))
                under_way += first.blob.numel()
                while sent and (under_way >= AHEAD or (item is items[-1] and not begun)):
                    done, chunks = sent.popleft()
                    under_way -= done.blob.numel()
                    ends.append((done, self._end(done, round, chunks)))
        for item, future in ends:
            try:
                future.result()
            except TransportError as error:
                if isinstance(error, FrameError):
                    raise
                self.push(item.part, round, item.blob, item.weights)

    def _once(self, item: Push, round: int) -> None:
        self._end(item, round, self._send_chunks(item, round, self._announce(item, round))).result()

    def _announce(self, item: Push, round: int) -> Future[Message]:
        body = {"digest": item.digest, "size": item.blob.numel(), "weights": item.weights}
        return self._ask(item.part, Message(BEGIN, round, layer=item.part.number, body=body))

    def _send_chunks(self, item: Push, round: int, reply: Future[Message]) -> list[Future[Message]]:
        """What the host is missing; a host that could not be asked has that error as its only answer."""
        try:
            missing: list[int] = reply.result().body["missing"]
        except TransportError as error:
            return [_failed(error)]
        chunks = -(-item.blob.numel() // CHUNK)
        if max(missing, default=0) >= max(chunks, 1):
            return [_failed(unfit(item.part.host, BEGIN, "missing", f"names chunks beyond {chunks}"))]
        return [
            self._ask(
                item.part,
                Message(
                    CHUNK_KIND,
                    round,
                    layer=item.part.number,
                    exchange=number,
                    tensors=(item.blob[slice(*span(item.blob.numel(), number))],),
                ),
            )
            for number in missing
        ]

    def _end(self, item: Push, round: int, chunks: list[Future[Message]]) -> Future[Message]:
        """Say that the part is whole, once the host has answered for every chunk."""
        for future in chunks:
            try:
                future.result()
            except TransportError as error:
                return _failed(error)
        return self._ask(item.part, Message(END, round, layer=item.part.number))

    def _ask(self, part: Part, message: Message) -> Future[Message]:
        try:
            return self._transport.request_async(part.host, LANE, message, self._deadline_s)
        except TransportError as error:
            return _failed(error)


def _failed(error: TransportError) -> Future[Message]:
    future: Future[Message] = Future()
    future.set_exception(error)
    return future
