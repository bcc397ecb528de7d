"""A proxy in the environment stands between no two members, whatever the variable is called."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coterie.federation.identity.provision import free_endpoints, local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire import unreachable
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.transport import Address, Lane, Message

NAMES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


@pytest.fixture(params=["dead", "deaf"])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a proxy that refuses connections, or takes them and never answers."""
    for name in (*NAMES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    if request.param == "dead":
        yield free_endpoints(1)[0]
        return
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "named",
    [
        dict.fromkeys(NAMES, "http://{}"),
        {name.upper(): "http://{}" for name in NAMES},
        {"https_proxy": "http://user:secret@{}", "no_proxy": "elsewhere.example"},
        {"GRPC_ADDRESS_HTTP_PROXY": "{}", "GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES": "127.0.0.0/8"},
    ],
    ids=["lower", "upper", "user", "by-address"],
)
def test_members_reach_each_other_past_it_and_doctor_says_the_same(
    tmp_path: Path, proxy: str, named: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in named.items():
        monkeypatch.setenv(name, value.format(proxy))
    kits = local_kits(tmp_path / "kits", ["alder", "birch"])
    settings = Settings(redial_s=0.05, close_s=1.0)
    members = [GrpcTransport(name, load_roster(kit), kit, settings=settings) for name, kit in kits.items()]
    try:
        for member in members:
            member.start(lambda peer, lane, message: message)
        members[1].connect(10.0)
        assert members[1].request("alder", Lane.FORWARD, Message("hello", Address(round=3)), 5.0).address.round == 3
        assert unreachable.look_at("alder", load_roster(kits["birch"]), kits["birch"].authority) is None
        assert unreachable.proxies_named()
    finally:
        for member in members:
            member.close()


def test_a_member_that_is_away_is_told_with_the_proxy_that_was_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://user:secret@127.0.0.1:9")
    kits = local_kits(tmp_path / "kits", ["alder", "birch"])
    problem = unreachable.look_at("alder", load_roster(kits["birch"]), kits["birch"].authority)
    assert problem is not None
    assert problem.code == "unreachable"
    assert "past the proxy that https_proxy names" in str(problem)
    assert "secret" not in str(problem)
