"""The agreement on keys: what it is bound to, and that a lie to one party is noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import RoundError
from coterie.federation.experts.masking.session import (
    NO_DRAW,
    Draws,
    KeyMaker,
    Opening,
    Scope,
    draws_of,
)
from coterie.federation.experts.masking.streams import unmasked_sum
from coterie.federation.rounds.attempt import Attempt
from helpers.masking import GRID, SCOPE, Identities, agreed, opening

NAMES = ("alder", "birch", "cedar")


def makers(scopes: dict[str, Scope] | None = None, **openings: Opening) -> dict[str, KeyMaker]:
    """One for each party; its scope and opening can be another than everybody's."""
    return {
        name: KeyMaker(
            name, (scopes or {}).get(name, SCOPE), openings.get(name, opening(i)), Identities(NAMES).of(name)
        )
        for i, name in enumerate(NAMES)
    }


def test_all_parties_agree_on_one_session_whose_masks_cancel():
    sessions = agreed(makers(birch=opening(1, serial=7)))
    assert len({session.digest for session in sessions.values()}) == 1
    pushes = {
        name: session.masks.mask(2, torch.tensor([i, -5]), 5) for i, (name, session) in enumerate(sessions.items())
    }
    assert unmasked_sum(pushes, 5).tolist() == [3, -15]


@pytest.mark.parametrize(
    "scope",
    [
        replace(SCOPE, run="other"),
        replace(SCOPE, roster="other"),
        replace(SCOPE, epoch=1),
        replace(SCOPE, attempt=Attempt(1, 2)),
        replace(SCOPE, attempt=Attempt(2, 1)),
    ],
)
def test_keys_of_another_run_roster_epoch_or_attempt_are_refused(scope: Scope):
    with pytest.raises(RoundError) as refused:
        agreed(makers({"cedar": scope}))
    assert refused.value.code == "mask-signature"
    assert "cedar" in refused.value.message


@pytest.mark.parametrize(
    "lie",
    [
        {"nonce": "f" * 64},
        {"serial": 2},
        {"can_draw": False},
        {"draw": "1" * 64},
        {"drawn_by": ("alder",)},
        {"grid": GRID},
    ],
)
def test_a_party_that_told_two_others_different_things_is_noticed(lie: dict):
    each = makers()
    told = {name: maker.opening for name, maker in each.items()}
    keys = {name: maker.sign(told) for name, maker in each.items()}
    heard = {**told, "cedar": replace(told["cedar"], **lie)}
    keys["alder"] = each["alder"].sign(heard)
    if heard == told:
        each["alder"].agree(heard, keys)
        return
    with pytest.raises(RoundError) as refused:
        each["alder"].agree(heard, keys)
    assert refused.value.code == "mask-signature"


def test_a_key_that_its_party_did_not_sign_is_refused():
    each = makers()
    told = {name: maker.opening for name, maker in each.items()}
    keys = {name: maker.sign(told) for name, maker in each.items()}
    keys["birch"] = (makers()["birch"].sign(told)[0], keys["birch"][1])
    with pytest.raises(RoundError) as refused:
        each["alder"].agree(told, keys)
    assert refused.value.code == "mask-signature"
    assert "birch" in refused.value.message


def test_a_key_that_gives_everybody_the_same_secret_is_refused():
    each = makers()
    told = {name: maker.opening for name, maker in each.items()}
    keys = {name: maker.sign(told) for name, maker in each.items()}
    zero = KeyMaker("birch", SCOPE, told["birch"], Identities(NAMES).of("birch"))

    class Zero:
        def public_key(self) -> Zero:
            return self

        def public_bytes_raw(self) -> bytes:
            return bytes(32)

    zero._key = Zero()  # type: ignore[assignment]  # noqa: SLF001
    keys["birch"] = zero.sign(told)
    with pytest.raises(RoundError) as refused:
        each["alder"].agree(told, keys)
    assert refused.value.code == "mask-key"


def test_two_keys_of_one_party_give_two_sessions():
    """What the digests beside the pushes then show."""
    each, again = makers(), makers()
    told = {name: maker.opening for name, maker in each.items()}
    keys = {name: maker.sign(told) for name, maker in each.items()}
    other = {**keys, "cedar": again["cedar"].sign(told)}
    assert each["alder"].agree(told, keys).digest != each["birch"].agree(told, other).digest


def test_another_grid_is_refused():
    with pytest.raises(RoundError) as refused:
        agreed(makers(birch=opening(1, grid="8" * 64)))
    assert refused.value.code == "mask-grid"


