"""From a code to a signed roster, and everybody who should not get there: each ends with one sentence."""

from __future__ import annotations

import datetime as dt
import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from coterie.cli.join import _compared
from coterie.errors import ConfigError, CoterieError, IdentityError, ModelError, RosterError, TransportError
from coterie.federation.enrolment import asking, invitations
from coterie.federation.enrolment import desk as desks
from coterie.federation.enrolment.asking import Desk, PartsDesk, call, dial
from coterie.federation.enrolment.codes import JoinCode, new_secret
from coterie.federation.enrolment.desk import ENROLMENT, TryLimit
from coterie.federation.enrolment.hand_out import HAND_OUT, RosterTable
from coterie.federation.enrolment.invitations import INVITATIONS_FILE, Invitations
from coterie.federation.enrolment.inviting import Listening
from coterie.federation.enrolment.joining import Joined, join_federation
from coterie.federation.identity.certificates import Member, Role, cert_pem, fingerprint, key_pem
from coterie.federation.identity.kit import Kit, approve, install, load_authority, load_kit, request
from coterie.federation.identity.provision import free_endpoints, local_kits
from coterie.federation.identity.roster import load_roster, sign
from coterie.federation.wire.newcomers import NEWCOMERS
from coterie.federation.wire.unreachable import presented, split_endpoint
from helpers.inviting import Inviter, Joiner, agreed, invites, watch


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return agreed(tmp_path / "alder")


@pytest.fixture
def inviter(settings: Path) -> Iterator[Inviter]:
    with invites(settings) as made:
        yield made


def joins(code: JoinCode, folder: Path, **how: Any) -> Joined:
    folder.mkdir(exist_ok=True)
    own = {"patience_s": 20.0} | {name: how.pop(name) for name in ("patience_s", "heard_roster") if name in how}
    return join_federation(code, folder, folder / "kit", watch(**how), **own)


def refused(code: JoinCode, folder: Path, **how: Any) -> CoterieError:
    with pytest.raises(CoterieError) as caught:
        joins(code, folder, **how)
    assert not (folder / "kit" / "cert.pem").exists()
    return caught.value


def test_an_invited_party_ends_with_its_kit_its_parts_and_the_roster(settings: Path, tmp_path: Path) -> None:
    with invites(settings) as inviter:
        joined = joins(inviter.codes["birch"], tmp_path / "birch")
        inviter.thread.join(60)
        assert inviter.problem is None
        assert inviter.roster is not None
    assert joined.member == "birch"
    rosters = [load_roster(load_kit(tmp_path / "birch" / "kit"))]
    rosters += [load_roster(load_kit(settings.parent / name)) for name in ("kit", "coordinator-kit")]
    assert {roster.content_hash() for roster in rosters} == {inviter.roster.content_hash()}
    manifest = json.loads((settings.parent / "parts" / "manifest.json").read_text())
    digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    assert rosters[0].weights == digests
    given = {
        str(path.relative_to(tmp_path / "birch" / "parts")) for path in joined.parts.rglob("*") if path.is_file()
    }
    assert given == {"manifest.json", "model/config.json", "trunk.safetensors", "experts-birch.safetensors"}
    for name in given:
        assert (joined.parts / name).read_bytes() == (settings.parent / "parts" / name).read_bytes()


