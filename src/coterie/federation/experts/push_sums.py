"""Noised sums on their way up, the owner's side: bytes that were spooled already are sent, as often as needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

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
    """Brings parts to their hosts."""

    def __init__(self, transport: Transport, *, deadline_s: float, retries: int = 3) -> None:
        self._transport = transport
        self._deadline_s = deadline_s
        self._retries = retries

    def push_all(self, items: Sequence[Push], attempt: Attempt) -> None:
        """Bring parts to one host in their order; returns when it has staged them all.

        The next parts begin before the host has answered for one, so that a slow line never idles between two. A
        part whose connection breaks is brought again.

        Raises:
            TransportError: the host did not answer, also after retries.
            RoundError, FrameError: the host refused a part.
        """
        begun: deque[tuple[Push, Future[Message]]] = deque()
        sent: deque[tuple[Push, list[Future[Message]]]] = deque()
        ends: list[tuple[Push, Future[Message]]] = []
        announced = under_way = 0
        for item in items:
            begun.append((item, self._announce(item, attempt)))
            announced += item.blob.numel()
            while begun and (announced >= AHEAD or item is items[-1]):
                first, reply = begun.popleft()
                announced -= first.blob.numel()
                sent.append((first, self._send_chunks(first, attempt, reply)))
                under_way += first.blob.numel()
                while sent and (under_way >= AHEAD or (item is items[-1] and not begun)):
                    done, chunks = sent.popleft()
                    under_way -= done.blob.numel()
                    ends.append((done, self._end(done, attempt, chunks)))
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
                reply = self._announce(item, attempt)
                self._end(item, attempt, self._send_chunks(item, attempt, reply)).result()
                return
            except TransportError as error:
                if tries_left == 0 or isinstance(error, FrameError):
                    raise

    def _announce(self, item: Push, attempt: Attempt) -> Future[Message]:
        body = {"digest": item.digest, "size": item.blob.numel(), "weights": item.weights}
        return self._ask(item.part, Message(BEGIN, attempt.address(part=item.part.number), body))

    def _send_chunks(self, item: Push, attempt: Attempt, reply: Future[Message]) -> list[Future[Message]]:
        """What the host is missing; a host that could not be asked has that error as its only answer."""
        try:
            missing: list[int] = reply.result().body["missing"]
        except TransportError as error:
            return [_failed(error)]
        part, size = item.part, item.blob.numel()
        if max(missing, default=0) >= max(chunks_in(size), 1):
            return [_failed(unfit(part.host, BEGIN, "missing", f"names chunks beyond {chunks_in(size)}"))]
        return [
            self._ask(part, Message(CHUNK, attempt.address(part=part.number, chunk=number), tensors=(chunk,)))
            for number in missing
            for chunk in [item.blob[span(size, number)]]
        ]

    def _end(self, item: Push, attempt: Attempt, chunks: list[Future[Message]]) -> Future[Message]:
        """Say that the part is whole, once the host has answered for every chunk."""
        for future in chunks:
            try:
                future.result()
            except TransportError as error:
                return _failed(error)
        return self._ask(item.part, Message(END, attempt.address(part=item.part.number)))

    def _ask(self, part: Part, message: Message) -> Future[Message]:
        try:
            return self._transport.request_async(part.host, LANE, message, self._deadline_s)
        except TransportError as error:
            return _failed(error)


def _failed(error: TransportError) -> Future[Message]:
    future: Future[Message] = Future()
    future.set_exception(error)
    return future
