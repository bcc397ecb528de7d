"""Masks: for every pair of parties one stream that one of them adds and the other subtracts.

A push of one party is its integers plus and minus a stream for every other party, modulo 2^(8 width). Added up over
all parties every stream is there once with each sign, and only the sum of the integers is left. Without one of the
parties, the streams that it shares with the others stay, which nobody but the two of a pair can compute.

Streams are AES-256-CTR from a key that HKDF-SHA256 derives for (session, pair, part). A session is one push of all
parties (`coterie.federation.experts.masking.session`), and a key is used for one, so no stream ever masks two values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from coterie.errors import RoundError
from coterie.federation.experts.masking.grid import narrow, overlapping, signed, widen
from coterie.federation.experts.parts import digest_of

_KEY_BYTES = 32
_CHUNK = 1 << 15
"""Values that are masked or added up together: a quarter of a megabyte of 64-bit integers, which caches hold."""

_BLOCK = 16
"""Bytes of one block of the cipher; it asks for room for one more than it fills."""


def derive(secret: bytes, session: bytes, *, info: str) -> bytes:
    """A 256-bit key bound to a session and to what it is for."""
    return HKDF(hashes.SHA256(), _KEY_BYTES, salt=session, info=f"coterie mask: {info}".encode()).derive(secret)


class Masks:
    """One party's masks for one push.

    Args:
        me: this party.
        secrets: what it shares with every other party, by name; forgotten with `erase`.
        session: digest of the agreement, the parties' push serials included, which every key is bound to.
    """

    def __init__(self, me: str, secrets: Mapping[str, bytes], session: bytes) -> None:
        self._me, self._secrets, self._session = me, dict(secrets), session
        self._digests: dict[int, str] = {}

    def mask(self, part: int, integers: Tensor, width: int) -> Tensor:
        """The masked bytes of one part, uint8 [V * width]: uniformly random to whoever lacks one of the secrets.

        Args:
            part: its number. Masked again, it has to be the same integers: nobody need keep what was announced.
            integers: int64 [V].
            width: bytes of one integer.

        Raises:
            RoundError: others of that part were masked already, or there are no secrets, or none any more.
        """
        if not self._secrets:
            raise self._used(part)
        signs_streams = [
            (1 if self._me < other else -1, self._stream(other, secret, part))
            for other, secret in sorted(self._secrets.items())
        ]
        values, out = integers.contiguous().view(-1).numpy(), torch.empty(integers.numel() * width, dtype=torch.uint8)
        target, zeros, room = out.numpy(), bytes(_CHUNK * width), bytearray(_CHUNK * width + _BLOCK)
        for start in range(0, values.shape[0], _CHUNK):
            total = values[start : start + _CHUNK].view(np.uint64).copy()
            size = total.shape[0] * width
            for sign, stream in signs_streams:
                stream.update_into(memoryview(zeros)[:size], room)
                read = overlapping(np.frombuffer(room, np.uint8, size + 8 - width), width)
                if sign > 0:
                    total += read
                else:
                    total -= read
            target[start * width : start * width + size] = narrow(total, width)
        digest = digest_of(out)
        if self._digests.setdefault(part, digest) != digest:
            raise self._used(part)
        return out

    def digest(self, part: int) -> str:
        """Of a part's masked bytes."""
        return self._digests[part]

    def erase(self) -> None:
        """Forget the secrets: with what this object still holds no part can be masked, and none unmasked."""
        self._secrets.clear()

    def _used(self, part: int) -> RoundError:
        return RoundError(
            f"part {part} of this push cannot be masked again.",
            code="mask-used",
            why="two values under one stream would show their difference",
        )

    def _stream(self, other: str, secret: bytes, part: int) -> CipherContext:
        first, second = sorted((self._me, other))
        key = derive(secret, self._session, info=f"part {part}, {first} and {second}")
        return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def masks_of(masked: Tensor, integers: Tensor, width: int) -> Tensor:
    """What was added to a party's integers, uint8 [V * width].

    Added to the sum of all other parties' pushes in place of this party's own, it cancels their masks, and what is
    left is the sum of their integers.

    Args:
        masked: uint8 [V * width], as `Masks.mask` gave it.
        integers: int64 [V], of which it was made.
        width: bytes of one integer.
    """
    added = widen(masked.numpy(), width) - integers.contiguous().view(-1).numpy().view(np.uint64)
    return torch.from_numpy(narrow(added, width))


def unmasked_sum(pushes: Mapping[str, Tensor], width: int) -> Tensor:
    """The sum of all parties' integers of one part, int64 [V].

    Args:
        pushes: masked bytes by party, one at least; with one party missing the result is as random as a push.
        width: bytes of one integer.
    """
    num_values = next(iter(pushes.values())).numel() // width
    sums, room = np.empty(num_values, np.int64), np.zeros(_CHUNK * width + 8, np.uint8)
    for start in range(0, num_values, _CHUNK):
        total = np.zeros(min(_CHUNK, num_values - start), np.uint64)
        size = total.shape[0] * width
        for blob in pushes.values():
            room[:size] = blob.numpy()[start * width : start * width + size]
            total += overlapping(room[: size + 8 - width], width)
        sums[start : start + total.shape[0]] = signed(total, width)
    return torch.from_numpy(sums)
