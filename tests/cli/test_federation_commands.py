"""coordinator, up, status, resume: what is said when something does not fit. One federation folder for all tests."""

from __future__ import annotations

import datetime as dt
import json
import math
import socket
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from coterie.config import DataSpec, FederationConfig, PartyConfig, PrivacyRules, load_yaml
from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.ledger import open_ledger
from coterie.errors import LedgerError
from coterie.federation.identity.certificates import Member, Role, cert_pem, key_pem, new_authority, new_key
from coterie.federation.identity.kit import load_authority
from coterie.federation.rounds.run_folder import RunFolder
from coterie.models.split.origins import save_tensors
from coterie.training.data.documents import read_documents
from coterie.training.party.after_private import check_after_private
from helpers.federation_commands import PARTIES, edit, run
from helpers.federation_commands import folder as folder
from helpers.federation_commands import made as made


def test_parties_that_never_arrive_are_named_with_the_deadline(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert run("coordinator", folder / "federation.yaml") == 1
    shown = capfd.readouterr()
    assert "waiting for alder, birch, 1 s left" in shown.err
    assert "roster fingerprint " in shown.out
    assert "Error round-party-missing" in shown.err
    assert "alder and birch did not arrive within 1 s" in shown.err
    assert run("status", folder / "runs" / "coordinator", "--json", folder / "status.json") == 0
    shown = capfd.readouterr()
    assert "grove, coordinator: not running" in shown.out
    status = json.loads((folder / "status.json").read_text())
    assert (status["ending"], status["parties"], status["committed"]) == ("failed", list(PARTIES), 0)


@pytest.mark.parametrize("who", ["coordinator", "up"])
def test_federation_file_that_was_changed_after_signing_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], who: str
):
    edit(folder / "federation.yaml", deadline_s=5.0)
    target = "federation.yaml" if who == "coordinator" else "alder.yaml"
    assert run(who, folder / target) == 1
    shown = capfd.readouterr().err
    assert "Error config-mismatch" in shown
    assert "is not the one that was signed" in shown


@pytest.mark.parametrize("who", ["coordinator", "up"])
def test_roster_that_was_changed_after_signing_is_refused(folder: Path, capfd: pytest.CaptureFixture[str], who: str):
    name = "coordinator" if who == "coordinator" else "alder"
    path = folder / "kits" / name / "roster.json"
    roster = json.loads(path.read_text())
    roster["roster"]["membership_epoch"] = 2
    path.write_text(json.dumps(roster))
    assert run(who, folder / ("federation.yaml" if who == "coordinator" else "alder.yaml")) == 1
    assert "Error roster-changed" in capfd.readouterr().err


def test_taken_port_is_named(folder: Path, capfd: pytest.CaptureFixture[str]):
    endpoint = yaml.safe_load((folder / "federation.yaml").read_text())["coordinator"]["endpoint"]
    host, port = endpoint.split(":")
    with closing(socket.create_server((host, int(port)))):
        # The coordinator comes first in the roster, so everybody dials it and it has to listen.
        assert run("coordinator", folder / "federation.yaml") == 1
    shown = capfd.readouterr().err
    assert endpoint in shown
    assert "Traceback" not in shown


def test_kit_of_another_member_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert run("coordinator", folder / "federation.yaml", "--kit", folder / "kits" / "alder") == 1
    assert "Error identity-other-member" in capfd.readouterr().err
    assert run("up", edit(folder / "alder.yaml", kit="kits/birch")) == 1
    assert "Error identity-other-member" in capfd.readouterr().err


