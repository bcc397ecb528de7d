"""Weights on their way down, the owner's side: all parts, in the same way every round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import CoterieError, MessageError, TransportError
from coterie.federation.experts.parts import Part, chunks_in, digest_of, span
from coterie.federation.experts.serve_weights import CHUNK, LANE, OFFER
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.messages import unfit
from coterie.federation.wire.replies import gather
from coterie.federation.wire.transport import Message, Transport
from coterie.federation.wire.values import check_received


@dataclass(frozen=True)
class Offer:
    """What a host serves.

    Attributes:
        digest: of a part's bytes.
        received: the newest round of which it holds a complete sum from the asking party; 0 if none.
    """

    digest: str
    received: int


@dataclass
class Transfer:
    """A part on its way.

    Attributes:
        blob: its bytes, as far as they have come.
        futures: the chunks that were asked for, with their answers to come.
    """

    part: Part
    attempt: Attempt
    dtype: torch.dtype
    blob: Tensor
    futures: list[tuple[int, Future[Message]]]

    def collect(self) -> tuple[list[int], CoterieError | None]:
        """Take in every answer; returns the chunks that did not come, with the first error.

        Raises:
            MessageError: an answer does not fit; the host would give it again.
        """
        missing: list[int] = []
        first: CoterieError | None = None
        for number, future in self.futures:
            place = self.blob[span(self.blob.numel(), number)]
            try:
                (chunk,) = future.result().tensors
                if chunk.numel() != place.numel():
                    raise unfit(self.part.host, CHUNK, "bytes", f"are {chunk.numel()}; asked for {place.numel()}")
                place.copy_(chunk)
            except MessageError:
                raise
            except TransportError as error:
                missing.append(number)
                first = first or error
        return missing, first


class WeightFetcher:
    """Every part, in the fixed order, whatever the lot.

    A transfer that breaks goes on with the chunks that are missing.

    Args:
        value_limit: largest size of a weight that is taken.
    """

    def __init__(
        self, transport: Transport, *, deadline_s: float, retries: int = 3, value_limit: float = math.inf
    ) -> None:
        self._value_limit = value_limit
        self._transport = transport
        self._deadline_s = deadline_s
        self._retries = retries

    def offers(
        self, parts: Sequence[Part], attempt: Attempt, dtype: torch.dtype, cancelled: Future[None] | None = None
    ) -> dict[int, Offer]:
        """What hosts serve for parts in this attempt, by part number; all are asked at once.

        A host that has not begun the attempt answers when it does; ``cancelled`` ends the wait for it.

        Raises:
            MessageError: a host offers another size than the model's.
            RoundError, TransportError: a host serves another attempt, or is gone; or ``cancelled`` was set.
        """
        futures = {part: self._ask(part, Message(OFFER, attempt.address(part=part.number))) for part in parts}
        replies = gather(futures, cancelled, self._deadline_s, f"weights of {attempt}", lambda part: part.host)
        return {part.number: _offered(part, reply, dtype) for part, reply in replies.items()}

    def fetch(self, part: Part, attempt: Attempt, dtype: torch.dtype, digest: str) -> Tensor:
        """The bytes of one part, uint8; see `begin` and `finish`."""
        return self.finish(self.begin(part, attempt, dtype), digest)

    def begin(self, part: Part, attempt: Attempt, dtype: torch.dtype) -> Transfer:
        """Ask for all chunks of a part and return at once."""
        blob = torch.empty(part.num_bytes(dtype), dtype=torch.uint8)
        return Transfer(part, attempt, dtype, blob, self._request(part, attempt, range(chunks_in(blob.numel()))))

    def finish(self, transfer: Transfer, digest: str) -> Tensor:
        """Wait for a part; returns its bytes, uint8.

        Args:
            transfer: what `begin` returned.
            digest: what `offers` gave.

        Raises:
            TransportError: the host did not answer, also after retries.
            MessageError: the bytes do not have that digest, or are no numbers to compute with.
        """
        part = transfer.part
        for tries_left in range(self._retries, -1, -1):
            missing, error = transfer.collect()
            if not missing:
                break
            if tries_left == 0 and error is not None:
                raise error
            transfer.futures = self._request(part, transfer.attempt, missing)
        if digest_of(transfer.blob) != digest:
            raise MessageError(
                f"{part.host} served part {part.number} with other bytes than it offered.",
                code="weights-changed",
                why="every pass over a record must see the same weights",
                fix="the attempt is aborted; look at the host's own log",
                peer=part.host,
            )
        values = transfer.blob.view(transfer.dtype)
        check_received(part.host, CHUNK, "weights", values, self._value_limit, where=str(part))
        return transfer.blob

    def _request(self, part: Part, attempt: Attempt, wanted: Iterable[int]) -> list[tuple[int, Future[Message]]]:
        """Ask for chunks; one that cannot even be asked for has its error in the future."""
        futures = []
        for number in wanted:
            try:
                future = self._ask(part, Message(CHUNK, attempt.address(part=part.number, chunk=number)))
            except TransportError as error:
                future = Future()
                future.set_exception(error)
            futures.append((number, future))
        return futures

    def _ask(self, part: Part, message: Message) -> Future[Message]:
        return self._transport.request_async(part.host, LANE, message, self._deadline_s)


def _offered(part: Part, reply: Message, dtype: torch.dtype) -> Offer:
    digest, size, received = (reply.body[name] for name in ("digest", "size", "received"))
    if size != part.num_bytes(dtype):
        raise unfit(part.host, OFFER, "size", f"of part {part.number} is {size} bytes, not {part.num_bytes(dtype)}")
    return Offer(digest, received)
