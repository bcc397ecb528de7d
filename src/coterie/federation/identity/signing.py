"""A party's word on the wire, signed by its identity: for what others have to be able to show that it said."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from coterie.federation.identity.certificates import p256_key
from coterie.federation.identity.kit import Kit
from coterie.federation.identity.roster import Roster

_HASH = ec.ECDSA(hashes.SHA256())


class KeySigner:
    """Signs with one key and checks by everybody's.

    What is signed has to begin with what it is for, as `coterie.federation.identity.certificates` says of a key with
    two uses.

    Args:
        key: this party's.
        public: a party's public key, by its name.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, public: Callable[[str], ec.EllipticCurvePublicKey]) -> None:
        self._key, self._public = key, public

    @classmethod
    def of_kit(cls, kit: Kit, roster: Roster) -> KeySigner:
        """With the kit's key, and the certificates of a roster that all signed."""
        return cls(kit.key, lambda party: p256_key(roster.certificate_of(party), f"the certificate of {party}"))

    def sign(self, text: bytes) -> str:
        """Hexadecimal signature."""
        return self._key.sign(text, _HASH).hex()

    def check(self, party: str, text: bytes, signature: str) -> bool:
        """Whether a signature is that party's."""
        try:
            self._public(party).verify(bytes.fromhex(signature), text, _HASH)
        except (InvalidSignature, ValueError):
            return False
        return True
