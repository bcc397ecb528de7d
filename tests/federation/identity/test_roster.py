"""The roster: signed by every member, checked by every member, and the second gate at every connection."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import CoterieError, RosterError
from coterie.federation.identity import certificates
from coterie.federation.identity.certificates import Authority, Member, Role, members_of
from coterie.federation.identity.kit import Kit, load_authority
from coterie.federation.identity.provision import local_kits
from coterie.federation.identity.roster import (
    Roster,
    draft,
    from_json,
    install_roster,
    join,
    load_roster,
    read_roster,
    sign,
    to_json,
    verify,
)


@pytest.fixture
def kits(tmp_path: Path) -> dict[str, Kit]:
    return local_kits(tmp_path / "kits", ["alder", "birch", "cedar"], coordinator=True, federation="demo")


@pytest.fixture
def roster(kits: dict[str, Kit]) -> Roster:
    return load_roster(kits["birch"])


@pytest.fixture
def authority(kits: dict[str, Kit]) -> Authority:
    return load_authority(kits["alder"].folder.parent / "ca")


def unsigned(roster: Roster) -> Roster:
    return replace(roster, signatures={})


def signed_by(roster: Roster, *kits: Kit) -> Roster:
    for kit in kits:
        roster = sign(roster, kit.key, kit.certificate)
    return roster


def test_a_provisioned_roster_is_signed_by_all_and_the_same_in_every_kit(kits: dict[str, Kit]) -> None:
    rosters = [load_roster(kit) for kit in kits.values()]
    assert len({r.content_hash() for r in rosters}) == 1
    assert [e.name for e in rosters[0].parties] == ["coordinator", "alder", "birch", "cedar"]
    assert set(rosters[0].signatures) == set(kits)
    assert [e.cert_fingerprint for e in rosters[0].parties] == [
        certificates.fingerprint(kit.certificate) for kit in kits.values()
    ]


def test_the_file_form_comes_back_as_it_was(roster: Roster) -> None:
    assert from_json(to_json(roster)) == roster


def test_what_is_read_out_is_the_hash_in_letters(roster: Roster) -> None:
    letters = roster.fingerprint().replace("-", "")
    bits = "".join(f"{'0123456789ABCDEFGHJKMNPQRSTVWXYZ'.index(letter):05b}" for letter in letters)
    assert bits == f"{int(roster.content_hash(), 16):0256b}"[:200]
    assert [len(group) for group in roster.fingerprint().split("-")] == [5] * 8


def test_a_roster_under_keys_of_the_authoritys_own_reads_out_otherwise(
    kits: dict[str, Kit], roster: Roster, authority: Authority
) -> None:
    """The keeper of the CA can certify every name anew, and each of two members then signs a roster of its own."""
    members = [Member(entry.name, entry.role, entry.endpoint) for entry in roster.parties]
    seen = []
    for honest in ("alder", "birch"):
        false = {member.name: certificates.new_key() for member in members if member.name != honest}
        issued = {m.name: authority.issue(m, false[m.name].public_key()) for m in members if m.name != honest}
        issued[honest] = kits[honest].certificate
        made = draft("demo", 1, members, issued, config_hash=roster.config_hash, placement_hash=roster.placement_hash)
        for name, key in false.items():
            made = sign(made, key, issued[name])
        verify(
            sign(made, kits[honest].key, kits[honest].certificate), authority.certificate
        )  # nothing is amiss in it
        seen.append(made.fingerprint())
    assert len({*seen, roster.fingerprint()}) == 3


def test_the_hash_covers_every_field(roster: Roster) -> None:
    entry = roster.parties[1]
    changed = [
        replace(roster, federation="other"),
        replace(roster, membership_epoch=2),
        replace(roster, config_hash="0"),
        replace(roster, placement_hash="0"),
        replace(roster, parties=roster.parties[1:]),
        replace(roster, parties=(roster.parties[1], roster.parties[0], *roster.parties[2:])),
        *[
            replace(roster, parties=(roster.parties[0], replace(entry, **change), *roster.parties[2:]))
            for change in (
                {"name": "ash"},
                {"role": Role.COORDINATOR},
                {"endpoint": "127.0.0.1:9"},
                {"cert_fingerprint": "00"},
            )
        ],
    ]
    hashes = {roster.content_hash(), *(r.content_hash() for r in changed)}
    assert len(hashes) == len(changed) + 1


def test_the_hash_is_the_sha256_of_the_canonical_json(roster: Roster) -> None:

    document = json.loads(to_json(roster))
    text = json.dumps(document["roster"], sort_keys=True, separators=(",", ":"))
    assert document["hash"] == roster.content_hash() == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(("careful", "when"), [(False, "it was written"), (True, "coordinator signed it")])
def test_a_roster_changed_after_signing_is_refused_in_one_sentence(
    kits: dict[str, Kit], careful: bool, when: str
) -> None:
    kit = kits["birch"]
    document = json.loads(kit.roster_path.read_bytes())
    document["roster"]["parties"][1]["endpoint"] = "203.0.113.7:7001"
    if careful:
        document["hash"] = replace_content_hash(document)
    kit.roster_path.write_text(json.dumps(document))
    with pytest.raises(RosterError, match=rf"^The roster was changed after {when}\.") as caught:
        load_roster(kit)
    assert caught.value.code == "roster-changed"


def replace_content_hash(document: dict[str, Any]) -> str:
    """What a careful forger would write over the old hash."""

    text = json.dumps(document["roster"], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_signature_that_claims_the_new_hash_is_still_false(roster: Roster, kits: dict[str, Kit]) -> None:
    changed = replace(roster, config_hash="another")
    claims = {n: replace(s, signed_hash=changed.content_hash()) for n, s in roster.signatures.items()}
    with pytest.raises(RosterError, match="The signature of coordinator under the roster is false") as caught:
        verify(replace(changed, signatures=claims), kits["alder"].authority)
    assert caught.value.code == "roster-signature"


def test_every_member_has_to_sign(roster: Roster, kits: dict[str, Kit]) -> None:
    fresh = unsigned(roster)
    for missing in kits:
        partly = signed_by(fresh, *[kit for name, kit in kits.items() if name != missing])
        with pytest.raises(RosterError, match=f"{missing} has not signed the roster") as caught:
            verify(partly, kits["alder"].authority)
        assert caught.value.code == "roster-unsigned"
    verify(signed_by(fresh, *reversed(kits.values())), kits["alder"].authority)


def test_copies_signed_in_different_places_join(roster: Roster, kits: dict[str, Kit]) -> None:
    fresh = unsigned(roster)
    joined = join([signed_by(fresh, kit) for kit in kits.values()])
    verify(joined, kits["alder"].authority)
    with pytest.raises(RosterError, match="different rosters"):
        join([fresh, replace(fresh, membership_epoch=9)])


def test_nobody_can_sign_for_another(roster: Roster, kits: dict[str, Kit]) -> None:
    stolen = sign(unsigned(roster), kits["cedar"].key, kits["birch"].certificate)
    honest = signed_by(unsigned(roster), kits["coordinator"], kits["alder"], kits["cedar"])
    with pytest.raises(RosterError) as caught:
        verify(join([honest, stolen]), kits["alder"].authority)
    assert caught.value.code == "roster-signature"
    swapped = {**roster.signatures, "birch": roster.signatures["cedar"]}
    with pytest.raises(RosterError, match="birch signed with the certificate of cedar"):
        verify(replace(roster, signatures=swapped), kits["alder"].authority)


def test_a_roster_of_another_ca_is_refused(tmp_path: Path, roster: Roster) -> None:
    stranger = local_kits(tmp_path / "other", ["alder"], federation="demo")["alder"]
    with pytest.raises(CoterieError) as caught:
        verify(roster, stranger.authority)
    assert caught.value.code == "identity-other-ca"


def test_the_second_gate_admits_listed_certificates_alone(
    roster: Roster, authority: Authority, kits: dict[str, Kit]
) -> None:
    assert roster.admit(kits["cedar"].certificate).name == "cedar"
    again = authority.issue(Member("cedar", Role.PARTY, "127.0.0.1:1"), certificates.new_key().public_key())
    stranger = authority.issue(Member("mallory", Role.PARTY, "127.0.0.1:1"), certificates.new_key().public_key())
    for valid_but_unlisted in (again, stranger):
        certificates.check_issued(valid_but_unlisted, authority.certificate, "It")
        with pytest.raises(RosterError, match="valid but not in the roster") as caught:
            roster.admit(valid_but_unlisted)
        assert caught.value.code == "roster-not-listed"


def test_the_second_gate_checks_the_role(roster: Roster, kits: dict[str, Kit]) -> None:
    assert roster.admit(kits["coordinator"].certificate, Role.COORDINATOR).name == "coordinator"
    with pytest.raises(RosterError) as caught:
        roster.admit(kits["alder"].certificate, Role.COORDINATOR)
    assert caught.value.code == "roster-role"
    promoted = [replace(e, role=Role.COORDINATOR) if e.name == "alder" else e for e in roster.parties]
    with pytest.raises(RosterError) as caught:
        replace(roster, parties=tuple(promoted)).admit(kits["alder"].certificate)
    assert caught.value.code == "roster-role"


def test_a_draft_needs_the_right_certificate_of_every_member(kits: dict[str, Kit]) -> None:
    members = members_of({"alder": "127.0.0.1:1", "birch": "127.0.0.1:2"}, None)
    alder, birch = kits["alder"].certificate, kits["birch"].certificate
    with pytest.raises(RosterError, match="certificate of birch is missing"):
        draft("demo", 1, members, {"alder": alder}, config_hash="c", placement_hash="p")
    with pytest.raises(RosterError, match="given for birch was issued for alder/party/demo"):
        draft("demo", 1, members, {"alder": alder, "birch": alder}, config_hash="c", placement_hash="p")
    with pytest.raises(RosterError):
        draft("other", 1, members, {"alder": alder, "birch": birch}, config_hash="c", placement_hash="p")


def test_install_checks_before_it_writes(kits: dict[str, Kit], roster: Roster) -> None:
    kit = kits["alder"]
    before = kit.roster_path.read_bytes()
    with pytest.raises(RosterError):
        install_roster(kit, unsigned(roster))
    assert kit.roster_path.read_bytes() == before
    newer = signed_by(replace(unsigned(roster), membership_epoch=2), *kits.values())
    install_roster(kit, newer)
    assert read_roster(kit.roster_path).membership_epoch == 2


def test_a_missing_roster_is_a_clear_error(kits: dict[str, Kit]) -> None:
    kits["alder"].roster_path.unlink()
    with pytest.raises(RosterError, match="roster cannot be read") as caught:
        load_roster(kits["alder"])
    assert caught.value.code == "roster-missing"


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("roster"),
        lambda d: d["roster"].pop("config_hash"),
        lambda d: d["roster"].update(extra=1),
        lambda d: d["roster"].update(membership_epoch="1"),
        lambda d: d["roster"].update(membership_epoch=True),
        lambda d: d["roster"].update(membership_epoch=-1),
        lambda d: d["roster"].update(parties=3),
        lambda d: d["roster"]["parties"][0].update(role="king"),
        lambda d: d["roster"]["parties"][0].update(name=3),
        lambda d: d.update(signatures=[]),
        lambda d: d["signatures"]["alder"].update(signed_hash="zz"),
        lambda d: d["signatures"].update(alder=None),
    ],
)
def test_a_file_that_is_no_roster_is_refused(roster: Roster, damage: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(to_json(roster))
    damage(document)
    with pytest.raises(RosterError) as caught:
        from_json(json.dumps(document).encode())
    assert caught.value.code == "roster-damaged"


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b" " * (5 << 20)])
def test_bytes_that_are_no_roster_are_refused(raw: bytes) -> None:
    with pytest.raises(RosterError) as caught:
        from_json(raw)
    assert caught.value.code == "roster-damaged"
