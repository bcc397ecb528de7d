"""Masks against an implementation of their own in plain Python: X25519, HKDF and counter mode written out."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.errors import RoundError
from coterie.federation.experts.masking.session import KeyMaker, MaskSession
from coterie.federation.experts.masking.streams import Masks, derive, unmasked_sum
from helpers.masking import SCOPE, Identities, agreed, opening

# ---- the same by hand ----

_PRIME = 2**255 - 19


def ladder(private: bytes, u: bytes) -> bytes:
    """X25519 as RFC 7748 writes it down."""
    k = int.from_bytes(private, "little") & ~7 & ((1 << 255) - 1) | (1 << 254)
    x1 = int.from_bytes(u, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for t in range(254, -1, -1):
        bit = (k >> t) & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % _PRIME, x1 * (da - cb) ** 2 % _PRIME
        x2, z2 = aa * bb % _PRIME, e * (aa + 121665 * e) % _PRIME
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, _PRIME - 2, _PRIME) % _PRIME).to_bytes(32, "little")


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 for one block of output."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def keystream(key: bytes, count: int) -> bytes:
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return b"".join(block.update(number.to_bytes(16, "big")) for number in range(-(-count // 16)))[:count]


def by_hand(
    me: str, private: bytes, public: Mapping[str, bytes], session: bytes, part: int, values: list[int], width: int
) -> bytes:
    total = list(values)
    for other in sorted(public.keys() - {me}):
        pair = " and ".join(sorted((me, other)))
        secret = hkdf(ladder(private, public[other]), session, f"coterie mask: pair {pair}".encode())
        key = hkdf(secret, session, f"coterie mask: part {part}, {pair}".encode())
        stream = keystream(key, width * len(values))
        for place in range(len(values)):
            word = int.from_bytes(stream[width * place : width * (place + 1)], "little")
            total[place] += word if me < other else -word
    return b"".join((value % 256**width).to_bytes(width, "little") for value in total)


@pytest.mark.parametrize("width", [1, 5, 7])
def test_masked_bytes_are_those_of_the_same_written_out_by_hand(monkeypatch: pytest.MonkeyPatch, width: int):
    names = ("alder", "birch", "cedar")
    private = {name: bytes([7 * i + 1]) * 32 for i, name in enumerate(names)}
    public = {name: ladder(key, (9).to_bytes(32, "little")) for name, key in private.items()}
    makers = {name: KeyMaker(name, SCOPE, opening(i), Identities(names).of(name)) for i, name in enumerate(names)}
    for name, maker in makers.items():
        maker._key = X25519PrivateKey.from_private_bytes(private[name])  # noqa: SLF001
    sessions = agreed(makers)
    values = [0, 1, -1, 2 ** (8 * width - 3), -(2 ** (8 * width - 3)), 77, -100, 5, 6, 7]
    for name in names:
        session = sessions[name]
        masked = session.masks.mask(4, torch.tensor(values), width).numpy().tobytes()
        digest = bytes.fromhex(session.digest)
        assert masked == by_hand(name, private[name], public, digest, 4, values, width)


# ---- cancellation ----


def random_masks(count: int, seed: int) -> dict[str, Masks]:
    """Of ``count`` parties with secrets of a seed."""
    names = [f"p{i:02d}" for i in range(count)]
    session = hashlib.sha256(f"session {seed}".encode()).digest()

    def secret(one: str, other: str) -> bytes:
        return derive(f"{seed} {sorted((one, other))}".encode(), session, info="test")

    return {one: Masks(one, {other: secret(one, other) for other in names if other != one}, session) for one in names}


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 6),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    width=st.integers(1, 7),
    tries=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_masks_of_all_parties_cancel_to_the_bit_at_every_try(
    count: int, sizes: list[int], width: int, tries: list[int], seed: int
):
    """A try in which parties drop out (so many, but not all) adds up to nothing of the sum; a try of all, under new
    keys, always to the same."""
    draw = np.random.default_rng(seed)
    most = (2 ** (8 * width - 1) - 1) // count
    own = {
        f"p{i:02d}": [torch.from_numpy(draw.integers(-most, most, size, endpoint=True)) for size in sizes]
        for i in range(count)
    }
    for number, dropped in enumerate(tries, start=1):
        masks = random_masks(count, seed + number)
        for part, size in enumerate(sizes):
            pushes = {name: each.mask(part, own[name][part], width) for name, each in masks.items()}
            assert all(push.shape == (size * width,) for push in pushes.values())
            here = dict(sorted(pushes.items())[min(dropped, count - 1) :])
            equal = unmasked_sum(here, width) == sum(own[name][part] for name in here)
            if len(here) == count:
                assert bool(equal.all())
            elif width > 3:
                assert not bool(equal.any())


def test_a_chunk_boundary_changes_nothing():
    size = (1 << 17) + 3
    masks = random_masks(3, 5)
    values = {name: torch.arange(size) - i for i, name in enumerate(masks)}
    pushes = {name: each.mask(0, values[name], 5) for name, each in masks.items()}
    assert torch.equal(unmasked_sum(pushes, 5), 3 * torch.arange(size) - 3)


# ---- what a host sees ----


def excess(data: Tensor) -> float:
    """How many standard deviations the chi-square of the byte counts lies above what uniform bytes give."""
    counts = torch.bincount(data.long(), minlength=256).double()
    expected = data.numel() / 256
    return float(((counts - expected) ** 2 / expected).sum() - 255) / math.sqrt(2 * 255)


def correlation(one: Tensor, other: Tensor) -> float:
    """Of bytes, in standard deviations of that of independent ones."""
    first, second = (each.double() - each.double().mean() for each in (one, other))
    return abs(float((first * second).sum() / (first.norm() * second.norm()))) * math.sqrt(one.numel())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_push_and_every_sum_over_fewer_than_all_looks_uniform_whatever_was_pushed(count: int):
    width, size = 5, 8_000
    texts = [torch.zeros(size, dtype=torch.int64), 1000 * torch.arange(size), torch.full((size,), 2**37 // count)]
    for number, text in enumerate(texts):
        pushes = {
            name: each.mask(0, text + i, width) for i, (name, each) in enumerate(random_masks(count, number).items())
        }
        clear = (text + 1).contiguous().view(torch.uint8).view(-1, 8)[:, :width].reshape(-1)
        for chosen in range(1, count):
            for names in itertools.combinations(pushes, chosen):
                seen = unmasked_sum({name: pushes[name] for name in names}, width)
                data = seen.contiguous().view(torch.uint8).view(-1, 8)[:, :width].reshape(-1)
                assert abs(excess(data)) < 6, names
                if number == 1:
                    assert correlation(data, clear) < 6, names
        whole = unmasked_sum(pushes, width).contiguous().view(torch.uint8).view(-1, 8)[:, :width].reshape(-1)
        assert excess(whole) > 50  # the sum over all is no such thing: the test can fail


def test_two_texts_under_the_same_keys_differ_by_their_difference_so_keys_are_used_for_one():
    """Why no stream may be used for two, and that none can be."""
    same = [random_masks(2, 3)["p00"].mask(0, torch.full((4,), value), 5) for value in (10, 17)]
    leaked = unmasked_sum({"a": same[1]}, 5) - unmasked_sum({"b": same[0]}, 5)
    assert leaked.tolist() == [7] * 4
    masks = random_masks(2, 3)["p00"]
    first = masks.mask(0, torch.zeros(4, dtype=torch.int64), 5)
    assert torch.equal(masks.mask(0, torch.zeros(4, dtype=torch.int64), 5), first)
    with pytest.raises(RoundError) as refused:
        masks.mask(0, torch.tensor([0, 0, 0, 1]), 5)
    assert refused.value.code == "mask-used"
    with pytest.raises(RoundError):
        masks.mask(0, torch.zeros(3, dtype=torch.int64), 5)
    masks.erase()
    with pytest.raises(RoundError):
        masks.mask(1, torch.zeros(4, dtype=torch.int64), 5)


def test_streams_differ_between_pairs_parts_and_sessions():
    nothing = torch.zeros(8, dtype=torch.int64)
    seen = []
    for seed, part in itertools.product((1, 2, 3, 4), (0, 1)):
        for each in random_masks(3, seed).values():
            seen.append(each.mask(part, nothing, 7).numpy().tobytes())
    assert len(set(seen)) == len(seen) == 24


def test_sessions_are_values(monkeypatch: pytest.MonkeyPatch):
    """A session's repr, which may end in a log, shows no secret."""
    names = ("alder", "birch")
    makers = {name: KeyMaker(name, SCOPE, opening(i), Identities(names).of(name)) for i, name in enumerate(names)}
    assert "X25519" not in repr(makers["alder"])
    session = agreed(makers)["alder"]
    assert isinstance(session, MaskSession)
    assert "secret" not in repr(session)
