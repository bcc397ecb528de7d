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
        still: the values from one to another of a part that is never trained, read anew whenever they are asked for.
            None: there are no such parts, or all are held like the others.

    Guarantee: between two calls of `begin` a part is read once and always the same bytes are served; of a part that
    is never trained the digest is always the same.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        read: Callable[[Part], Mapping[str, Tensor]],
        dtype: torch.dtype,
        value_limit: float = math.inf,
        still: Callable[[Part, int, int, torch.dtype], Tensor] | None = None,
    ) -> None:
        self._value_limit = value_limit
        self._still = still
        self._still_digests: dict[int, str] = {}
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
        attempt = Attempt.of(message)
        digest = self.digest(part, attempt)
        size = self._parts[part].num_bytes(self._dtype)
        if message.kind == OFFER:
            return message.reply(OFFER, {"digest": digest, "size": size, "received": received})
        if chunk >= chunks_in(size):
            raise unfit(peer, CHUNK, "chunk", f"is {chunk} of {chunks_in(size)} chunks of part {part}")
        return message.reply(CHUNK, tensors=(self.read(part, attempt, span(size, chunk)),))

    def read(self, number: int, attempt: Attempt, where: slice = slice(None)) -> Tensor:
        """Bytes of a part in this attempt, uint8, or some of them.

        Raises:
            RoundError: as `digest`; or a part that is read whole is not what its digest says.
        """
        blob, digest = self._frozen(number, attempt)
        if blob is not None:
            return blob[where]
        read = self._read_still(self._parts[number], where)
        if where == slice(None) and digest_of(read) != digest:
            raise RoundError(
                f"{self._parts[number]} changed after it was offered.",
                code="weights-changed",
                why="this party would compute on other weights than the others",
                fix="put the shard back as it was, and start this party again",
            )
        return read

    def digest(self, number: int, attempt: Attempt) -> str:
        """Digest of a part in this attempt.

        Raises:
            RoundError: another attempt, a part that is not stored here, or weights that diverged.
        """
        return self._frozen(number, attempt)[1]

    def _frozen(self, number: int, attempt: Attempt) -> tuple[Tensor | None, str]:
        """Bytes, where they are held, and digest."""
        with self._lock:
            if attempt != self._open:
                raise RoundError(
                    f"weights of {attempt} were asked for; those of {self._open or 'none'} are served.",
                    code="weights-round",
                    fix="both sides report to the coordinator, which starts the attempt again",
                )
            if number not in self._parts:
                raise RoundError(f"part {number} is not stored here.", code="weights-not-here")
            part = self._parts[number]
            if self._still is not None and part.layer >= 0 and not part.trained:
                if number not in self._still_digests:
                    self._still_digests[number] = self._checked_digest(part, self._read_still(part, slice(None)))
                return None, self._still_digests[number]
            if number not in self._blobs:
                blob = part.encode(self._read(part), self._dtype)
                self._blobs[number] = (blob, self._checked_digest(part, blob))
            return self._blobs[number]

    def _read_still(self, part: Part, where: slice) -> Tensor:
        if self._still is None:
            raise RuntimeError(f"{part} is held, not read")
        start, stop, _ = where.indices(part.num_bytes(self._dtype))
        size = self._dtype.itemsize
        return self._still(part, start // size, stop // size, self._dtype).view(torch.uint8)

    def _checked_digest(self, part: Part, blob: Tensor) -> str:
        check_own("weights of this host", [blob.view(self._dtype)], self._value_limit, where=str(part))
        return digest_of(blob)
