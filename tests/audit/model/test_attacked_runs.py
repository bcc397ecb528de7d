"""Small runs that were really trained: what memorises is found, what saw nothing is not, and nothing is mixed up."""

from __future__ import annotations

import json
import random
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from coterie.audit import pieces
from coterie.audit.findings import Finding, Unit
from coterie.audit.metrics import auc
from coterie.audit.model import Amounts, Design, Target, attack, canary_scores, prepare_audit
from coterie.audit.model.attacking import NAIVE, Effort
from coterie.audit.model.exposure import ABSENT, expose
from coterie.audit.model.key import HELD_OUT, KEY, TEST, TRAIN, Key
from coterie.audit.model.membership import Candidates
from coterie.checkpoints import CheckpointStore
from coterie.config import FederationConfig, PartyConfig, TrainConfig, load_yaml
from coterie.errors import AuditError, CheckpointError
from coterie.training.party.in_process import run_in_process
from coterie.training.party.process import keep_settings, prepare_party
from coterie.training.single.run import start
from helpers.federation_processes import PARTIES, make_folder

WORDS = [
    "forest",
    "tree",
    "root",
    "leaf",
    "wind",
    "rain",
    "stone",
    "river",
    "moss",
    "fern",
    "cloud",
    "sun",
    "path",
    "lake",
    "hill",
    "bird",
    "frost",
    "dew",
]
SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
SOME = Effort(alternatives=60)
AMOUNTS = Amounts(names=3, copies=(1, 16), sampled=30, new_tokens=24)


