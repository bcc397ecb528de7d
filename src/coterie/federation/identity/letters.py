"""Letters that are read out by telephone: which, how they are grouped, and how what was heard is read."""

from __future__ import annotations

import re

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Without I, L, O and U, which are misread; Crockford's base 32."""
_GROUP = 5
_MISREAD = str.maketrans("OIL", "011")


def grouped(letters: str) -> str:
    """In groups of five, with hyphens between them."""
    return "-".join(letters[at : at + _GROUP] for at in range(0, len(letters), _GROUP))


def heard(text: str) -> str:
    """The letters in what somebody typed; case, hyphens and blanks do not count, and O, I, L are read as 0, 1, 1."""
    return re.sub(r"[\s-]", "", text).upper().translate(_MISREAD)


def of_digest(digest: str, letters: int) -> str:
    """The first 5 bits a letter of a hex digest."""
    number = int(digest, 16) >> (4 * len(digest) - 5 * letters)
    return "".join(ALPHABET[number >> 5 * at & 31] for at in reversed(range(letters)))
