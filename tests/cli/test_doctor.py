"""`coterie doctor`: each finding, good and bad, on files that are spoiled one at a time."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest
import yaml

from coterie.config import FederationConfig, PartyConfig, load_yaml
from coterie.errors import ModelError
from coterie.federation.enrolment.codes import JoinCode, new_secret
from coterie.federation.identity.certificates import cert_pem, key_pem, new_authority
from coterie.federation.identity.kit import load_kit
from coterie.federation.wire import unreachable
from coterie.models.split.trainings import Training, write_trainings
from coterie.training.party.doctor import Diagnosis, diagnose
from coterie.training.party.process import prepare_party
from helpers.federation_commands import edit, run
from helpers.federation_commands import folder as folder
from helpers.federation_commands import made as made


def found(path: Path, **options: object) -> dict[str, Diagnosis]:
    return {each.check: each for each in diagnose(path, **options)}  # type: ignore[arg-type]


def bad(findings: dict[str, Diagnosis]) -> dict[str, str]:
    return {name: each.code for name, each in findings.items() if each.state == "bad"}


@contextmanager
def answering(endpoint: str, key: bytes, certificate: bytes) -> Iterator[None]:
    """A TLS server, as a member's would answer."""
    server = grpc.server(ThreadPoolExecutor(1))
    assert server.add_secure_port(endpoint, grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait(5)


def endpoint_of(folder: Path, name: str) -> str:
    federation = yaml.safe_load((folder / "federation.yaml").read_text())
    return str((federation["parties"] | {"coordinator": federation["coordinator"]})[name]["endpoint"])


def pair_of(folder: Path, name: str) -> tuple[bytes, bytes]:
    kit = load_kit(folder / "kits" / name)
    return key_pem(kit.key), cert_pem(kit.certificate)


def test_sound_party_whose_coordinator_runs_has_nothing_bad(folder: Path, capfd, monkeypatch):
    monkeypatch.setattr(unreachable, "proxies_named", lambda: ())
    target = folder / "found.json"
    with answering(endpoint_of(folder, "coordinator"), *pair_of(folder, "coordinator")):
        assert run("doctor", folder / "alder.yaml", "--json", target) == 0
    told = json.loads(target.read_text())
    assert told["ok"]
    states = {each["check"]: each["state"] for each in told["findings"]}
    assert states.pop("held-out text") == "note"
    assert states.pop("reach birch") == "note"  # it comes later in the list, so it dials us
    assert set(states.values()) == {"ok"}
    assert set(states) >= {
        "settings",
        "certificate",
        "clock",
        "roster",
        "placement",
        "trunk",
        "shard",
        "own endpoint",
        "descriptors",
    }
    assert "as signed" in capfd.readouterr().out


def test_proxy_in_the_environment_is_named_without_its_password(folder: Path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:9")
    proxy = found(folder / "alder.yaml")["proxy"]
    assert proxy.state == "note"
    assert "HTTPS_PROXY" in proxy.found
    assert "secret" not in proxy.found + proxy.fix


def test_coordinator_that_does_not_answer_is_bad_and_the_exit_code_says_so(folder: Path, capfd):
    assert run("doctor", folder / "alder.yaml") == 1
    shown = capfd.readouterr().out
    assert "coterie explain unreachable" in shown
    assert bad(found(folder / "alder.yaml")) == {"reach coordinator": "unreachable"}


def test_endpoint_that_shows_another_certificate_is_bad(folder: Path):
    with answering(endpoint_of(folder, "coordinator"), *pair_of(folder, "birch")):
        assert bad(found(folder / "alder.yaml")) == {"reach coordinator": "peer-certificate"}


def test_settings_that_do_not_fit_the_federation(folder: Path):
    party = edit(folder / "alder.yaml", privacy={"epsilon": 1.0})
    assert bad(found(party))["settings"] == "config-privacy-misfit"


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_more_ranks_than_experts_are_refused_as_where_the_model_is_read(folder: Path, lora: object):
    if lora is not None:
        pytest.importorskip("peft")
    edit(folder / "federation.yaml", exchange="experts", privacy="none", lora=lora)
    assert found(edit(folder / "alder.yaml", experts_over=4, device="cpu"))["ranks"].state == "ok"
    path = edit(folder / "alder.yaml", experts_over=5)
    told = found(path)["ranks"]
    config, federation = load_yaml(path, PartyConfig), load_yaml(folder / "federation.yaml", FederationConfig)
    with pytest.raises(ModelError, match="has 4 experts, and there are 5 ranks") as caught:
        prepare_party(config, federation)
    assert (told.state, told.code) == ("bad", caught.value.code) == ("bad", "spread-few-experts")
    assert (told.found, told.fix) == (caught.value.message, caught.value.fix)


@pytest.mark.parametrize(
    ("days", "state", "code"), [(380, "note", "identity-expires-soon"), (400, "bad", "identity-expired")]
)
def test_certificate_that_ends_soon_or_has_ended(folder: Path, days: int, state: str, code: str):
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    certificate = found(folder / "alder.yaml", now=later)["certificate"]
    assert (certificate.state, certificate.code) == (state, code)
    assert certificate.fix


def test_clock_that_is_behind_the_kits_files(folder: Path):
    ahead = dt.datetime.now(dt.UTC) + dt.timedelta(hours=2)
    os.utime(folder / "kits" / "alder" / "roster.json", (ahead.timestamp(), ahead.timestamp()))
    assert bad(found(folder / "alder.yaml"))["clock"] == "clock-behind"


def test_roster_of_other_settings_and_one_that_was_changed(folder: Path):
    edit(folder / "federation.yaml", deadline_s=5.0)
    assert bad(found(folder / "alder.yaml"))["roster"] == "config-mismatch"
    edit(folder / "federation.yaml", deadline_s=4.0)
    path = folder / "kits" / "alder" / "roster.json"
    roster = json.loads(path.read_text())
    roster["roster"]["membership_epoch"] = 2
    path.write_text(json.dumps(roster))
    assert bad(found(folder / "alder.yaml"))["roster"] == "roster-changed"


def test_placement_that_was_not_signed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from coterie.models.split.placement import Placement

    monkeypatch.setattr(Placement, "content_hash", lambda self: "0" * 64)
    assert bad(found(folder / "alder.yaml"))["placement"] == "placement-unsigned"


def test_trunk_and_shard_of_something_else(folder: Path):
    shard, trunk = "split/experts-alder.safetensors", "split/trunk.safetensors"
    told = bad(found(edit(folder / "alder.yaml", trunk=shard, shard=trunk)))
    assert (told["trunk"], told["shard"]) == ("model-bad-trunk", "model-bad-shard")
    told = bad(found(edit(folder / "alder.yaml", trunk="nowhere", shard="split/experts-birch.safetensors")))
    assert (told["trunk"], told["shard"]) == ("model-no-file", "placement-shard")


def test_text_that_cannot_be_read(folder: Path):
    (folder / "empty.txt").write_text("")
    data = yaml.safe_load((folder / "alder.yaml").read_text())["data"]
    told = bad(found(edit(folder / "alder.yaml", data={**data, "train": "nowhere.txt", "test": "empty.txt"})))
    assert told["training text"].startswith("data-")
    assert told["held-out text"].startswith("data-")


def test_sequences_longer_than_the_model_reads(folder: Path):
    data = yaml.safe_load((folder / "alder.yaml").read_text())["data"]
    told = bad(found(edit(folder / "alder.yaml", data={**data, "sequence_length": 100_000})))
    assert told["training text"] == "config-sequence-length"


def test_a_start_that_read_private_text_without_a_budget(folder: Path):
    party = private(folder, None)
    assert found(party)["provenance"].state == "ok"
    write_trainings(folder / "split" / "model", [Training("r1", "none")])
    edit(folder / "federation.yaml", model={"path": "split/model", "provenance": "public"})
    assert bad(found(party))["provenance"] == "dp-private-start"


@pytest.mark.parametrize("option", ["--train", "--test"])
@pytest.mark.parametrize("name", ["join", "invite"])
def test_text_that_is_not_there_is_said_before_anybody_is_asked(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    monkeypatch.chdir(tmp_path)
    code = JoinCode(new_secret(), "127.0.0.1:1")
    assert run(name, *([str(code)] if name == "join" else ["alder", "nowhere.yaml"]), option, "nowhere.jsonl") == 1
    assert "data-no-file: There is no data file nowhere.jsonl" in capfd.readouterr().err
    assert not any(tmp_path.iterdir())


def test_port_of_ones_own_that_is_taken(folder: Path):
    host, port = endpoint_of(folder, "alder").split(":")
    with closing(socket.create_server((host, int(port)))):
        assert bad(found(folder / "alder.yaml"))["own endpoint"] == "port-taken"


def test_kit_of_another_ca(folder: Path):
    (folder / "kits" / "alder" / "ca.pem").write_bytes(cert_pem(new_authority("grove").certificate))
    assert bad(found(folder / "alder.yaml"))["certificate"] == "identity-other-ca"


def test_missing_kit_spoils_what_needs_it_and_nothing_else(folder: Path):
    shutil.rmtree(folder / "kits" / "alder")
    assert set(bad(found(folder / "alder.yaml"))) == {
        "certificate",
        "clock",
        "roster",
        "placement",
        "starting weights",
        "reach coordinator",
        "reach birch",
    }


def private(folder: Path, sigma: float | None, lot: int = 1) -> Path:
    """alder's settings in a federation of three with a budget; the roster knows nothing of it."""
    federation = yaml.safe_load((folder / "federation.yaml").read_text())
    third = {"cedar": {"endpoint": "127.0.0.1:1"}}
    agreed = {} if sigma is None else {"aggregation": "masked", "noise_multiplier": sigma}
    edit(
        folder / "federation.yaml", exchange="experts", parties=federation["parties"] | third,
        privacy={"epsilon": 2.0, "delta": 1e-3, "lot_size": lot}, **agreed,
    )  # fmt: skip
    return folder / "alder.yaml"


def test_noise_that_was_agreed_on_and_is_too_little_for_this_partys_text(folder: Path):
    party = private(folder, 0.05)
    assert bad(found(party))["lot and noise"] == "dp-noise-below-needed"
    needed = found(private(folder, 30.0))["lot and noise"]
    assert needed.state == "ok"
    assert "noise multiplier 30, as agreed, which keeps epsilon 2" in needed.found


def test_a_lot_that_is_larger_than_this_partys_text(folder: Path):
    assert bad(found(private(folder, None, lot=5000)))["lot and noise"] == "dp-lot-size"