def test_shard_of_another_party_is_refused_before_anything_is_sent(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert run("up", edit(folder / "alder.yaml", shard="split/experts-birch.safetensors")) == 1
    shown = capfd.readouterr().err
    assert "Error placement-shard" in shown
    assert "does not hold the experts of alder: it lacks layer 0 expert 0 and 1 more and holds layer 0" in shown
    assert not (folder / "runs" / "alder" / "party.yaml").exists()


def test_text_with_a_private_past_is_refused_by_tokens_unless_the_party_says_otherwise(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    documents = read_documents((folder / "own.txt",), DataSpec(train=(folder / "own.txt",)))
    ledger = open_ledger(dataset_digest(documents.texts), folder / "ledger")
    ledger.start_run("earlier", Mechanism(1.0, 0.1), 5)
    party = edit(folder / "alder.yaml", ledger="ledger")
    assert run("up", party) == 1  # nothing was released: the coordinator is what is missing
    assert "tokens-after-private" not in capfd.readouterr().err
    ledger.record_release("earlier", 1, 0, "e" * 64, {})
    assert math.isfinite(ledger.lifetime(1e-5).epsilon)
    assert run("up", party) == 1
    shown = capfd.readouterr().err
    assert "Error tokens-after-private" in shown
    assert "after_private: reveal" in shown
    assert math.isfinite(ledger.lifetime(1e-5).epsilon)
    for _ in range(2):
        assert run("up", edit(party, after_private="reveal")) == 1
        assert "tokens-after-private" not in capfd.readouterr().err
    assert ledger.lifetime(1e-5).epsilon == math.inf
    assert ledger.revealed() == ["grove-alder"]
    assert [entry.kind for entry in ledger.entries()].count("revealed") == 1


def test_plain_experts_after_private_training_are_refused_as_tokens_are(folder: Path):
    """Pushed sums without noise give whole records back; nothing but settings and text is needed to say so."""
    federation = load_yaml(folder / "federation.yaml", FederationConfig)
    party = load_yaml(edit(folder / "alder.yaml", ledger="ledger"), PartyConfig)
    documents = read_documents(party.data.train, party.data)
    ledger = open_ledger(dataset_digest(documents.texts), folder / "ledger")
    ledger.start_run("earlier", Mechanism(1.0, 0.1), 5)
    ledger.record_release("earlier", 1, 0, "e" * 64, {})
    plain = federation.model_copy(update={"exchange": "experts", "privacy": "none"})
    with pytest.raises(LedgerError, match="whole records") as refused:
        check_after_private(party, plain, documents)
    assert refused.value.code == "plain-after-private"
    rules = PrivacyRules(epsilon=8.0)
    check_after_private(party, plain.model_copy(update={"privacy": rules}), documents)
    assert ledger.revealed() == []
    check_after_private(party.model_copy(update={"after_private": "reveal"}), plain, documents)
    assert ledger.revealed() == ["grove-alder"]
    assert ledger.lifetime(1e-5).epsilon == math.inf


def test_port_taken_is_named_before_anything_is_read(folder: Path, capfd: pytest.CaptureFixture[str]):
    endpoint = yaml.safe_load((folder / "federation.yaml").read_text())["parties"]["alder"]["endpoint"]
    host, port = endpoint.split(":")
    party = edit(folder / "alder.yaml", trunk="elsewhere.safetensors")
    with closing(socket.create_server((host, int(port)))):
        assert run("up", party) == 1
    shown = capfd.readouterr().err
    assert "Error port-taken" in shown
    assert endpoint in shown
    assert not (folder / "runs" / "alder" / "party.yaml").exists()


@pytest.mark.parametrize(
    ("whose", "code", "sentence"),
    [
        ("another ca", "identity-other-ca", "The certificate of alder was not issued by this federation's CA."),
        ("expired", "identity-expired", "The certificate of alder expired on"),
        ("outside the roster", "roster-not-listed", "alder"),
    ],
)
def test_kit_that_does_not_hold_is_one_clear_sentence(
    folder: Path, capfd: pytest.CaptureFixture[str], whose: str, code: str, sentence: str
):
    kit, authority = folder / "kits" / "alder", load_authority(folder / "kits" / "ca")
    if whose == "another ca":
        authority = new_authority("grove")
    key, then = new_key(), dt.datetime.now(dt.UTC) - dt.timedelta(days=9)
    member = Member("alder", Role.PARTY, "127.0.0.1:1")
    issued = authority.issue(
        member,
        key.public_key(),
        **({"days": 3, "now": then} if whose == "expired" else {}),  # type: ignore[arg-type]
    )
    (kit / "cert.pem").write_bytes(cert_pem(issued))
    (kit / "key.pem").write_bytes(key_pem(key))
    assert run("up", folder / "alder.yaml") == 1
    shown = capfd.readouterr().err
    assert f"Error {code}: " in shown
    assert sentence in shown
    assert shown.count("Error ") == 1
    assert "Traceback" not in shown
    assert not (folder / "runs" / "alder" / "party.yaml").exists()


def test_trunk_as_shard_and_missing_files_are_refused(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert run("up", edit(folder / "alder.yaml", shard="split/trunk.safetensors")) == 1
    assert "Error model-bad-shard" in capfd.readouterr().err
    assert run("up", edit(folder / "alder.yaml", trunk="elsewhere.safetensors")) == 1
    assert "Error model-no-file" in capfd.readouterr().err


def test_coordinator_that_is_not_there_ends_the_party_with_its_deadline(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    assert run("up", folder / "alder.yaml") == 1
    shown = capfd.readouterr().err
    assert "coordinator" in shown
    assert "Traceback" not in shown


def test_party_outside_the_federation_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert run("up", edit(folder / "alder.yaml", party="dogwood")) == 1
    shown = capfd.readouterr().err
    assert "Error roster-unknown-member" in shown
    assert "parties: alder, birch" in shown


def test_resume_and_status_of_a_folder_without_a_run_say_so(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert run("status", folder / "alder.yaml") == 1
    assert "Error status-none" in capfd.readouterr().err
    assert run("resume", folder / "runs" / "alder") == 1
    assert "Error run-dir-none" in capfd.readouterr().err


def test_second_process_in_a_run_folder_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]):
    first = RunFolder(folder / "runs" / "coordinator")
    assert run("coordinator", folder / "federation.yaml") == 1
    assert "Error run-busy" in capfd.readouterr().err
    first.close()


@pytest.mark.parametrize("which", ["trunk.safetensors", "experts-alder.safetensors"])
def test_starting_weights_that_were_replaced_stop_doctor_and_run(
    folder: Path, capfd: pytest.CaptureFixture[str], which: str
):
    path = folder / "split" / which
    # The same names, shapes and origin over other numbers, consistent in itself: only the roster can tell.
    save_tensors(path, {name: torch.randn_like(value) for name, value in load_file(path).items()}, run="", round_no=0)
    assert run("up", folder / "alder.yaml") == 1
    assert "Error weights-unsigned" in capfd.readouterr().err
    assert run("doctor", folder / "alder.yaml", "--json", folder / "found.json") == 1
    found = {each["check"]: each for each in json.loads((folder / "found.json").read_text())["findings"]}
    assert (found["starting weights"]["state"], found["starting weights"]["code"]) == ("bad", "weights-unsigned")
    assert which in found["starting weights"]["found"]


def test_starting_weights_without_an_origin_or_of_two_rounds_are_refused(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    trunk = folder / "split" / "trunk.safetensors"
    weights = load_file(trunk)
    save_file(weights, trunk)
    assert run("up", folder / "alder.yaml") == 1
    assert "Error model-no-origin" in capfd.readouterr().err
    save_tensors(trunk, weights, run="other", round_no=4)
    assert run("up", folder / "alder.yaml") == 1
    assert "Error model-parts-mixed" in capfd.readouterr().err


def test_a_roster_without_weights_is_noted_and_one_for_others_is_not_signed(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    settings = folder / "federation.yaml"
    assert run("provision", settings, "--out", folder / "bare") == 0
    assert "starting weights are not in the roster" in capfd.readouterr().out
    edit(folder / "alder.yaml", kit="bare/alder")
    run("doctor", folder / "alder.yaml", "--json", folder / "found.json")
    found = {each["check"]: each for each in json.loads((folder / "found.json").read_text())["findings"]}
    assert found["starting weights"]["state"] == "note"
    roster, kit = folder / "kits" / "alder" / "roster.json", folder / "kits" / "alder"
    sign = ("roster", "sign", roster, "--kit", kit, "--out", folder / "signed.json")
    assert run(*sign, "--weights", folder / "split") == 0
    manifest = folder / "split" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"model/config.json"', '"model/other.json"'))
    assert run(*sign, "--weights", folder / "split") == 1
    assert "Error roster-other-weights" in capfd.readouterr().err
