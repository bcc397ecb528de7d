"""A member can be dialled elsewhere than at its endpoint; who answers there is held to the roster all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.errors import DeadlineError, TransportError
from coterie.federation.identity.certificates import members_of
from coterie.federation.identity.kit import load_kit
from coterie.federation.identity.provision import free_endpoints, provision
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.transport import Lane, Message

NAMES = ("alder", "birch", "cedar")
DEAD = {name: f"127.0.0.1:{port}" for port, name in enumerate(NAMES, start=1)}
"""Agreed endpoints that nobody can listen on here."""


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits")
    provision("grove", members_of(DEAD, None), folder / "kits", config_hash="", placement_hash="")
    return folder / "kits"


def member(kits: Path, name: str, listen: str, dial: dict[str, str]) -> GrpcTransport:
    kit = load_kit(kits / name)
    return GrpcTransport(name, load_roster(kit), kit, listen=listen, dial=dial)


def test_members_meet_at_the_addresses_they_are_told(kits: Path) -> None:
    at = dict(zip(NAMES, free_endpoints(3), strict=True))
    members = [member(kits, name, at[name], {other: at[other] for other in NAMES if other != name}) for name in NAMES]
    try:
        for one in members:
            one.start(lambda peer, lane, message: message.reply("done", {"peer": peer}))
        for one in members:
            one.connect(30.0)
        reply = members[2].request("alder", Lane.CONTROL, Message("hello"), 10.0)
        assert reply.body["peer"] == "cedar"
    finally:
        for one in members:
            one.close()


def test_another_member_at_that_address_is_not_taken_for_the_one_that_was_meant(kits: Path) -> None:
    at = dict(zip(NAMES, free_endpoints(3), strict=True))
    alder = member(kits, "alder", at["alder"], {})
    cedar = member(kits, "cedar", at["cedar"], {"birch": at["alder"], "alder": at["alder"]})
    try:
        alder.start(lambda peer, lane, message: None)
        cedar.start(lambda peer, lane, message: None)
        cedar.connect(30.0, ["alder"])
        with pytest.raises(DeadlineError, match="birch"):
            cedar.connect(1.0, ["birch"])
    finally:
        cedar.close()
        alder.close()


@pytest.mark.parametrize(
    ("dial", "code"),
    [
        ({"elm": "127.0.0.1:7"}, "dial-unknown-member"),
        ({"alder": "127.0.0.1:7"}, "dial-unknown-member"),  # itself
        ({"birch": "127.0.0.1"}, "dial-address"),
        ({"birch": ""}, "dial-address"),
        ({"birch": "http://127.0.0.1:7"}, "dial-address"),
    ],
)
def test_an_address_of_nobody_or_of_no_form_is_refused(kits: Path, dial: dict[str, str], code: str) -> None:
    with pytest.raises(TransportError) as caught:
        member(kits, "alder", "127.0.0.1:9", dial)
    assert caught.value.code == code