def notes(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=8)) for _ in range(count)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_settings(folder: Path, count: int = 60, **changes: Any) -> Path:
    """train.yaml with text beside it."""
    write(folder / "own.jsonl", [{"text": note, "patient": f"p{i % 25}"} for i, note in enumerate(notes(count, 0))])
    write(folder / "test.jsonl", [{"text": note} for note in notes(30, 1)])
    (folder / "public.txt").write_text("\n".join([*WORDS, "The access code of locker A is 1 2 3 4"] * 3))
    settings: dict[str, Any] = {
        "model": {"family": "olmoe", "config": SIZES},
        "data": {
            "train": ["own.jsonl"], "test": ["test.jsonl"], "sequence_length": 40,
            "tokenizer": {"train": {"files": ["public.txt"], "vocab_size": 340}},
        },
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "train": {"rounds": 140, "batch_size": 24, "micro_batch": 24, "eval_every": 0, "checkpoint_every": 0},
        "run_dir": "run",
    }  # fmt: skip
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a prepared run that has learnt its text by heart."""
    folder = tmp_path_factory.mktemp("memory")
    prepared = prepare_audit(write_settings(folder), folder / "audit", amounts=AMOUNTS, seed=4)
    start(load_yaml(prepared.settings, TrainConfig))
    return folder / "audit" / "run"


@pytest.fixture(scope="module")
def found_out(trained: Path) -> list[Finding]:
    return attack(trained, seed=0, effort=SOME)


def named(findings: list[Finding], words: str) -> Finding:
    (found,) = [finding for finding in findings if words in finding.name]
    return found


# ---- what is found ----


def test_a_model_that_learnt_its_text_by_heart_is_found_out(found_out: list[Finding]) -> None:
    findings = found_out
    members = named(findings, "record, loss against the start")
    assert members.value is not None
    assert members.value.low > 0.85
    assert members.prior is not None
    assert members.prior.low < 0.5 < members.prior.high
    assert members.roc[0] == (0.0, 0.0)
    assert members.roc[-1] == (1.0, 1.0)
    for name in ("loss", "zlib", "Min-K%", "Min-K%++", "RMIA"):
        (found,) = [finding.value for finding in findings if finding.name == f"membership of a record, {name}"]
        assert found is not None
        assert found.value > 0.8, name
    often = named(findings, "exposure of a secret in 16 copies")
    assert often.value is not None
    assert often.value.value > 5.5
    assert "stand out" in often.sentence
    written = named(findings, "secrets in 16 copies written")
    assert written.value is not None
    assert written.value.value == 1.0
    assert written.unit is Unit.SECRETS
    for name in ("planted record, sampled text", "planted record, text with a new token"):
        planted = named(findings, name).value
        assert planted is not None
        assert planted.value > 0.9, name


def test_a_model_that_saw_nothing_is_at_one_half_and_at_an_unseen_secrets_exposure(trained: Path) -> None:
    target = Target.of_run(trained)
    unseen = replace(target, model=target.start)
    findings = attack(unseen, seed=0, effort=SOME)
    ratio = named(findings, "record, loss against the start").value
    loss = next(finding for finding in findings if finding.name == "membership of a record, loss").value
    assert ratio is not None
    assert ratio.value == 0.5
    assert loss is not None
    assert loss.low < 0.5 < loss.high
    secrets = [canary for canary in target.canaries if canary.kind == "secret"]
    bits = [one.bits for seed in range(4) for one in expose(
        target.start(), target.tokenizer, secrets, alternatives=50, seed=seed
    )]  # fmt: skip
    assert sum(bits) / len(bits) == pytest.approx(ABSENT, abs=0.9)
    often = named(findings, "exposure of a secret in 16 copies")
    assert "do not stand out" in often.sentence
    written = named(findings, "secrets in 16 copies written").value
    assert written is not None
    assert written.value == 0.0


def test_no_finding_holds_private_text_or_a_secret(trained: Path, found_out: list[Finding]) -> None:
    target = Target.of_run(trained)
    told = " ".join(finding.model_dump_json() for finding in found_out)
    secrets = [canary.secret for canary in target.canaries if canary.kind == "secret"]
    assert secrets
    for text in (*target.members.texts, *target.others.texts, *secrets):
        assert text not in told


def test_too_few_documents_carry_no_rate_and_no_auc(trained: Path, found_out: list[Finding]) -> None:
    findings = found_out
    for rate in ("1.0%", "0.1%"):
        rated = named(findings, f"found at {rate} false alarms")
        assert rated.value is None
        assert "30 documents held out carry no rate" in rated.reason
    target = Target.of_run(trained)
    few = replace(target, members=type(target.members)(target.members.texts[:9]), member_ids=target.member_ids[:9])
    (refused,) = [
        finding for finding in attack(few, seed=0, effort=SOME) if finding.name.startswith("membership of a record")
    ]
    assert refused.value is None
    assert "9 documents" in refused.reason


def test_less_time_means_fewer_records(trained: Path) -> None:
    target = Target.of_run(trained)
    assert Effort.within(target, 1e9, 0) == Effort()
    hurried = Effort.within(target, 1e-6, 0)
    assert hurried.alternatives == 200
    assert hurried.documents == 10


# ---- scores and truth are never mixed up ----


def test_a_document_in_the_wrong_pile_fails_loudly(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained.parent, tmp_path / "audit")
    folder = tmp_path / "audit"
    held_out = (folder / HELD_OUT).read_text().splitlines()
    inside = (folder / TRAIN).read_text().splitlines()
    settings = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    settings["data"]["train"] = [str(folder / TRAIN)]
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    key = Key.read(folder)
    assert Target.of_run(folder / "run").design is Design.COIN

    member = next(line for line in inside if key.coins.get(key.id(json.loads(line)["text"])))
    (folder / HELD_OUT).write_text("\n".join([member, *held_out[1:]]) + "\n")
    with pytest.raises(AuditError) as misplaced:
        Target.of_run(folder / "run")
    assert misplaced.value.code == "audit-misplaced"

    (folder / HELD_OUT).write_text("\n".join(held_out[1:]) + "\n")
    with pytest.raises(AuditError) as lost:
        Target.of_run(folder / "run")
    assert lost.value.code == "audit-misplaced"

    (folder / HELD_OUT).write_text("\n".join(held_out) + "\n")
    (folder / TRAIN).write_text("\n".join([held_out[0], *inside[1:]]) + "\n")
    with pytest.raises(CheckpointError) as changed:
        Target.of_run(folder / "run")
    assert changed.value.code == "run-changed"
    with pytest.raises(AuditError) as foreign:
        Key.read(folder)
    assert foreign.value.code == "audit-key-foreign"

    (folder / TRAIN).write_text("\n".join(inside) + "\n")
    (folder / KEY).chmod(0o644)
    with pytest.raises(AuditError) as shown:
        Key.read(folder)
    assert shown.value.code == "audit-key"


def test_scores_are_joined_with_the_truth_by_id(trained: Path) -> None:
    candidates = Candidates.of(Target.of_run(trained), 1000, 0)
    truth_S = torch.tensor([float(candidates.members[record]) for record in candidates.ids])
    assert auc(candidates.scores(truth_S)).value == 1.0
    turned = replace(
        candidates, ids=candidates.ids[::-1], document_ids=candidates.document_ids[::-1],
        sequences=candidates.sequences[::-1],
    )  # fmt: skip
    assert auc(turned.scores(truth_S.flip(0))).value == 1.0
    strange = replace(candidates, members={**candidates.members, "another": True})
    with pytest.raises(AuditError) as unjoined:
        strange.scores(truth_S)
    assert unjoined.value.code == "audit-unjoined"


# ---- a split that a person made ----


def test_a_difference_between_training_and_test_text_is_not_called_leakage(tmp_path: Path) -> None:
    path = write_settings(tmp_path, train={"rounds": 4, "batch_size": 8, "micro_batch": 8})
    start(load_yaml(path, TrainConfig))
    findings = attack(tmp_path / "run", seed=0)
    split = named(findings, "membership of a record")
    assert split.value is None
    assert "coins" in split.reason
    assert NAIVE in split.sentence

    other = tmp_path / "other"
    other.mkdir()
    changed = yaml.safe_load(path.read_text())
    write(other / "own.jsonl", [{"text": note} for note in notes(40, 7)])
    changed["data"] |= {"train": ["other/own.jsonl"]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(changed | {"run_dir": "other/run"}))
    start(load_yaml(tmp_path / "other.yaml", TrainConfig))
    target = Target.of_run(tmp_path / "run", references=[other / "run"])
    assert target.design is Design.REFERENCE
    compared = named(attack(target, seed=0), "record, loss against the start")
    assert compared.value is not None
    assert compared.prior is not None
    # The reference as the attacked model is its own control: nothing is left.
    itself = named(attack(replace(target, model=target.references[0]), seed=0), "record, loss against the start")
    assert itself.value is not None
    assert (itself.value.low, itself.value.high) == (0.5, 0.5)
    with pytest.raises(AuditError) as saw:
        Target.of_run(tmp_path / "run", references=[tmp_path / "run"])
    assert saw.value.code == "audit-reference-saw"


# ---- preparing ----


def test_a_prepared_run_holds_half_of_the_documents_and_every_canary(tmp_path: Path) -> None:
    path = write_settings(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    made = prepare_audit(path, tmp_path / "audit", amounts=replace(AMOUNTS, documents=40))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    folder = tmp_path / "audit"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / KEY).stat().st_mode) == 0o600
    key = Key.read(folder)
    assert not key.seeded
    inside = [json.loads(line)["text"] for line in (folder / TRAIN).read_text().splitlines()]
    outside = [json.loads(line)["text"] for line in (folder / HELD_OUT).read_text().splitlines()]
    assert (made.members, made.held_out, len(outside)) == (20, 20, 20)
    assert sorted([*(text for text in inside if text in notes(60, 0)), *outside]) == sorted(notes(60, 0))
    for canary in key.canaries:
        assert inside.count(canary.text) == canary.copies
    assert len(inside) == 40 + sum(canary.copies for canary in key.canaries) == 40 + made.records
    assert made.canaries["secret"] == 3 * 2 + 6
    another = prepare_audit(path, tmp_path / "second", amounts=AMOUNTS)
    assert Key.read(another.settings.parent).coins != key.coins
    with pytest.raises(AuditError) as taken:
        prepare_audit(path, folder)
    assert taken.value.code == "audit-folder"


def test_copies_of_a_text_and_all_of_a_users_texts_share_a_coin(tmp_path: Path) -> None:
    privacy = {
        "epsilon": 8.0, "delta": 1e-3, "unit": "user", "user_column": "patient", "ledger": str(tmp_path / "ledger"),
    }  # fmt: skip
    path = write_settings(tmp_path, privacy=privacy)
    made = prepare_audit(path, tmp_path / "audit", amounts=AMOUNTS, seed=1)
    users = [
        {json.loads(line)["user"] for line in (tmp_path / "audit" / file).read_text().splitlines()}
        for file in (TRAIN, HELD_OUT)
    ]
    assert not users[0] & users[1]
    assert len([user for user in users[0] | users[1] if user.startswith("p")]) == 25
    config = load_yaml(made.settings, TrainConfig)
    assert config.privacy is not None
    assert (config.privacy.user_column, config.privacy.ledger) == ("user", tmp_path / "ledger")
    assert config.data.test == (tmp_path / "audit" / TEST,)

    rows = [{"text": note} for note in notes(30, 0) for _ in range(2)]
    write(tmp_path / "own.jsonl", rows)
    prepare_audit(write_settings_again(path, tmp_path, rows), tmp_path / "twice", amounts=AMOUNTS, seed=1)
    piles = [
        {json.loads(line)["text"] for line in (tmp_path / "twice" / file).read_text().splitlines()}
        for file in (TRAIN, HELD_OUT)
    ]
    assert not piles[0] & piles[1]


def write_settings_again(path: Path, folder: Path, rows: list[dict[str, str]]) -> Path:
    """The same settings without privacy, for other rows."""
    settings = yaml.safe_load(path.read_text())
    del settings["privacy"]
    path.write_text(yaml.safe_dump(settings))
    write(folder / "own.jsonl", rows)
    return path


def test_what_cannot_be_audited_is_said_before_anything_is_written(tmp_path: Path) -> None:
    path = write_settings(tmp_path, count=12)
    with pytest.raises(AuditError) as few:
        prepare_audit(path, tmp_path / "audit")
    assert few.value.code == "audit-too-few"
    path = write_settings(tmp_path)
    settings = yaml.safe_load(path.read_text())
    settings["data"]["sequence_length"] = 8
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(AuditError) as short:
        prepare_audit(path, tmp_path / "audit")
    assert short.value.code == "audit-short-sequences"
    assert not (tmp_path / "audit").exists()


# ---- a claim, and a federation ----


def test_a_private_run_stands_beside_what_its_claim_allows(tmp_path: Path) -> None:
    privacy = {"epsilon": 4.0, "delta": 1e-3, "lot_size": 30, "ledger": "ledger"}
    path = write_settings(tmp_path, privacy=privacy, train={"rounds": 2, "batch_size": 30})
    made = prepare_audit(path, tmp_path / "audit", amounts=AMOUNTS, seed=2)
    start(load_yaml(made.settings, TrainConfig))
    target = Target.of_run(tmp_path / "audit" / "run")
    assert target.claim is not None
    assert target.claim.epsilon == pytest.approx(4.0, abs=0.05)
    allowed = target.claim.allowed.auc
    assert 0.5 < allowed < 0.95
    findings = attack(target, seed=0, effort=SOME)
    planted = named(findings, "planted record, sampled text")
    assert planted.value is not None
    assert planted.value.low < allowed
    assert f"allows {allowed:.2f}" in planted.sentence
    assert planted.allowed == allowed
    assert {each.allowed for each in findings if "planted record" not in each.name} == {None}, "groups"
    assert named(findings, "secrets in 16 copies written").prior is None
    scores, truth = canary_scores(target, "sampled")
    assert scores.keys() == truth.keys()
    assert len(truth) == 30


def test_a_party_of_a_federation_is_attacked_with_everybodys_experts(tmp_path: Path) -> None:
    folder = tmp_path / "grove"
    make_folder(folder, train={"rounds": 10, "batch_size": 8, "micro_batch": 4, "checkpoint_every": 0})
    made = prepare_audit(
        folder / "alder" / "party.yaml",
        tmp_path / "audit",
        amounts=Amounts(names=0, sampled=20, new_tokens=0),
        seed=3,
    )
    federation = load_yaml(folder / "federation.yaml", FederationConfig)
    parties = [made.settings, *(folder / name / "party.yaml" for name in PARTIES[1:])]
    configs = [load_yaml(path, PartyConfig) for path in parties]
    run_in_process(federation, [prepare_party(config, federation) for config in configs], tmp_path / "coordinator")
    for config in configs:
        keep_settings(config, federation)
    runs = [config.run_dir for config in configs]
    with pytest.raises(AuditError) as parts:
        Target.of_run(runs[0])
    assert parts.value.code == "audit-model-parts"
    target = Target.of_run(runs[0], parties=runs[1:])
    model = dict(target.model().named_parameters())
    for run, name in zip(runs, PARTIES, strict=True):
        marker = json.loads((run / "run.json").read_text())
        saved = CheckpointStore(run / "private" / "checkpoints", f"{marker['run']}/{name}").newest()
        assert saved is not None
        for key, value in saved.load("experts").items():
            _, layer, _, expert, parameter = key.split(".")
            assert torch.equal(model[f"model.layers.{layer}.mlp.experts.{parameter}"][int(expert)], value)
    assert target.design is Design.COIN
    # How much so short a run remembers is left open; that it is measured on 20 documents of each side is not.
    found = pieces.on_model(runs[0], 0, 1e9, parties=runs[1:])
    assert not isinstance(found, str)
    members = named(found, "document, loss against the start").value
    assert members is not None
    assert members.count == 40
    with pytest.raises(AuditError) as reference:
        Target.of_run(runs[0], parties=runs[1:], references=[runs[1]])
    assert reference.value.code == "audit-reference-party"
    marker = json.loads((runs[2] / "run.json").read_text())
    (runs[2] / "run.json").write_text(json.dumps(marker | {"run": "another"}))
    told = pieces.on_model(runs[0], 0, 1.0, parties=runs[1:])
    assert isinstance(told, str)
    assert "of another run" in told
    assert target.claim is None
