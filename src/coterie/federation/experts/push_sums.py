"""Noised sums on their way up, the owner's side: bytes that were spooled already are sent, as often as needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from coterie.errors import FrameError, TransportError
from coterie.federation.experts.parts import AHEAD, Part, chunks_in, digest_of, span
from coterie.federation.experts.take_sums import BEGIN, CHUNK, END, LANE
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.messages import unfit
from coterie.federation.wire.transport import Message, Transport


@dataclass(frozen=True)
class Push:
    """One part to be brought to its host.

    Attributes:
        make: its bytes, uint8, exactly the spooled ones; the same at every call.
        weights: digest of this part's weights that the sum was computed on.
    """

    part: Part
    make: Callable[[], Tensor]
    weights: str


class _Announced(NamedTuple):
    """A part that its host knows of, its bytes, and what the host answers."""

    push: Push
    blob: Tensor
    reply: Future[Message]


class _Sent(NamedTuple):
    """A part that is under way, its size, and what the host answers for each chunk."""

    push: Push
    size: int
    chunks: list[Future[Message]]


class Pusher:
    """Brings parts to their hosts."""

    def __init__(self, transport: Transport, *, deadline_s: float, retries: int = 3) -> None:
        self._transport = transport
        self._deadline_s = deadline_s
        self._retries = retries

    def push_all(self, items: Sequence[Push], attempt: Attempt) -> None:
        """Bring parts to one host in their order; returns when it has staged them all.

        The next parts begin before the host has answered for one, so that a slow line never idles between two; of
        large parts one is in memory at a time. A part whose connection breaks is brought again.

        Raises:
            TransportError: the host did not answer, also after retries.
            RoundError, FrameError: the host refused a part.
        """
        begun: deque[_Announced] = deque()
        sent: deque[_Sent] = deque()
        ends: list[tuple[Push, Future[Message]]] = []
        announced = under_way = 0
        for item in items:
            begun.append(self._announce(item, attempt))
            announced += begun[-1].blob.numel()
            while begun and (announced >= AHEAD or item is items[-1]):
                sent.append(self._send_chunks(begun.popleft(), attempt))
                announced -= sent[-1].size
                under_way += sent[-1].size
                while sent and (under_way >= AHEAD or (item is items[-1] and not begun)):
                    under_way -= sent[0].size
                    ends.append((sent[0].push, self._end(sent.popleft(), attempt)))
        for item, future in ends:
            try:
                future.result()
            except TransportError as error:
                if isinstance(error, FrameError):
                    raise
                self._push_again(item, attempt)

    def _push_again(self, item: Push, attempt: Attempt) -> None:
        for tries_left in range(self._retries, -1, -1):
            try:
                self._end(self._send_chunks(self._announce(item, attempt), attempt), attempt).result()
                return
            except TransportError as error:
                if tries_left == 0 or isinstance(error, FrameError):
                    raise

    def _announce(self, item: Push, attempt: Attempt) -> _Announced:
        blob = item.make()
        body = {"digest": digest_of(blob), "size": blob.numel(), "weights": item.weights}
        reply = self._ask(item.part, Message(BEGIN, attempt.address(part=item.part.number), body))
        return _Announced(item, blob, reply)

    def _send_chunks(self, announced: _Announced, attempt: Attempt) -> _Sent:
        """Send what the host is missing; a host that could not be asked has that error as its only answer."""
        part, blob, size = announced.push.part, announced.blob, announced.blob.numel()
        try:
            missing: list[int] = announced.reply.result().body["missing"]
        except TransportError as error:
            return _Sent(announced.push, size, [_failed(error)])
        if max(missing, default=0) >= max(chunks_in(size), 1):
            beyond = unfit(part.host, BEGIN, "missing", f"names chunks beyond {chunks_in(size)}")
            return _Sent(announced.push, size, [_failed(beyond)])
        chunks = [
            self._ask(part, Message(CHUNK, attempt.address(part=part.number, chunk=number), tensors=(chunk,)))
            for number in missing
            for chunk in [blob[span(size, number)]]
        ]
        return _Sent(announced.push, size, chunks)

    def _end(self, sent: _Sent, attempt: Attempt) -> Future[Message]:
        """Say that the part is whole, once the host has answered for every chunk."""
        for future in sent.chunks:
            try:
                future.result()
            except TransportError as error:
                return _failed(error)
        return self._ask(sent.push.part, Message(END, attempt.address(part=sent.push.part.number)))

    def _ask(self, part: Part, message: Message) -> Future[Message]:
        try:
            return self._transport.request_async(part.host, LANE, message, self._deadline_s)
        except TransportError as error:
            return _failed(error)


def _failed(error: TransportError) -> Future[Message]:
    future: Future[Message] = Future()
    future.set_exception(error)
    return future
