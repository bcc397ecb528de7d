"""Join codes: slips are noticed here, guessing is out of reach, and a proof fits one connection alone."""

from __future__ import annotations

import math

import pytest

from coterie.errors import IdentityError
from coterie.federation.enrolment.codes import CodeKeys, JoinCode, new_secret, parse, proof, proves
from coterie.federation.identity.letters import ALPHABET


def code_of(text: str) -> str | None:
    """Of the error that reading a code ends with; None where there is none."""
    try:
        parse(text)
    except IdentityError as error:
        return error.code
    return None


CODE = JoinCode("K7Q2M9FDXA3T0ZR8WQ4EVVB", "alder.example:7400")


def test_a_code_is_read_back_however_it_was_written_down() -> None:
    text = str(CODE)
    letters, _, endpoint = text.partition("@")
    assert [len(group) for group in letters.split("-")] == [5] * 5
    for written in (text, text.lower(), f"  {text} ", f"{letters.replace('-', ' ')}@{endpoint}"):
        assert parse(written) == CODE
    assert parse(f"{letters.replace('0', 'o')}@{endpoint}") == CODE
    assert parse(str(JoinCode(CODE.secret, "[fd00::7]:7400"))).endpoint == "[fd00::7]:7400"


def test_a_secret_has_more_bits_than_anybody_can_try() -> None:
    made = {new_secret() for _ in range(200)}
    assert len(made) == 200
    assert {len(secret) for secret in made} == {23}
    assert set("".join(made)) == set(ALPHABET)
    assert len(ALPHABET) == 32
    assert 23 * math.log2(32) >= 112


def test_slips_are_noticed_before_anybody_is_asked() -> None:
    letters, _, endpoint = str(CODE).replace("-", "").partition("@")
    slips = [
        f"{letters[:at]}{other}{letters[at + 1 :]}@{endpoint}"
        for at, letter in enumerate(letters)
        for other in ALPHABET.replace(letter, "")
    ]
    passed = [slip for slip in slips if code_of(slip) is None]
    assert len(passed) <= len(slips) / 200  # one of 1024 is expected to pass
    assert {code_of(slip) for slip in slips} <= {None, "join-code-typo"}
    for short in (letters[:-1], letters + "0", ""):
        with pytest.raises(IdentityError, match="slip") as caught:
            parse(f"{short}@{endpoint}")
        assert caught.value.code == "join-code-typo"


def test_what_is_no_text_proves_nothing() -> None:
    keys = CodeKeys.of(CODE.secret)
    for shown in ("\ud800", "\u00e9" * 64, "", "0" * 64):
        assert not proves(keys.joining, shown, b"said")
    assert proves(keys.joining, proof(keys.joining, b"said"), b"said")


@pytest.mark.parametrize("end", ["", "@", "@alder.example", "@alder.example:0", "@alder.example:77777", "@:7400 x"])
def test_a_code_without_its_address_is_said(end: str) -> None:
    with pytest.raises(IdentityError) as caught:
        parse(str(CODE).partition("@")[0] + end)
    assert caught.value.code == "join-code-address"


def test_the_secret_is_in_no_text_for_logs() -> None:
    assert CODE.secret[:6] not in repr(CODE)


def test_a_proof_fits_its_key_and_its_parts_alone() -> None:
    keys, others = CodeKeys.of(CODE.secret), CodeKeys.of(new_secret())
    shown = proof(keys.joining, b"one", b"two")
    assert proves(keys.joining, shown, b"one", b"two")
    assert not proves(keys.inviting, shown, b"one", b"two")
    assert not proves(others.joining, shown, b"one", b"two")
    assert not proves(keys.joining, shown, b"onet", b"wo")
    assert not proves(keys.joining, shown, b"one", b"two", b"")
    assert not proves(keys.joining, "é", b"one", b"two")
    assert len({keys.name, keys.joining.hex(), keys.inviting.hex()}) == 3
