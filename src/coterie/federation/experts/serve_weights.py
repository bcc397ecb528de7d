"""Weights on their way down, the host's side: the parts it stores, the same bytes for everybody all attempt long."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from coterie.errors import RoundError
from coterie.federation.experts.parts import Part, chunks_in, digest_of, span
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.messages import unfit
from coterie.federation.wire.transport import Lane, Message
from coterie.federation.wire.values import check_own

OFFER, CHUNK = "weights-offer", "weights-chunk"
LANE = Lane.FORWARD


class WeightService:
    """The parts that a host stores, frozen for the length of an attempt.

    Args:
        parts: the parts this party stores.
        read: the present weights of a part, any dtype.
        dtype: what crosses.
        value_limit: largest size of a weight that is served.

    Guarantee: between two calls of `begin` a part is read once and always the same bytes are served.
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
        self._open: Attempt | None = None
        self._blobs: dict[int, tuple[Tensor, str]] = {}
        self._lock = threading.Lock()

    def begin(self, attempt: Attempt | None, lent: Sequence[Part] = ()) -> None:
        """Serve the weights as they are now for this attempt, and for no other; for none with None.

        Args:
            attempt: the one that requests have to name.
            lent: parts of absent hosts that are served in their stead.
        """
        with self._lock:
            if attempt != self._open:
                self._blobs.clear()
                self._open = attempt
            self._parts = self._own | {part.number: part for part in lent}

    def handle(self, peer: str, message: Message, received: int = 0) -> Message:
        """Answer an offer or a chunk request.

        Args:
            peer: who asks.
            message: the request.
            received: see `fetch_weights.Offer`.

        Raises:
            RoundError: another attempt, or a part that is not stored here.
            MessageError: a chunk that the part has not.
        """
        part, chunk = message.address.part, message.address.chunk
        blob, digest = self.frozen(part, Attempt.of(message))
        if message.kind == OFFER:
            return message.reply(OFFER, {"digest": digest, "size": blob.numel(), "received": received})
        if chunk >= chunks_in(blob.numel()):
            raise unfit(peer, CHUNK, "chunk", f"is {chunk} of {chunks_in(blob.numel())} chunks of part {part}")
        return message.reply(CHUNK, tensors=(blob[span(blob.numel(), chunk)],))

    def frozen(self, number: int, attempt: Attempt) -> tuple[Tensor, str]:
        """Bytes and digest of a part in this attempt.

        Raises:
            RoundError: another attempt, a part that is not stored here, or weights that diverged.
        """
        with self._lock:
            if attempt != self._open:
                raise RoundError(
                    f"weights of {attempt} were asked for; those of {self._open or 'none'} are served.",
                    code="weights-round",
                    fix="both sides report to the coordinator, which starts the attempt again",
                )
            if number not in self._parts:
                raise RoundError(f"part {number} is not stored here.", code="weights-not-here")
            if number not in self._blobs:
                part = self._parts[number]
                blob = part.encode(self._read(part), self._dtype)
                check_own("weights of this host", [blob.view(self._dtype)], self._value_limit, where=str(part))
                self._blobs[number] = (blob, digest_of(blob))
            return self._blobs[number]
