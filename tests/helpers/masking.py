"""Parties that agree on masks without a network."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from coterie.federation.experts.masking.session import NO_DRAW, KeyMaker, MaskSession, Opening, Scope
from coterie.federation.rounds.attempt import Attempt

SCOPE = Scope("run", "roster", 0, Attempt(1, 1))
GRID = "9" * 64


class Identities:
    """Identities of made-up parties: everybody can check everybody's word, by keys that only this object knows."""

    def __init__(self, names: Sequence[str]) -> None:
        self._keys = {name: hashlib.sha256(name.encode()).digest() for name in names}

    def of(self, name: str) -> Identity:
        return Identity(name, self._keys)


class Identity:
    def __init__(self, name: str, keys: Mapping[str, bytes]) -> None:
        self._name, self._keys = name, keys

    def sign(self, text: bytes) -> str:
        return hmac.new(self._keys[self._name], text, hashlib.sha256).hexdigest()

    def check(self, party: str, text: bytes, signature: str) -> bool:
        return hmac.compare_digest(hmac.new(self._keys[party], text, hashlib.sha256).hexdigest(), signature)


def opening(number: int, **changes: object) -> Opening:
    """What a party says; another nonce for another number."""
    values = {"nonce": f"{number:064x}", "serial": 1, "grid": GRID, "can_draw": True, "draw": NO_DRAW, **changes}
    return Opening(**values)  # type: ignore[arg-type]


def agreed(makers: Mapping[str, KeyMaker]) -> dict[str, MaskSession]:
    """What each party's maker agrees to when all tell all."""
    openings = {name: maker.opening for name, maker in makers.items()}
    keys = {name: maker.sign(openings) for name, maker in makers.items()}
    return {name: maker.agree(openings, keys) for name, maker in makers.items()}
