"""Join codes: a secret short enough to be read out by telephone and too long to be guessed, also offline.

A code is 25 letters and digits and the address where it counts, ``K7Q2M-9FDXA-3T0ZR-8WQ4E-VVB2K@alder.example:7400``.
23 of them are 115 random bits; two are a checksum, so that a slip of the ear or finger is noticed before anybody is
asked. Whoever records or bends a connection sees values that are keyed by the secret, and would have to try 2^115
codes to make use of them; so no slow derivation is needed, and no server's count of tries is relied on.

Each side proves to the other that it holds the secret, over everything that was said and over the certificate at the
other end of the very TLS connection. Somebody between the two has to show a certificate of its own, and then neither
proof fits; it cannot make one, and one that it is given counts nowhere else.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from coterie.config.federation import is_endpoint
from coterie.errors import IdentityError
from coterie.federation.identity.letters import ALPHABET, grouped, heard

_SECRET, _CHECK = 23, 2
_PURPOSE = b"coterie enrolment v1\n"


def new_secret() -> str:
    """115 bits from the operating system's random numbers, as 23 letters of `ALPHABET`."""
    return "".join(secrets.choice(ALPHABET) for _ in range(_SECRET))


@dataclass(frozen=True)
class JoinCode:
    """What the inviter reads out.

    Args:
        secret: as `new_secret` made it.
        endpoint: ``host:port`` where it counts.
    """

    secret: str
    endpoint: str

    def __str__(self) -> str:
        return f"{grouped(self.secret + _checksum(self.secret))}@{self.endpoint}"

    def __repr__(self) -> str:
        return f"JoinCode(..., {self.endpoint!r})"


def parse(text: str) -> JoinCode:
    """The code that somebody typed; case, hyphens and blanks do not count, and O, I, L are read as 0, 1, 1.

    Raises:
        IdentityError: it is no code, or one with a slip in it.
    """
    written, at, endpoint = text.strip().rpartition("@")
    letters = heard(written)
    if not at or not is_endpoint(endpoint):
        raise IdentityError(
            "The code does not end with the address where it counts.",
            code="join-code-address",
            fix="write it as it was read out, CODE@HOST:PORT, as in K7Q2M-...-VVB2K@alder.example:7400",
        )
    if len(letters) != _SECRET + _CHECK or letters[_SECRET:] != _checksum(letters[:_SECRET]):
        raise IdentityError(
            f"The code has a slip in it: {len(letters)} letters and digits were read, and they do not fit together.",
            code="join-code-typo",
            why="two of its 25 letters follow from the others, so that this is noticed before anybody is asked",
            fix="compare it with the inviter, group by group; I and L are read as 1, O as 0",
        )
    return JoinCode(letters[:_SECRET], endpoint)


def _checksum(secret: str) -> str:
    number = int.from_bytes(hashlib.sha256(b"coterie join code\n" + secret.encode()).digest()[:2])
    return ALPHABET[number % 32] + ALPHABET[number // 32 % 32]


@dataclass(frozen=True)
class CodeKeys:
    """What both sides derive from a secret.

    Args:
        name: hex; tells the inviter which of its codes is meant.
        joining: the joiner proves with it.
        inviting: the inviter proves with it.
    """

    name: str
    joining: bytes
    inviting: bytes

    @classmethod
    def of(cls, secret: str) -> CodeKeys:
        derived = HKDF(hashes.SHA256(), 80, salt=None, info=_PURPOSE + b"keys").derive(secret.encode())
        return cls(derived[:16].hex(), derived[16:48], derived[48:])


def proof(key: bytes, *parts: bytes) -> str:
    """Hex HMAC-SHA256 over the parts, each with its length."""
    text = b"".join(len(part).to_bytes(8) + part for part in parts)
    return hmac.new(key, _PURPOSE + text, hashlib.sha256).hexdigest()


def proves(key: bytes, shown: str, *parts: bytes) -> bool:
    """Whether somebody who holds ``key`` proved these parts."""
    return shown.isascii() and hmac.compare_digest(proof(key, *parts), shown)