def test_a_new_agreement_on_the_same_words_has_other_masks():
    """A retry after a restart, with the same serial again: the keys are new, so the streams are."""
    nothing = torch.zeros(64, dtype=torch.int64)
    first, second = (agreed(makers())["alder"].masks.mask(0, nothing, 5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("held", "kept"),
    [
        (("1", "1", "1"), True),
        (("1", "1", "2"), False),
        (("1", "1", "0"), False),
        (("0", "0", "0"), False),
    ],
)
def test_draws_are_pushed_again_only_if_everybody_holds_one_of_the_same_set(held: tuple[str, ...], kept: bool):
    openings = {
        name: opening(i, draw=64 * letter, drawn_by=NAMES)
        for i, (name, letter) in enumerate(zip(NAMES, held, strict=True))
    }
    assert (draws_of(openings).name == 64 * "1") is kept
    assert draws_of(openings).parties == NAMES
    sessions = agreed(makers(**openings))
    draws = {session.draw for session in sessions.values()}
    assert draws == ({64 * "1"} if kept else {sessions["alder"].digest})
    assert NO_DRAW not in draws


WITHOUT = ("alder", "birch")
OLD, NEW = "1" * 64, "2" * 64


@pytest.mark.parametrize(
    ("said", "name", "parties"),
    [
        # (can draw, draw, made by) of alder, birch, cedar
        ([(True, NO_DRAW, ()), (True, NO_DRAW, ()), (False, NO_DRAW, ())], None, WITHOUT),
        # The last draw of a budget is pushed again, as long as all hold theirs ...
        ([(True, OLD, NAMES), (True, OLD, NAMES), (False, OLD, NAMES)], OLD, NAMES),
        # ... and not without one of them, by however many it was lost.
        ([(True, OLD, NAMES), (True, OLD, NAMES), (False, NO_DRAW, ())], None, WITHOUT),
        ([(True, OLD, NAMES), (True, NO_DRAW, ()), (False, OLD, NAMES)], None, WITHOUT),
        # What a party that stopped still has does not keep the others' draws from being pushed.
        ([(True, NEW, WITHOUT), (True, NEW, WITHOUT), (False, OLD, NAMES)], NEW, WITHOUT),
        ([(False, NEW, WITHOUT), (False, NEW, WITHOUT), (False, NO_DRAW, ())], NEW, WITHOUT),
        # A party that comes back after all is one more: the others' noise was for fewer.
        ([(True, NEW, WITHOUT), (True, NEW, WITHOUT), (True, NO_DRAW, ())], None, NAMES),
        # Whoever made a draw is told apart from who says so.
        ([(True, OLD, NAMES), (True, OLD, WITHOUT), (True, OLD, NAMES)], None, NAMES),
        ([(True, OLD, WITHOUT), (True, OLD, WITHOUT), (True, OLD, WITHOUT)], None, NAMES),
        ([(False, OLD, NAMES), (False, NO_DRAW, ()), (False, OLD, NAMES)], None, ()),
    ],
)
def test_who_contributes_follows_from_what_all_said(said: list, name: str | None, parties: tuple[str, ...]):
    openings = {
        party: opening(i, can_draw=able, draw=draw, drawn_by=by)
        for i, (party, (able, draw, by)) in enumerate(zip(NAMES, said, strict=True))
    }
    assert draws_of(openings) == Draws(name, parties)


def test_masks_of_those_who_contribute_cancel_and_the_others_have_none():
    sessions = agreed(makers(cedar=opening(2, can_draw=False)))
    assert {session.digest for session in sessions.values()} == {sessions["alder"].digest}
    assert {session.contributors for session in sessions.values()} == {WITHOUT}
    pushes = {name: sessions[name].masks.mask(0, torch.tensor([2, 3]), 5) for name in WITHOUT}
    assert unmasked_sum(pushes, 5).tolist() == [4, 6]
    with pytest.raises(RoundError) as refused:  # unmasked values would leave
        sessions["cedar"].masks.mask(0, torch.tensor([2, 3]), 5)
    assert refused.value.code == "mask-used"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nobody_pushes_what_it_noised_for_other_parties_than_contribute(data: st.DataObject):
    """However many lie: a party's own word about its own draw is one of those that have to fit."""
    names = (*NAMES, "dogwood")
    groups = st.sampled_from([NAMES, WITHOUT, names, ("birch", "dogwood"), ()])
    openings = {
        party: opening(
            i,
            can_draw=data.draw(st.booleans()),
            draw=data.draw(st.sampled_from([NO_DRAW, OLD, NEW])),
            drawn_by=data.draw(groups),
        )
        for i, party in enumerate(names)
    }
    draws = draws_of(openings)
    for party in draws.parties:
        said = openings[party]
        if draws.name is None:
            assert said.can_draw
        else:
            assert (said.draw, said.drawn_by) == (draws.name, draws.parties)
    if draws.name is not None:
        assert {party for party in names if openings[party].can_draw} <= set(draws.parties)


def test_serials_are_bound_into_the_session_and_nobody_follows_anothers():
    """A party that leaps ahead moves no other's number, so a process that starts anew still agrees with all."""

    def digest(serial: int) -> str:
        each = makers(birch=opening(1, serial=serial), cedar=opening(2, serial=1 << 53))
        for number, maker in enumerate(each.values(), 1):
            maker._key = X25519PrivateKey.from_private_bytes(bytes([number]) * 32)  # noqa: SLF001
        return agreed(each)["alder"].digest

    assert digest(1) == digest(1) != digest(2)


def test_a_maker_forgets_its_key_with_the_push():
    each = makers()
    agreed(each)
    told = {name: maker.opening for name, maker in each.items()}
    with pytest.raises(RoundError) as refused:
        each["alder"].sign(told)
    assert refused.value.code == "mask-used"
