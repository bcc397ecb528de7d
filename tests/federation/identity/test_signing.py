"""A party's word, signed by its identity."""

from __future__ import annotations

from coterie.federation.identity.certificates import new_key
from coterie.federation.identity.signing import KeySigner

KEYS = {name: new_key() for name in ("alder", "birch")}


def signer(name: str) -> KeySigner:
    return KeySigner(KEYS[name], lambda party: KEYS[party].public_key())


def test_a_word_is_its_partys_and_nobody_elses():
    said = signer("alder").sign(b"coterie mask key\nword")
    assert signer("birch").check("alder", b"coterie mask key\nword", said)
    assert not signer("birch").check("birch", b"coterie mask key\nword", said)
    assert not signer("birch").check("alder", b"coterie mask key\nanother", said)


def test_what_is_no_signature_is_none():
    for nothing in ("", "00", "zz", "ab" * 70):
        assert not signer("birch").check("alder", b"word", nothing)