def test_a_private_key_is_made_where_it_is_used_and_stays(inviter: Inviter, settings: Path, tmp_path: Path) -> None:
    joins(inviter.codes["birch"], tmp_path / "birch")
    key = tmp_path / "birch" / "kit" / "key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_text().splitlines()[1]
    assert not [
        path for path in settings.parent.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert stat.S_IMODE((settings.parent / "ca" / INVITATIONS_FILE).stat().st_mode) == 0o600


def test_a_coordinator_elsewhere_is_invited_too_and_gets_no_tensor(settings: Path, tmp_path: Path) -> None:
    at = Listening(desk=free_endpoints(1)[0])
    with invites(settings, elsewhere=True, at=at) as inviter:
        assert set(inviter.codes) == {"coordinator", "birch"}
        other = Joiner(inviter.codes["birch"], tmp_path / "birch")
        joined = Joiner(inviter.codes["coordinator"], tmp_path / "hub").end()
        other.end()
        inviter.thread.join(60)
        assert inviter.roster is not None
    assert joined.parts is None
    assert load_roster(load_kit(tmp_path / "hub" / "kit")).parties[0].name == "coordinator"
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


# -- codes that do not count ----------------------------------------------------------------------------------------


def test_a_wrong_code_is_said_and_makes_nothing(inviter: Inviter, tmp_path: Path) -> None:
    wrong = JoinCode(new_secret(), inviter.inviting.desk)
    assert refused(wrong, tmp_path / "birch").code == "join-code-unknown"
    assert not any((tmp_path / "birch").iterdir())
    inviter.heard("tried a code that is not one of these")


def test_a_code_counts_for_one_key_alone(inviter: Inviter, tmp_path: Path) -> None:
    code = inviter.codes["birch"]
    shut = threading.Event()

    def look(_: str) -> None:
        shut.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        joins(code, tmp_path / "birch", step=lambda line: look(line) if line.startswith("certificate") else None)
    assert shut.is_set()
    error = refused(code, tmp_path / "thief")
    assert error.code == "join-code-used"
    inviter.heard("which was used already")
    assert joins(code, tmp_path / "birch").member == "birch"


def test_an_answer_that_was_lost_is_given_again_to_the_same_key(
    inviter: Inviter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, enrol = inviter.codes["birch"], Desk.enrol

    def lost(self: Desk, signing_request: bytes) -> None:
        enrol(self, signing_request)
        raise KeyboardInterrupt

    monkeypatch.setattr(Desk, "enrol", lost)
    with pytest.raises(KeyboardInterrupt):
        joins(code, tmp_path / "birch")
    monkeypatch.setattr(Desk, "enrol", enrol)
    assert joins(code, tmp_path / "birch").member == "birch"


def test_an_expired_code_is_said_and_a_new_start_makes_another(settings: Path, tmp_path: Path) -> None:
    with invites(settings, valid=dt.timedelta(0)) as inviter:
        old = inviter.codes["birch"]
        assert refused(old, tmp_path / "birch").code == "join-code-expired"
    with invites(settings) as inviter:
        assert inviter.codes["birch"] != old
        assert refused(old, tmp_path / "birch").code == "join-code-unknown"
        assert joins(inviter.codes["birch"], tmp_path / "birch").member == "birch"


def test_guessing_is_slowed_down_by_address(inviter: Inviter, tmp_path: Path) -> None:
    for number in range(desks.WRONG_TRIES):
        wrong = JoinCode(new_secret(), inviter.inviting.desk)
        assert refused(wrong, tmp_path / f"guess{number}").code == "join-code-unknown"
    wrong = JoinCode(new_secret(), inviter.inviting.desk)
    assert refused(wrong, tmp_path / "guess").code == "join-too-many"
    assert len([line for line in inviter.told if "tried a code" in line]) == desks.WRONG_TRIES
    assert joins(inviter.codes["birch"], tmp_path / "birch").member == "birch"  # who shares the address


def test_tries_of_one_address_do_not_count_for_another_and_are_forgotten() -> None:
    limit = TryLimit()
    for _ in range(desks.WRONG_TRIES):
        assert not limit.reached("10.0.0.1", 5.0)
        limit.wrong("10.0.0.1", 5.0)
    assert limit.reached("10.0.0.1", 6.0)
    assert not limit.reached("10.0.0.2", 6.0)
    assert not limit.reached("10.0.0.1", 5.0 + desks.PER_S)
    for number in range(6000):
        limit.wrong(f"host{number}", 6.0)
    assert len(limit._wrong) <= 4096  # noqa: SLF001 - memory is what is bounded


# -- others in its place --------------------------------------------------------------------------------------------


def enemy_server(kit: Any, method: Any) -> tuple[grpc.Server, str]:
    """A desk of somebody who has a certificate of their own."""
    credentials = grpc.ssl_server_credentials([(key_pem(kit.key), cert_pem(kit.certificate))])
    (endpoint,) = free_endpoints(1)
    handlers = {name: grpc.unary_unary_rpc_method_handler(partial(method, name)) for name in ("Invitation", "Enrol")}
    server, _ = desks.serve(
        "enemy", endpoint, credentials, {ENROLMENT: handlers}, workers=2, connections=8, largest=1 << 20
    )
    return server, endpoint


def test_who_did_not_give_out_the_code_is_found_out_before_anything_is_made(settings: Path, tmp_path: Path) -> None:
    enemy = local_kits(tmp_path / "enemy", ("alder", "birch"), federation="grove")["alder"]

    def made_up(name: str, raw: bytes, context: object) -> bytes:
        offer = {
            "member": "birch",
            "federation": "grove",
            "agreement": settings.read_text(),
            "parts_endpoint": "127.0.0.1:1",
            "ca": cert_pem(enemy.authority).decode(),
            "proof": "0" * 64,
        }
        return json.dumps(offer).encode()

    server, endpoint = enemy_server(enemy, made_up)
    error = refused(JoinCode(new_secret(), endpoint), tmp_path / "birch")
    server.stop(None)
    assert error.code == "join-not-the-inviter"
    assert not any((tmp_path / "birch").iterdir())


def test_somebody_between_the_two_is_found_out_by_both(inviter: Inviter, tmp_path: Path) -> None:
    """It has a certificate of its own, passes every question on, and gives back whatever it hears."""
    enemy = local_kits(tmp_path / "enemy", ("alder", "birch"), federation="grove")["alder"]
    shown = presented(inviter.inviting.desk)
    assert shown is not None
    heard: list[str] = []

    def pass_on(name: str, raw: bytes, context: grpc.ServicerContext) -> bytes:
        channel = dial(inviter.inviting.desk, shown)
        try:
            return call(channel, f"/{ENROLMENT}/{name}", json.loads(raw), "there")
        except CoterieError as error:
            heard.append(error.code)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, error.code)
            raise
        finally:
            channel.close()

    server, endpoint = enemy_server(enemy, pass_on)
    error = refused(JoinCode(inviter.codes["birch"].secret, endpoint), tmp_path / "birch")
    server.stop(None)
    assert error.code == "join-code-proof"
    assert heard == ["join-code-proof"]
    inviter.heard("somebody may stand between you")
    assert not any((tmp_path / "birch").iterdir())
    assert joins(inviter.codes["birch"], tmp_path / "birch").member == "birch"  # the code itself is not spoilt


def test_a_stranger_without_a_code_gets_nothing_at_either_door(inviter: Inviter, tmp_path: Path) -> None:
    shown = presented(inviter.inviting.desk)
    assert shown is not None
    channel = dial(inviter.inviting.desk, shown)
    for asked in ({}, {"code": ""}, {"code": "0" * 32, "proof": "0" * 64}, {"code": 7}):
        with pytest.raises(IdentityError):
            call(channel, f"/{ENROLMENT}/Invitation", asked, "there")
    channel.close()
    own = inviter.inviting.config.parties["alder"].endpoint
    bare = dial(own, shown)
    with pytest.raises(CoterieError):
        call(bare, "/coterie.HandOut/Manifest", {}, "there")
    bare.close()
    other = local_kits(tmp_path / "other", ("alder", "birch"), federation="grove")["birch"]
    outside = PartsDesk(own, shown, other)
    with pytest.raises(CoterieError):
        outside.manifest()
    outside.close()


def test_strangers_who_connect_and_say_nothing_keep_nobody_out(inviter: Inviter, tmp_path: Path) -> None:
    host, port = split_endpoint(inviter.inviting.desk)
    quiet = threading.Event()
    with ExitStack() as stack:
        for _ in range(NEWCOMERS + 20):
            stack.enter_context(socket.create_connection((host, port)))
        shown = presented(inviter.inviting.desk)
        assert shown is not None
        for _ in range(10):  # calls that are opened, and whose question never comes
            channel = dial(inviter.inviting.desk, shown)
            stack.callback(channel.close)
            channel.stream_unary(f"/{ENROLMENT}/Invitation").future(iter(quiet.wait, True))
        stack.callback(quiet.set)
        assert joins(inviter.codes["birch"], tmp_path / "birch").member == "birch"


def test_a_certificate_of_the_ca_that_no_invitation_got_opens_nothing(tmp_path: Path) -> None:
    settings = agreed(tmp_path / "alder", ("alder", "birch", "cedar"))
    with invites(settings) as inviter:
        birch = Joiner(inviter.codes["birch"], tmp_path / "birch")
        inviter.heard("birch has its certificate")
        second = second_kit(inviter, settings.parent / "ca", tmp_path / "second")
        shown = presented(inviter.inviting.desk)
        assert shown is not None
        handing = PartsDesk(inviter.inviting.config.parties["alder"].endpoint, shown, second)
        with pytest.raises(CoterieError) as caught:
            handing.manifest()
        handing.close()
        assert "roster-not-listed" in caught.value.message
        Joiner(inviter.codes["cedar"], tmp_path / "cedar").end()
        birch.end()


def second_kit(inviter: Inviter, ca: Path, folder: Path) -> Kit:
    """Another certificate for birch, from the same CA."""
    authority = load_authority(ca)
    member = Member("birch", Role.PARTY, inviter.inviting.config.parties["birch"].endpoint)
    request(member, "grove", folder)
    _, certificate = approve((folder / "request.csr").read_bytes(), [member], authority)
    return install(folder, certificate, authority.certificate, fingerprint(authority.certificate))


def test_a_member_gets_its_own_shard_and_nobody_elses(tmp_path: Path) -> None:
    with invites(agreed(tmp_path / "alder", ("alder", "birch", "cedar"))) as inviter:
        birch = Joiner(inviter.codes["birch"], tmp_path / "birch")
        inviter.heard("birch has its certificate")
        # Birch would give up if it still fetched what goes away below.
        until = time.monotonic() + 20
        while not list((tmp_path / "birch").rglob("trunk.safetensors")):
            assert time.monotonic() < until
            time.sleep(0.02)
        shown = presented(inviter.inviting.desk)
        assert shown is not None
        kit = load_kit(tmp_path / "birch" / "kit")
        handing = PartsDesk(inviter.inviting.config.parties["alder"].endpoint, shown, kit)
        for name in ("experts-alder.safetensors", "manifest.json", "../ca/ca-key.pem", "model/../../kit/key.pem"):
            with pytest.raises(IdentityError) as caught:
                list(handing.chunks(name, 0))
            assert caught.value.code == "join-not-yours"
        assert b"".join(handing.chunks("experts-birch.safetensors", 0))
        (tmp_path / "alder" / "parts" / "trunk.safetensors").rename(tmp_path / "away")
        with pytest.raises(IdentityError) as caught:
            list(handing.chunks("trunk.safetensors", 0))
        assert caught.value.code == "join-file-missing"
        assert str(tmp_path / "alder") not in str(caught.value)
        inviter.heard("trunk.safetensors cannot be read")
        (tmp_path / "away").rename(tmp_path / "alder" / "parts" / "trunk.safetensors")
        handing.close()
        Joiner(inviter.codes["cedar"], tmp_path / "cedar").end()
        birch.end()


# -- what is agreed to ----------------------------------------------------------------------------------------------


def test_without_agreement_nothing_is_signed_and_the_code_stays_good(inviter: Inviter, tmp_path: Path) -> None:
    seen = []

    def no(config: Any) -> bool:
        seen.append(config.privacy)
        return False

    assert refused(inviter.codes["birch"], tmp_path / "birch", agrees=no).code == "join-not-agreed"
    assert seen == ["none"]
    assert not any((tmp_path / "birch").iterdir())
    assert joins(inviter.codes["birch"], tmp_path / "birch").member == "birch"


def test_the_own_copy_of_the_agreement_counts(inviter: Inviter, settings: Path, tmp_path: Path) -> None:
    def asked(_: object) -> bool:
        raise AssertionError("nobody is asked where there is a copy")

    mine = tmp_path / "birch" / "federation.yaml"
    mine.parent.mkdir()
    stricter = yaml.safe_load(settings.read_text()) | {"privacy": {"epsilon": 8, "delta": 1e-5, "lot_size": 2}}
    mine.write_text(yaml.safe_dump(stricter))
    error = refused(inviter.codes["birch"], tmp_path / "birch", agrees=asked)
    assert error.code == "join-other-agreement"
    mine.write_bytes(settings.read_bytes())
    assert joins(inviter.codes["birch"], tmp_path / "birch", agrees=asked).member == "birch"


def test_nobody_signs_a_roster_for_anything_else(
    inviter: Inviter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inviter that shows one agreement and lays out the roster of another."""
    real = Inviting_config = inviter.inviting.config
    changed = real.model_copy(update={"value_limit": 7.0})
    assert changed.content_hash() != Inviting_config.content_hash()
    monkeypatch.setattr(inviter.inviting, "config", changed)
    with pytest.raises(RosterError, match="differ in the settings; it was not signed"):
        joins(inviter.codes["birch"], tmp_path / "birch")
    assert not (tmp_path / "birch" / "kit" / "roster.json").exists()


def test_a_path_that_others_cannot_have_is_refused_by_the_inviter(tmp_path: Path) -> None:
    settings = agreed(tmp_path / "alder")
    elsewhere = yaml.safe_load(settings.read_text()) | {"model": {"path": "/models/olmoe"}}
    settings.write_text(yaml.safe_dump(elsewhere))
    with pytest.raises(IdentityError) as caught:
        Inviter(settings)
    assert caught.value.code == "join-model-path"


# -- the inviter stops, and goes on ---------------------------------------------------------------------------------


def test_an_inviter_that_was_stopped_goes_on_with_the_same_codes(tmp_path: Path) -> None:
    settings = agreed(tmp_path / "alder", ("alder", "birch", "cedar"))
    with invites(settings) as inviter:
        codes = inviter.codes
        birch = Joiner(codes["birch"], tmp_path / "birch")
        inviter.heard("birch has its certificate")
    with invites(settings) as again:
        assert again.codes == {"cedar": codes["cedar"]}
        cedar = Joiner(codes["cedar"], tmp_path / "cedar")
        birch.end()
        cedar.end()
        again.thread.join(60)
        assert again.roster is not None
    with invites(settings) as once_more:  # who has all it needs does not come back to say so
        once_more.thread.join(60)
        assert once_more.roster is not None
    assert set(load_roster(load_kit(tmp_path / "birch" / "kit")).signatures) == {
        "coordinator",
        "alder",
        "birch",
        "cedar",
    }


def test_two_inviters_with_one_ca_are_refused(inviter: Inviter, settings: Path) -> None:
    second = Inviter(settings).start()
    second.thread.join(60)
    assert isinstance(second.problem, IdentityError)
    assert second.problem.code == "invite-twice"


def test_invitations_to_another_agreement_are_not_gone_on_with(tmp_path: Path) -> None:
    how = {"names": ("birch",), "valid": dt.timedelta(hours=1), "now": dt.datetime.now(dt.UTC)}
    Invitations(tmp_path, "a" * 64, **how)
    with pytest.raises(IdentityError) as caught:
        Invitations(tmp_path, "b" * 64, **how)
    assert caught.value.code == "invite-other-agreement"
    for damaged in ("{", "[]", '{"format": "coterie-invitations-1"}'):
        (tmp_path / INVITATIONS_FILE).write_text(damaged)
        with pytest.raises(IdentityError) as caught:
            Invitations(tmp_path, "a" * 64, **how)
        assert caught.value.code == "identity-damaged"


def test_who_used_a_code_is_written_down_before_the_answer_leaves(tmp_path: Path) -> None:
    how = {"names": ("birch",), "valid": dt.timedelta(hours=1), "now": dt.datetime.now(dt.UTC)}
    first = Invitations(tmp_path, "a" * 64, **how)
    used = first.use("birch", "1" * 64, "certificate")
    assert Invitations(tmp_path, "a" * 64, **how).all() == (used,)
    assert first.use("birch", "2" * 64, "other") == used


@pytest.mark.parametrize("move", ["use", "leave"])
def test_what_the_disk_did_not_take_counts_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    moves = {
        "use": lambda made: made.use("birch", "1" * 64, "certificate"),
        "leave": lambda made: made.leave("birch"),
    }
    how = {"names": ("birch",), "valid": dt.timedelta(hours=1), "now": dt.datetime.now(dt.UTC)}
    first = Invitations(tmp_path, "a" * 64, **how)
    before = first.all()
    with monkeypatch.context() as disk:
        disk.setattr(invitations, "write_whole", full)
        with pytest.raises(OSError, match="No space"):
            moves[move](first)
    assert first.all() == before
    moves[move](first)
    assert Invitations(tmp_path, "a" * 64, **how).all() == first.all() != before


def test_nobody_leaves_with_signatures_that_the_inviter_could_lose(tmp_path: Path) -> None:
    kits = local_kits(tmp_path, ("alder", "birch"), federation="grove")
    signed = load_roster(kits["birch"])
    table = RosterTable(kits["alder"])
    table.lay_out(sign(replace(signed, signatures={}), kits["alder"].key, kits["alder"].certificate))
    assert table.waiting() == ["birch"]
    table.sign("birch", signed)
    assert table.waiting() == ["alder"]
    table.settle()
    assert table.waiting() == []


# -- whose roster it is ---------------------------------------------------------------------------------------------


def test_masked_pushes_need_members_that_compared_the_roster(tmp_path: Path) -> None:
    """An inviter that shows each another roster is seen by members that read it to each other, and not else."""
    masked = {"aggregation": "masked", "push_limit": 1.0, "trunk": "shared"}
    settings = agreed(tmp_path / "alder", ("alder", "birch", "cedar"), **masked)
    asked: list[str] = []

    def other(fingerprint: str) -> bool:
        asked.append(fingerprint)
        return False

    with invites(settings) as inviter:
        cedar = Joiner(inviter.codes["cedar"], tmp_path / "cedar")
        for how in ({"same": other}, {"heard_roster": "0" * 40}, {"heard_roster": ""}):
            with pytest.raises(RosterError, match="it was not signed") as caught:
                joins(inviter.codes["birch"], tmp_path / "birch", **how)
            assert caught.value.code == "join-other-roster"
            assert not (tmp_path / "birch" / "kit" / "roster.json").exists()
        assert not any("birch has its parts" in line for line in inviter.told)
        (fingerprint,) = asked
        inviter.heard(fingerprint)
        joined = joins(
            inviter.codes["birch"], tmp_path / "birch", heard_roster=fingerprint.lower().replace("-", " "), same=other
        )
        assert {joined.roster.fingerprint(), cedar.end().roster.fingerprint()} == {fingerprint}
    assert asked == [fingerprint]


def test_where_nobody_is_asked_the_command_says_what_to_do_next() -> None:
    with pytest.raises(RosterError) as caught:
        _compared("AAAAA-BBBBB")
    assert caught.value.code == "join-not-compared"
    assert "--roster AAAAA-BBBBB" in str(caught.value.fix)


# -- parts that do not fit ------------------------------------------------------------------------------------------


def test_parts_of_other_parties_or_without_a_shard_are_not_invited_to(settings: Path) -> None:
    shard = settings.parent / "parts" / "experts-birch.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ModelError, match=r"experts-birch\.safetensors") as missing:
        Inviter(settings)
    assert missing.value.code == "invite-missing-part"
    shard.write_bytes(content)
    federation = yaml.safe_load(settings.read_text())
    federation["parties"]["cedar"] = {"endpoint": free_endpoints(1)[0]}
    settings.write_text(yaml.safe_dump(federation, sort_keys=False))
    with pytest.raises(ModelError, match="other parties") as other:
        Inviter(settings)
    assert other.value.code == "invite-other-split"


@pytest.mark.parametrize("at", ["", "alder", "alder.example:", "alder.example:0", "http://alder:7400", "a b:7400"])
def test_codes_carry_an_address_that_can_be_typed(settings: Path, at: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Inviter(settings, at=Listening(desk=at))
    assert caught.value.code == "invite-at"


# -- an inviter of another kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"", b"[]", b"{", b"\xff", b'{"proof": "\\ud800"}', b'{"proof": 3}', b"[" * 9999])
def test_an_answer_that_is_none_is_one_sentence(tmp_path: Path, answer: bytes) -> None:
    enemy = local_kits(tmp_path / "enemy", ("alder", "birch"), federation="grove")["alder"]
    server, endpoint = enemy_server(enemy, lambda *_: answer)
    error = refused(JoinCode(new_secret(), endpoint), tmp_path / "birch")
    server.stop(None)
    assert error.code == "join-answer"


def test_a_stream_that_stands_still_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enemy = local_kits(tmp_path / "enemy", ("alder", "birch"), federation="grove")["alder"]
    over = threading.Event()

    def one_chunk(raw: bytes, context: object) -> Iterator[bytes]:
        yield b"first"
        over.wait(60)

    credentials = grpc.ssl_server_credentials([(key_pem(enemy.key), cert_pem(enemy.certificate))])
    (endpoint,) = free_endpoints(1)
    handlers = {HAND_OUT: {"File": grpc.unary_stream_rpc_method_handler(one_chunk)}}
    server, _ = desks.serve("enemy", endpoint, credentials, handlers, workers=2, connections=8, largest=1 << 20)
    monkeypatch.setattr(asking, "CHUNK_S", 1.0)
    handing = PartsDesk(endpoint, enemy.certificate, enemy)
    chunks = handing.chunks("trunk.safetensors", 0)
    assert next(chunks) == b"first"
    with pytest.raises(TransportError, match="sent nothing for 1 s"):
        next(chunks)
    over.set()
    handing.close()
    server.stop(None)
