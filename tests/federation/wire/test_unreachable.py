"""Why a member cannot listen or be reached: each reason is a sentence of its own."""

from __future__ import annotations

import datetime as dt
import errno
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from coterie.errors import IdentityError, TransportError
from coterie.federation.identity import certificates
from coterie.federation.identity.certificates import Authority, Member, Role, cert_pem, key_pem
from coterie.federation.identity.kit import Kit, load_kit
from coterie.federation.identity.provision import free_endpoints, local_kits
from coterie.federation.identity.roster import draft, load_roster, save_roster, sign
from coterie.federation.wire import unreachable
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.storage import write_whole


def refuse(number: int) -> Any:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "no")

    return fails


def test_a_port_that_needs_an_administrator_is_not_called_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_server", refuse(errno.EACCES))
    with pytest.raises(TransportError, match="need an administrator's rights") as caught:
        unreachable.check_free("alder", "127.0.0.1:443")
    assert caught.value.code == "port-needs-root"


def test_a_name_service_that_is_away_is_said_wherever_a_name_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    kits = local_kits(tmp_path, ("alder", "birch"))
    roster = load_roster(kits["birch"])
    monkeypatch.setattr(socket, "create_server", away)
    monkeypatch.setattr(socket, "create_connection", away)
    with pytest.raises(TransportError, match="cannot be resolved"):
        unreachable.check_free("alder", "alder.example:7410")
    found = unreachable.look_at("alder", roster, kits["birch"].authority)
    assert found is not None
    assert "cannot be resolved" in found.message


class Failed(grpc.RpcError, grpc.Call):  # type: ignore[misc]  # grpcio has no types
    """A call that ended so."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED"

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None: ...
    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: object) -> bool:
        return False

    def initial_metadata(self) -> None: ...
    def trailing_metadata(self) -> None: ...


def test_who_is_dialled_elsewhere_is_looked_at_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kits = local_kits(tmp_path, ("alder", "birch"))
    roster, looked_at = load_roster(kits["birch"]), []
    shown = {"127.0.0.1:1": None, "127.0.0.1:2": kits["birch"].certificate}

    def presented(endpoint: str) -> Any:
        looked_at.append(endpoint)
        return shown[endpoint]

    monkeypatch.setattr(unreachable, "presented", presented)
    for endpoint in shown:
        error = unreachable.why_refused("alder", endpoint, roster, kits["birch"], Failed())
        assert endpoint in error.message
        assert roster.entry("alder").endpoint not in str(error)
    assert looked_at == list(shown)


@pytest.mark.parametrize("listen", ["", "alder", "alder:", "alder:x", "alder:0", "alder:70000", "http://alder:7410"])
def test_an_address_of_no_form_is_one_sentence(listen: str) -> None:
    with pytest.raises(TransportError, match="is not `host:port`") as caught:
        unreachable.check_free("alder", listen)
    assert caught.value.code == "endpoint-form"


@contextmanager
def two_sides(folder: Path, authority: Authority, lives: dict[str, float]) -> Iterator[dict[str, GrpcTransport]]:
    """alder listens and birch dials, with certificates that live for so many seconds."""
    members = [Member(n, Role.PARTY, e) for n, e in zip(lives, free_endpoints(2), strict=True)]
    keys = {member.name: certificates.new_key() for member in members}
    issued = {m.name: authority.issue(m, keys[m.name].public_key(), days=lives[m.name] / 86400) for m in members}
    roster = draft("demo", 1, members, issued, config_hash="", placement_hash="")
    for name, key in keys.items():
        roster = sign(roster, key, issued[name])
    kits: dict[str, Kit] = {}
    for name, key in keys.items():
        kit = folder / name
        kit.mkdir()
        write_whole(kit / "key.pem", key_pem(key), 0o600)
        write_whole(kit / "cert.pem", cert_pem(issued[name]))
        write_whole(kit / "ca.pem", cert_pem(authority.certificate))
        save_roster(roster, kit / "roster.json")
        kits[name] = load_kit(kit)
    sides = {name: GrpcTransport(name, load_roster(kit), kit) for name, kit in kits.items()}
    try:
        for side in sides.values():
            side.start(lambda peer, lane, message: message)
        yield sides
    finally:
        for side in sides.values():
            side.close()


@pytest.mark.parametrize("whose", ["dialling", "listening", "ca"])
def test_a_certificate_that_ends_in_mid_run_is_named_with_its_date_on_both_sides(
    tmp_path: Path, whose: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    life, long = 6.0, 30 * 86400.0
    authority = certificates.new_authority("demo", days=(life if whose == "ca" else long) / 86400)
    end = time.monotonic() + life
    lives = {"alder": life if whose == "listening" else long, "birch": life if whose == "dialling" else long}
    with two_sides(tmp_path, authority, lives) as sides:
        sides["birch"].connect(life, ["alder"])
        time.sleep(max(0.0, end + 1 - time.monotonic()))
        for link in list(sides["birch"]._connections):
            link.cut()
        deadline = time.monotonic() + 60
        told = {"birch": "", "alder": ""}
        while not all("expired on" in text for text in told.values()) and time.monotonic() < deadline:
            time.sleep(0.2)
            told = {"birch": sides["birch"]._last_seen("alder"), "alder": sides["alder"]._last_seen("birch")}
        day = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"
        for text in told.values():
            assert f"expired on {day}" in text
            assert {"dialling": "of birch", "listening": "of alder", "ca": ""}[whose] in text
        with pytest.raises(IdentityError, match="expired on"):
            sides["birch"].connect(30.0, ["alder"])
