"""Weights on their way down: a host serves its parts, an owner fetches all of them, the same way every round."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import CoterieError, MessageError, RoundError, TransportError
from coterie.federation.messages import answer, unfit
from coterie.federation.parts import CHUNK, Part, digest_of, span, spans
from coterie.federation.transport import Lane, Message, Transport
from coterie.federation.values import check_own, check_received

OFFER, CHUNK_KIND = "weights-offer", "weights-chunk"
LANE = Lane.FORWARD


class WeightService:
    """The host's side: the parts it stores, frozen for the length of a round.

    Args:
        parts: the parts this party stores.
        read: the present weights of a part, any dtype.
        dtype: what crosses.
        value_limit: largest size of a weight that is served.

    Guarantee: between two calls of `begin_round` a part is read once and always the same bytes are served.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        read: Callable[[Part], Mapping[str, Tensor]],
        dtype: torch.dtype,
        value_limit: float = math.inf,
    ) -> None:
        self._value_limit = value_limit
        self._own = {part.number: part for part in parts}
        self._parts = dict(self._own)
        self._read = read
        self._dtype = dtype
        self._round = -1
        self._blobs: dict[int, tuple[Tensor, str]] = {}
        self._lock = threading.Lock()

    def begin_round(self, round: int, lent: Sequence[Part] = ()) -> None:
        """Serve the weights as they are now under this number, and no other number.

        Args:
            lent: parts of absent hosts that are served in their stead.
        """
        with self._lock:
            if round != self._round:
                self._blobs.clear()
                self._round = round
            self._parts = self._own | {part.number: part for part in lent}

    def handle(self, peer: str, message: Message, received: int = 0) -> Message:
        """Answer an offer or a chunk request.

        Args:
            received: see `Offer`.

        Raises:
            RoundError: another round, or a part that is not stored here.
            MessageError: a span that is not one of the part.
        """
        blob, digest = self.frozen(message.layer, message.round)
        if message.kind == OFFER:
            return answer(message, OFFER, {"digest": digest, "size": blob.numel(), "received": received})
        start, end = message.body["start"], message.body["end"]
        if start % CHUNK or start >= blob.numel() or (start, end) != span(blob.numel(), start // CHUNK):
            raise unfit(peer, CHUNK_KIND, "start", f"and end are {start}:{end}, no chunk of part {message.layer}")
        return answer(message, CHUNK_KIND, tensors=(blob[start:end],))

    def frozen(self, number: int, round: int) -> tuple[Tensor, str]:
        """Bytes and digest of a part in this round.

        Raises:
            RoundError: another round, a part that is not stored here, or weights that diverged.
        """
        with self._lock:
            if round != self._round:
                raise RoundError(
                    f"weights of round {round} were asked for, but round {self._round} is being served.",
                    code="weights-round",
                    fix="both sides report to the coordinator, which starts the attempt again",
                )
            if number not in self._parts:
                raise RoundError(f"part {number} is not stored here.", code="weights-not-here")
            if number not in self._blobs:
                part = self._parts[number]
                blob = part.encode(self._read(part), self._dtype)
                check_own("weights of this host", [blob.view(self._dtype)], self._value_limit, where=_where(part))
                self._blobs[number] = (blob, digest_of(blob))
            return self._blobs[number]


@dataclass(frozen=True)
class Offer:
    """What a host serves.

    Attributes:
        digest: of a part's bytes.
        received: number of the newest round of which it holds a complete sum from the asking party; 0 if none.
    """

    digest: str
    received: int


Span = tuple[int, int]


@dataclass
class Transfer:
    """A part on its way.

    Attributes:
        blob: its bytes, as far as they have come.
        asked: the spans that were asked for, with their answers to come.
    """

    part: Part
    round: int
    dtype: torch.dtype
    blob: Tensor
    asked: list[tuple[Span, Future[Message]]]

    def collect(self) -> tuple[list[Span], CoterieError | None]:
        """Take in every answer; returns the spans that did not come, with the first error.

        Raises:
            MessageError: an answer does not fit; the host would give it again.
        """
        missing: list[Span] = []
        first: CoterieError | None = None
        for (start, end), future in self.asked:
            try:
                (chunk,) = future.result().tensors
                if chunk.numel() != end - start:
                    raise unfit(self.part.host, CHUNK_KIND, "bytes", f"are {chunk.numel()}; asked for {end - start}")
                self.blob[start:end] = chunk
            except MessageError:
                raise
            except TransportError as error:
                missing.append((start, end))
                first = first or error
        return missing, first


class WeightFetcher:
    """The owner's side: every part, in the fixed order, whatever the lot.

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

    def offers(self, parts: Sequence[Part], round: int, dtype: torch.dtype) -> dict[int, Offer]:
        """What hosts serve for parts in this round, by part number; all are asked at once.

        Raises:
            MessageError: a host offers another size than the model's.
            RoundError, TransportError: a host serves another round, or is gone.
        """
        asked = [(part, self._ask(part, Message(OFFER, round, layer=part.number))) for part in parts]
        return {part.number: _offered(part, future.result(), dtype) for part, future in asked}

    def fetch(self, part: Part, round: int, dtype: torch.dtype, digest: str) -> Tensor:
        """The bytes of one part, uint8; see `begin` and `finish`."""
        return self.finish(self.begin(part, round, dtype), digest)

    def begin(self, part: Part, round: int, dtype: torch.dtype) -> Transfer:
        """Ask for all chunks of a part and return at once."""
        blob = torch.empty(part.num_bytes(dtype), dtype=torch.uint8)
        return Transfer(part, round, dtype, blob, self._request(part, round, spans(blob.numel())))

    def finish(self, transfer: Transfer, digest: str) -> Tensor:
        """Wait for a part; returns its bytes, uint8.

        Args:
            digest: what `offers` gave.

        Raises:
            TransportError: the host did not answer, also after retries.
            MessageError: the bytes do not have that digest, or are no numbers to compute with.
        """
        for tries_left in range(self._retries, -1, -1):
            missing, error = transfer.collect()
            if not missing:
                break
            if tries_left == 0 and error is not None:
                raise error
            transfer.asked = self._request(transfer.part, transfer.round, missing)
        if digest_of(transfer.blob) != digest:
            raise MessageError(
                f"{transfer.part.host} served part {transfer.part.number} with other bytes than it offered.",
                code="weights-changed",
                why="every pass over a record must see the same weights",
                fix="the attempt is aborted; look at the host's own log",
                peer=transfer.part.host,
            )
        values = transfer.blob.view(transfer.dtype)
        part = transfer.part
        check_received(part.host, CHUNK_KIND, "weights", values, self._value_limit, where=_where(part))
        return transfer.blob

    def _request(self, part: Part, round: int, wanted: list[Span]) -> list[tuple[Span, Future[Message]]]:
        """Ask for chunks; one that cannot even be asked for has its error in the future."""
        asked = []
        for start, end in wanted:
            message = Message(CHUNK_KIND, round, layer=part.number, body={"start": start, "end": end})
            try:
                future = self._ask(part, message)
            except TransportError as error:
                future = Future()
                future.set_exception(error)
            asked.append(((start, end), future))
        return asked

    def _ask(self, part: Part, message: Message) -> Future[Message]:
        return self._transport.request_async(part.host, LANE, message, self._deadline_s)


def _offered(part: Part, reply: Message, dtype: torch.dtype) -> Offer:
    digest, size, received = (reply.body[name] for name in ("digest", "size", "received"))
    if size != part.num_bytes(dtype):
        raise unfit(part.host, OFFER, "size", f"of part {part.number} is {size} bytes, not {part.num_bytes(dtype)}")
    return Offer(digest, received)


def _where(part: Part) -> str:
    return f"part {part.number} of {part.host}, " + (f"MoE layer {part.layer}" if part.layer >= 0 else "shared trunk")
