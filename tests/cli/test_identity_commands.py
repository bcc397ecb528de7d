"""provision, request, approve, install, roster: both ways to a working kit, and one sentence when it fails."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import typer

from coterie.cli.app import main
from coterie.cli.output import fail, say
from coterie.errors import IdentityError
from coterie.federation.identity.certificates import fingerprint
from coterie.federation.identity.kit import load_authority, load_kit
from coterie.federation.identity.roster import load_roster

FEDERATION = """
name: demo
model: {family: olmoe, config: {vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2,
  num_attention_heads: 4, num_key_value_heads: 2, num_experts: 4, num_experts_per_tok: 2}}
exchange: tokens
parties:
  alder: {endpoint: "127.0.0.1:7001"}
  birch: {endpoint: "127.0.0.1:7002"}
coordinator: {endpoint: "127.0.0.1:7000"}
train: {rounds: 2, batch_size: 4}
"""
MEMBERS = ("coordinator", "alder", "birch")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "federation.yaml").write_text(FEDERATION)
    return tmp_path


class Shell:
    """Runs commands as a person types them."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, line: str) -> str:
        with suppress(SystemExit):
            main(line.split())
        out, err = self._capsys.readouterr()
        assert "Error" not in err
        return out

    def fails(self, line: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(line.split())
        assert end.value.code == 1
        return self._capsys.readouterr().err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_provision_makes_kits_that_verify(folder: Path, shell: Shell) -> None:
    out = shell("provision federation.yaml --out kits --json made.json")
    made = json.loads((folder / "made.json").read_text())
    assert made["ca_fingerprint"] == fingerprint(load_authority(folder / "kits" / "ca").certificate)
    assert made["ca_fingerprint"] in out
    assert list(made["members"]) == list(MEMBERS)
    for name in MEMBERS:
        assert load_roster(load_kit(folder / "kits" / name)).content_hash() == made["roster_hash"]
        assert "signed by all 3 members" in shell(f"roster verify kits/{name}")
    assert made["roster_hash"] in shell("roster show kits/alder")
    read_out = load_roster(load_kit(Path("kits/birch"))).fingerprint()
    assert f"roster fingerprint {read_out}" in shell("roster show kits/alder")


def test_provision_refuses_a_folder_in_use(folder: Path, shell: Shell) -> None:
    shell("provision federation.yaml")
    key = (folder / "kits" / "alder" / "key.pem").read_bytes()
    assert "Error identity-exists: kits exists already and is not empty." in shell.fails("provision federation.yaml")
    assert (folder / "kits" / "alder" / "key.pem").read_bytes() == key


def test_provision_writes_nothing_when_the_placement_is_wrong(folder: Path, shell: Shell) -> None:
    (folder / "federation.yaml").write_text(FEDERATION + "placement: {0: {0: alder}}\n")
    assert "Error placement-invalid" in shell.fails("provision federation.yaml")
    assert not (folder / "kits").exists()


def made_apart(folder: Path, shell: Shell) -> str:
    """Every member makes its own key; gives the CA fingerprint the keeper read out."""
    out = shell("provision federation.yaml --ca-only --out ca")
    told = re.search(r"fingerprint ((?:[0-9A-F]{2}:){31}[0-9A-F]{2})", out)
    assert told is not None
    for name in MEMBERS:
        shell(f"request {name} federation.yaml --kit {name}")
        shell(f"approve {name}/request.csr federation.yaml --ca ca")
        shell(f"install {name} --certificate approved/{name}.pem --ca approved/ca.pem --fingerprint {told[1]}")
    return told[1]


def test_members_with_keys_of_their_own_come_to_a_signed_roster(folder: Path, shell: Shell) -> None:
    made_apart(folder, shell)
    assert "still to sign: coordinator, alder, birch" in shell("roster make federation.yaml --out blank.json")
    for name in MEMBERS:
        shell(f"roster sign blank.json --kit {name} --federation federation.yaml --out from-{name}.json")
    assert "signed by all" in shell("roster join from-coordinator.json from-alder.json from-birch.json")
    for name in MEMBERS:
        assert "signed by all 3 members" in shell(f"install {name} --roster roster.json")
        assert load_roster(load_kit(folder / name)).parties[0].name == "coordinator"


def test_install_refuses_a_fingerprint_that_differs(folder: Path, shell: Shell) -> None:
    told = made_apart(folder, shell)
    shell("request alder federation.yaml --kit again")
    shell("approve again/request.csr federation.yaml --ca ca")
    wrong = ("00" if told[:2] != "00" else "11") + told[2:]
    error = shell.fails(f"install again --certificate approved/alder.pem --ca approved/ca.pem --fingerprint {wrong}")
    assert (
        "Error identity-ca-fingerprint: The CA certificate is not the one whose fingerprint you were given." in error
    )
    assert not (folder / "again" / "cert.pem").exists()


def test_install_refuses_certificates_without_a_fingerprint(folder: Path, shell: Shell) -> None:
    assert "Error install-incomplete" in shell.fails("install kit --certificate a.pem --ca ca.pem")
    assert "Error install-nothing" in shell.fails("install kit")


def test_a_name_outside_federation_yaml_gets_no_request(folder: Path, shell: Shell) -> None:
    assert "`mallory` is no member of demo." in shell.fails("request mallory federation.yaml --kit m")
    assert not (folder / "m").exists()
    assert "There is no request m.csr." in shell.fails("approve m.csr federation.yaml --ca ca")


def test_nobody_signs_a_roster_for_other_settings(folder: Path, shell: Shell) -> None:
    shell("provision federation.yaml")
    roster = folder / "kits" / "alder" / "roster.json"
    before = roster.read_bytes()
    for changed, what in [
        (FEDERATION.replace("rounds: 2", "rounds: 3"), "the settings"),
        (FEDERATION.replace("7002", "7009"), "the members or their endpoints"),
        (FEDERATION.replace("name: demo", "name: other"), "the federation's name"),
    ]:
        (folder / "changed.yaml").write_text(changed)
        error = shell.fails(f"roster sign {roster} --kit kits/alder --federation changed.yaml")
        assert f"differ in {what}; it was not signed" in error
    assert roster.read_bytes() == before


def test_a_roster_changed_after_signing_fails_verification(folder: Path, shell: Shell) -> None:
    shell("provision federation.yaml")
    path = folder / "kits" / "birch" / "roster.json"
    path.write_text(path.read_text().replace("127.0.0.1:7001", "127.0.0.1:7005"))
    assert "Error roster-changed: The roster was changed after it was written." in shell.fails(
        "roster verify kits/birch"
    )


@pytest.mark.parametrize("line", ["roster show a b", "roster sign roster.json", "roster verify roster.json"])
def test_wrong_usage_of_roster_says_what_is_missing(folder: Path, shell: Shell, line: str) -> None:
    assert "Error roster-usage" in shell.fails(line)


def test_fingerprints_are_printed_letter_by_letter(capsys: pytest.CaptureFixture[str]) -> None:
    """`:AB:` and `:A:` are names of emoji, too."""
    with suppress(typer.Exit):
        fail(IdentityError("CA 00:AB:0A:A:B", where="AB:AB:AB"))
    say("00:AB:0A:A:B")
    out, err = capsys.readouterr()
    assert "00:AB:0A:A:B" in out
    assert "CA 00:AB:0A:A:B" in err
    assert "AB:AB:AB" in err
