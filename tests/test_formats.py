"""What a later version may have written is refused in one sentence; what this format's first version wrote is read.

``formats/`` holds files of the first version as text; tensor files are built here from their headers.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import default_data_collator

from coterie import dp
from coterie.checkpoints import CheckpointStore
from coterie.dp import checkpoint
from coterie.dp.accounting import texts
from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.accounting.ledger import FILE, Entry, Ledger, existing_ledger, ledger_folder, open_ledger
from coterie.dp.accounting.merging import merge
from coterie.dp.accounting.spool import Spool
from coterie.dp.ownership import Ownership
from coterie.errors import CheckpointError, CoterieError, LedgerError, ModelError
from coterie.federation.rounds.journal import Journal
from coterie.federation.rounds.state import Phase, Saved
from coterie.models.split.origins import Origin, check_content, origin_of, save_tensors
from coterie.models.split.shards import check_digests
from coterie.models.split.trainings import Training, read_trainings
from coterie.models.spread.holdings import Holdings
from coterie.ranks.ranks import Alone
from coterie.training.party.store import PartyStore
from coterie.training.single.prepared import read_run
from helpers.first_formats import FIRST, first_spool, tensor_file

DATASET, AGREEMENT, RUN = "d" * 64, "a" * 64, "f" * 64
TWO = torch.tensor([1.0, -2.0])
OTHERS: list[Any] = [2, 0, "1", "2", True, 1.0, None, [1], {"major": 1}]
"""Formats that nobody has written, and values that equal 1 without being it."""


def header_of(**more: Any) -> dict[str, str]:
    """The `coterie` header of [1, -2] under the name a, as the first version wrote it."""
    content = "c3a427baa972c655187f74af1c42a8956e90ee1661ac6cd6fa9cb931e85b9707"
    origin = {"content": content, "lora": None, "round": 5, "run": RUN, "trainings": [], **more}
    return {"coterie": json.dumps(origin, separators=(",", ":"))}


@contextmanager
def refused(kind: type[CoterieError], *words: object) -> Iterator[None]:
    """One error of the class and the code, that says every word, and what to do."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.code == "format-unknown"
    for word in words:
        assert str(word) in caught.value.message
    assert "the version of coterie that wrote it" in (caught.value.fix or "")


def edited(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# -- ledger ------------------------------------------------------------------------------------------------------


def first_ledger(root: Path) -> Path:
    folder = ledger_folder(DATASET, root)
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes((FIRST / "ledger.jsonl").read_bytes())
    return folder / FILE


def entries(path: Path) -> list[Entry]:
    found: list[Entry] = []
    for line in path.read_bytes().splitlines():
        values = json.loads(line)
        found.append(Entry(**values))
    return found


def extended(path: Path, kind: str, data: dict[str, Any]) -> None:
    """An entry of a later version, whose place in the chain is right."""
    with path.open("ab") as file:
        file.write(Entry.after(entries(path)[-1], kind, data).line())


def restarted(path: Path, data: dict[str, Any]) -> None:
    """A chain that begins with other facts about the dataset."""
    chain: list[Entry] = []
    for entry in entries(path):
        chain.append(Entry.after(chain[-1] if chain else None, entry.kind, entry.data if chain else data))
    path.write_bytes(b"".join(entry.line() for entry in chain))


def test_a_ledger_of_the_first_version_counts_as_it_did(tmp_path: Path) -> None:
    first_ledger(tmp_path)
    ledger = open_ledger(DATASET, tmp_path)
    assert [entry.kind for entry in ledger.entries()] == [
        "dataset", "run", "release", "release", "burned", "run", "revealed",
    ]  # fmt: skip
    assert ledger.spent("run-a", 1e-5).epsilon == epsilon([(Mechanism(1.5, 0.1), 2)], 1e-5)
    assert ledger.revealed() == ["run-r"]
    ledger.record_release("run-t", 1, 0, "digest", {})
    assert len(open_ledger(DATASET, tmp_path).releases("run-t")) == 1


def readers(path: Path, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Every way to a ledger: by its dataset, by its folder, from another machine."""
    return {
        "open": lambda: Ledger(path.parent, DATASET),
        "folder": lambda: existing_ledger(path.parent),
        "merge": lambda: merge(tmp_path, tmp_path.parent / f"{tmp_path.name}-own"),
    }


@pytest.mark.parametrize("way", ["open", "folder", "merge"])
@pytest.mark.parametrize("form", OTHERS, ids=repr)
def test_a_ledger_of_another_format_is_refused(tmp_path: Path, form: Any, way: str) -> None:
    path = first_ledger(tmp_path)
    texts.Keyring(tmp_path)
    restarted(path, {"format": form, "digest": DATASET})
    before = path.read_bytes()
    with refused(LedgerError, path, "format", form, "knows 1"):
        readers(path, tmp_path)[way]()
    assert path.read_bytes() == before


def test_a_later_format_is_named_even_where_its_chain_is_another_one(tmp_path: Path) -> None:
    path = first_ledger(tmp_path)
    path.write_text(json.dumps({"v": 2, "data": {"format": 2}}) + "\n")
    with refused(LedgerError, path, "format", 2):
        open_ledger(DATASET, tmp_path)


RUN_FACTS = {"run": "run-b", "mechanism": Mechanism(1.0, 0.1).to_json(), "rounds": 3}


@pytest.mark.parametrize("way", ["open", "folder", "merge"])
@pytest.mark.parametrize(
    ("kind", "data", "word"),
    [
        ("pooled", {"run": "run-a", "round": 3}, "kind `pooled`"),
        ("Release", {"run": "run-a", "round": 3, "draw": 0, "digest": "x", "pins": {}}, "kind `Release`"),
        ("", {}, "kind"),
        ("release", {"run": "run-a", "round": 3, "draw": 0, "digest": "x", "pins": {}, "times": 7}, "`times`"),
        (
            "release",
            {"run": "run-a", "round": 3, "draw": 0, "digest": "x", "pins": {}, "pooled": {"parties": 2, "of": 3}},
            "`of`",
        ),
        ("burned", {"run": "run-a", "round": 2, "draw": 0, "reason": "", "refund": True}, "`refund`"),
        ("texts", {"run": "run-a", "key": "k", "file": "f", "part": 2}, "`part`"),
        ("revealed", {"run": "run-q", "how": "tokens", "only": [1]}, "`only`"),
        ("run", {**RUN_FACTS, "unit": "conversation"}, "unit `conversation`"),
        ("run", {**RUN_FACTS, "mechanism": {**Mechanism(1.0, 0.1).to_json(), "sampler": "shuffle"}}, "`shuffle`"),
        ("run", {**RUN_FACTS, "mechanism": {**Mechanism(1.0, 0.1).to_json(), "shared_by": 3}}, "`shared_by`"),
    ],
)
def test_what_a_later_version_counts_is_refused_and_not_skipped(
    tmp_path: Path, kind: str, data: dict[str, Any], word: str, way: str
) -> None:
    path = first_ledger(tmp_path)
    texts.Keyring(tmp_path)
    extended(path, kind, data)
    with refused(LedgerError, path, "line 8", word):
        readers(path, tmp_path)[way]()


def test_a_ledger_that_another_process_extends_meanwhile_is_refused(tmp_path: Path) -> None:
    path = first_ledger(tmp_path)
    ledger = open_ledger(DATASET, tmp_path)
    extended(path, "pooled", {})
    with refused(LedgerError, "pooled"):
        ledger.spent("run-a", 1e-5)
    with refused(LedgerError, "pooled"):
        ledger.record_release("run-a", 3, 0, "digest", {})


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = first_ledger(tmp_path)
    ledger, before = open_ledger(DATASET, tmp_path), path.read_bytes()
    with refused(LedgerError, "conversation"):
        ledger.start_run("run-b", Mechanism(1.0, 0.1), 3, unit="conversation")
    assert path.read_bytes() == before


@pytest.mark.parametrize("data", [{"run": "run-b", "rounds": 3}, {**RUN_FACTS, "mechanism": {}}, {}])
def test_an_entry_that_lacks_something_is_damaged(tmp_path: Path, data: dict[str, Any]) -> None:
    path = first_ledger(tmp_path)
    extended(path, "run", data)
    with pytest.raises(LedgerError) as caught:
        open_ledger(DATASET, tmp_path)
    assert caught.value.code == "dp-ledger-tampered"


@pytest.mark.parametrize(
    ("facts", "word"), [({"pieces": "1", "salt": "x"}, "salt"), ({"pieces": "1", "forms": "text image"}, "image")]
)
def test_hashes_of_a_later_version_are_refused(tmp_path: Path, facts: dict[str, str], word: str) -> None:
    made = tensor_file(tmp_path / "made", facts, texts=[1.0])
    path = made.rename(tmp_path / hashlib.sha256(made.read_bytes()).hexdigest()[:24])
    with refused(LedgerError, path, word):
        texts.load(path)


# -- spool -------------------------------------------------------------------------------------------------------


def test_a_spool_of_the_first_version_is_read(tmp_path: Path) -> None:
    first_spool(tmp_path / "spool")
    spool = Spool(tmp_path / "spool")
    (release,) = spool.releases()
    assert (release.round, release.draw, release.pins) == (2, 0, {"weights": "w"})
    assert torch.equal(release.tensors()["a"], TWO)
    stored = spool.stored_lot()
    assert stored is not None
    assert (stored.lot.round, stored.lot.records.tolist(), stored.pins) == (3, [1, 4], {"weights": "w"})


@pytest.mark.parametrize("header", [{"format": "3"}, {"format": ""}, {"masked_for": "birch"}])
def test_a_spooled_result_of_a_later_version_is_refused(tmp_path: Path, header: dict[str, str]) -> None:
    path = first_spool(tmp_path / "spool", **header)
    with refused(LedgerError, path, next(iter(header))):
        Spool(tmp_path / "spool").releases()


@pytest.mark.parametrize("change", [*({"format": form} for form in OTHERS), {"ranks": 2}], ids=repr)
def test_a_stored_lot_of_a_later_version_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    first_spool(tmp_path / "spool")
    path = tmp_path / "spool" / "lot.json"
    edited(path, lambda content: content.update(change))
    with refused(LedgerError, path, next(iter(change))):
        Spool(tmp_path / "spool").stored_lot()


@pytest.mark.parametrize(
    "name", ["release-00000002-0-1.safetensors", "release-00000002-0.bin", "lot-2.json", "parts"]
)
def test_a_file_that_nobody_would_look_at_is_refused(tmp_path: Path, name: str) -> None:
    first_spool(tmp_path / "spool")
    (tmp_path / "spool" / name).touch()
    with refused(LedgerError, tmp_path / "spool", name):
        Spool(tmp_path / "spool")
    (tmp_path / "spool" / name).unlink()
    Spool(tmp_path / "spool")  # the refusal did not keep it locked


def test_what_a_crash_or_the_file_system_leaves_in_a_spool_is_no_news(tmp_path: Path) -> None:
    first_spool(tmp_path / "spool")
    for name in ("release-00000003-0.part", ".lot.json.0a1b2c3d.part", ".nfs0001"):
        (tmp_path / "spool" / name).touch()
    assert len(Spool(tmp_path / "spool").releases()) == 1


# -- checkpoints -------------------------------------------------------------------------------------------------


def first_checkpoint(folder: Path, run: str = RUN) -> CheckpointStore:
    path = folder / "round-00000005"
    path.mkdir(parents=True)
    manifest = json.loads((FIRST / "checkpoint.json").read_text()) | {"run": run}
    (path / "manifest.json").write_text(json.dumps(manifest))
    weights = tensor_file(path / "weights.safetensors", header_of(), a=[1.0, -2.0])
    edited(path / "manifest.json", lambda content: content["files"]["weights.safetensors"].update(digest_of(weights)))
    return CheckpointStore(folder, run)


def digest_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_checkpoint_of_the_first_version_is_loaded(tmp_path: Path) -> None:
    store = first_checkpoint(tmp_path)
    newest = store.newest()
    assert newest is not None
    assert (newest.round, newest.state) == (5, {"party": "alder"})
    assert torch.equal(newest.load("weights")["a"], TWO)


@pytest.mark.parametrize("form", [form for form in OTHERS if form is not None], ids=repr)
@pytest.mark.parametrize("more", [[], ["state", "run", "files"]])
def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, form: Any, more: list[str]) -> None:
    store = first_checkpoint(tmp_path)
    path = tmp_path / "round-00000005"

    def later(content: dict[str, Any]) -> None:
        content["format"] = form
        for key in more:
            del content[key]

    edited(path / "manifest.json", later)
    with refused(CheckpointError, path, "format", form, "knows 1"):
        store.newest()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda content: content.update(ranks=2), "`ranks`"),
        (lambda content: content["files"]["weights.safetensors"].update(offset=8), "`offset`"),
    ],
    ids=["manifest", "file"],
)
def test_a_checkpoint_whose_manifest_says_more_is_refused(
    tmp_path: Path, change: Callable[[Any], None], word: str
) -> None:
    store = first_checkpoint(tmp_path)
    path = tmp_path / "round-00000005"
    edited(path / "manifest.json", change)
    with refused(CheckpointError, path, word):
        store.newest()


@pytest.mark.parametrize(
    ("path", "known"),
    [((), "run"), (("settings",), "clip_norm"), (("settings", "budget"), "epsilon"), (("plan",), "sampler"),
     (("options",), "method"), (("options", "balance"), "mode")],
)  # fmt: skip
def test_a_private_session_that_says_more_is_refused(tmp_path: Path, path: tuple[str, ...], known: str) -> None:
    model = torch.nn.Linear(2, 2)
    session = dp.make_private(
        model, torch.optim.SGD(model.parameters(), 0.1), [{"x": torch.ones(2)}] * 50, default_data_collator,
        lambda model, batch: model(batch["x"]).square().sum(1), dp.Budget(8.0, 1e-3), lot_size=10, rounds=2,
        ledger=tmp_path / "ledger", self_check=False,
    )  # fmt: skip
    session.save(tmp_path / "saved")
    session.close()
    saved = tmp_path / "saved"
    assert checkpoint.read(saved).facts["round"] == 0

    def more(content: Any) -> None:
        block = content["state"]["session"]
        for name in path:
            block = block[name]
        assert known in block
        block["share"] = 2

    edited(saved / "manifest.json", more)
    with refused(CheckpointError, saved, "`share`"):
        checkpoint.read(saved)


def test_a_run_that_says_more_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"run": "r", "coterie": "0.1", "data": "d", "ranks": 2}))
    with refused(CheckpointError, tmp_path / "run.json", "`ranks`"):
        read_run(tmp_path)


def test_a_party_does_not_pass_over_a_checkpoint_of_a_later_version(tmp_path: Path) -> None:
    """It would go on from an older one, or begin anew, and say nothing."""
    marker = {"kind": "federation", "run": "r", "party": "alder", "agreement": AGREEMENT, "data": ""}
    (tmp_path / "run.json").write_text(json.dumps(marker))
    first_checkpoint(tmp_path / "private" / "checkpoints", "r/alder")
    store = PartyStore(tmp_path, "alder", AGREEMENT)
    (held,) = store.held()
    assert held.round == 5
    path = tmp_path / "private" / "checkpoints" / "round-00000005" / "manifest.json"
    edited(path, lambda content: content.update(format=2))
    with refused(CheckpointError, path.parent):
        store.held()
    with refused(CheckpointError, path.parent):
        store.load(Saved(5, ""), ("weights",))
    edited(path, lambda content: content.update(format=1))
    assert [saved.round for saved in store.held()] == [5], "the refusal is no verdict on the checkpoint"


@pytest.mark.parametrize("kind", ["pool", "", 1, ["federation"]])
def test_a_run_folder_of_an_unknown_kind_is_refused(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"kind": kind, "run": "r"}))
    with refused(CheckpointError, tmp_path / "run.json", "kind", "knows federation"):
        PartyStore(tmp_path, "alder", AGREEMENT)


def first_session(folder: Path) -> Path:
    folder.mkdir()
    (folder / "session.json").write_bytes((FIRST / "session.json").read_bytes())
    header = b'{"weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}   '
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 2.0))
    tensor_file(folder / "optimizer.safetensors", None)
    tensor_file(folder / "state.safetensors", None, load=[3.0])
    return folder / "session.json"


def test_a_private_session_of_the_first_version_is_loaded(tmp_path: Path) -> None:
    first_session(tmp_path / "session")
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saved = checkpoint.read(tmp_path / "session")
    saved.load(model, optimizer, Ownership(Alone(), Holdings(model), dict(model.named_parameters())))
    assert model.weight.item() == 2.0
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert saved.facts == {"run": "run-a", "round": 4}
    assert saved.extra()["load"].tolist() == [3.0]


@pytest.mark.parametrize("form", OTHERS, ids=repr)
def test_a_private_session_of_another_format_is_refused(tmp_path: Path, form: Any) -> None:
    path = first_session(tmp_path / "session")
    edited(path, lambda content: content.update(format=form))
    with refused(CheckpointError, path.parent, "format", form):
        checkpoint.read(path.parent)


# -- journal -----------------------------------------------------------------------------------------------------


def first_journal(folder: Path) -> Path:
    path = folder / "coordinator.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript((FIRST / "journal.sql").read_text())
    db.close()
    return path


def run_sql(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()


def test_a_journal_of_the_first_version_goes_on(tmp_path: Path) -> None:
    first_journal(tmp_path)
    journal = Journal(tmp_path, "grove", AGREEMENT)
    assert (journal.state.phase, journal.state.round, journal.state.seq) == (Phase.CHECKPOINT, 1, 3)
    assert journal.history.newest == 1
    assert journal.history.published[0].files["birch"] == Saved(1, "c" * 64)
    assert journal.history.next_attempt(1) == 2
    journal.close()


@pytest.mark.parametrize(
    "statement", ["UPDATE meta SET value = '2'", "UPDATE meta SET value = '1.0'", "DELETE FROM meta"]
)
def test_a_journal_of_another_format_is_refused_as_it_is(tmp_path: Path, statement: str) -> None:
    path = first_journal(tmp_path)
    run_sql(path, f"{statement} WHERE name = 'format'")
    run_sql(path, "DROP TABLE changes")
    before = path.read_bytes()
    with refused(CheckpointError, path, "format", "knows 1"):
        Journal(tmp_path, "grove", AGREEMENT)
    assert path.read_bytes() == before, "nothing was added to it"


@pytest.mark.parametrize(
    "statement",
    [
        """UPDATE state SET state = replace(state, '"checkpoint"', '"audit"')""",
        "DROP TABLE meta",
        "DELETE FROM meta WHERE name = 'federation'",
    ],
)
def test_a_journal_with_values_that_nobody_knows_is_one_sentence(tmp_path: Path, statement: str) -> None:
    path = first_journal(tmp_path)
    run_sql(path, statement)
    if statement.startswith("DROP"):
        run_sql(path, "CREATE TABLE meta (what TEXT, is_it TEXT)")
        run_sql(path, "INSERT INTO meta VALUES ('format', '1')")
    with pytest.raises(CheckpointError) as caught:
        Journal(tmp_path, "grove", AGREEMENT)
    assert caught.value.code == "checkpoint-journal"
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("statement", "word"),
    [
        ("INSERT INTO meta VALUES ('leader', 'alder')", "`leader`"),
        ("""UPDATE state SET state = replace(state, '"seq"', '"guide":"alder","seq"')""", "`guide`"),
        ("""UPDATE records SET record = replace(record, '"files"', '"kept":2,"files"')""", "`kept`"),
        ("UPDATE meta SET name = 'grove' WHERE name = 'federation'", "`grove`"),
        ("CREATE TABLE votes (round INTEGER PRIMARY KEY)", "`votes`"),
        ("CREATE VIEW latest AS SELECT max(round) FROM commits", "`latest`"),
        ("CREATE TRIGGER once AFTER INSERT ON commits BEGIN DELETE FROM changes; END", "`once`"),
        ("ALTER TABLE commits ADD COLUMN weight REAL", "`commits.weight`"),
    ],
)
def test_a_journal_that_says_more_is_refused_as_it_is(tmp_path: Path, statement: str, word: str) -> None:
    path = first_journal(tmp_path)
    run_sql(path, statement)
    run_sql(path, "DROP TABLE changes")
    before = path.read_bytes()
    with refused(CheckpointError, path, word):
        Journal(tmp_path, "grove", AGREEMENT)
    assert path.read_bytes() == before, "nothing was added to it"


def test_tables_without_a_journal_are_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.sqlite"
    run_sql(path, "CREATE TABLE votes (round INTEGER PRIMARY KEY)")
    with refused(CheckpointError, path, "`votes`"):
        Journal(tmp_path, "grove", AGREEMENT)


def test_what_sqlite_itself_keeps_in_a_journal_is_no_news(tmp_path: Path) -> None:
    run_sql(first_journal(tmp_path), "ANALYZE")
    Journal(tmp_path, "grove", AGREEMENT).close()


# -- split models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["coterie-split-2", "coterie-split-10", "coterie-split-1 ", 1, None])
def test_a_split_of_another_format_is_refused(tmp_path: Path, form: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "coterie-split-1", "files": {}}))
    assert check_digests(tmp_path)["files"] == {}
    edited(tmp_path / "manifest.json", lambda content: content.update(format=form))
    with refused(ModelError, tmp_path / "manifest.json", form, "coterie-split-1"):
        check_digests(tmp_path)


FIRST_SPLIT = {
    "format": "coterie-split-1", "model_class": "MixtralForCausalLM", "model_type": "mixtral", "dtype": "float32",
    "layers": [{"name": "model.layers.0.mlp.experts", "experts": 2}],
    "placement": {"parties": ["alder"], "experts": [2], "hosted": {"alder": {"0": [0, 1]}}},
    "placement_hash": "e" * 64, "files": {"trunk.safetensors": {"bytes": 304, "sha256": "f" * 64}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda content: content.update(pruned=True), "`pruned`"),
        (lambda content: content["files"]["trunk.safetensors"].update(offset=8), "`offset`"),
        (lambda content: content["layers"][0].update(shared=1), "`shared`"),
        (lambda content: content["placement"].update(copies=2), "`copies`"),
    ],
    ids=["manifest", "file", "layer", "placement"],
)
def test_a_split_whose_manifest_says_more_is_refused(
    tmp_path: Path, change: Callable[[Any], None], word: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(FIRST_SPLIT))
    assert check_digests(tmp_path) == FIRST_SPLIT
    edited(path, change)
    with refused(ModelError, path, word):
        check_digests(tmp_path)


@pytest.mark.parametrize(
    "part", [{"files": []}, {"files": {"a": 1}}, {"layers": 1}, {"layers": [None]}, {"placement": 1}], ids=repr
)
def test_a_manifest_of_other_shapes_is_none(tmp_path: Path, part: dict[str, Any]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(FIRST_SPLIT | part))
    with pytest.raises(ModelError) as caught:
        check_digests(tmp_path)
    assert caught.value.code == "model-no-manifest"


def test_weights_of_the_first_version_say_where_they_come_from(tmp_path: Path) -> None:
    training = {"delta": 1e-05, "epsilon": 8.0, "ledger": "ledger-1", "privacy": "budget", "run": "run-a"}
    path = tensor_file(tmp_path / "trunk.safetensors", header_of(trainings=[training]), a=[1.0, -2.0])
    origin = check_content(path)
    assert (origin.run, origin.round, origin.lora) == (RUN, 5, None)
    assert origin.trainings == (Training("run-a", "budget", "ledger-1", 8.0, 1e-5),)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"format": 2}, "format"),
        ({"pruned": True}, "pruned"),
        ({"trainings": [{"run": "r", "privacy": "pooled"}]}, "privacy `pooled`"),
        ({"trainings": [{"run": "r", "privacy": "budget", "colluding": 2}]}, "colluding"),
    ],
)
def test_weights_whose_header_says_more_are_refused(tmp_path: Path, more: dict[str, Any], word: str) -> None:
    path = tensor_file(tmp_path / "trunk.safetensors", header_of(**more), a=[1.0, -2.0])
    with refused(ModelError, path, word):
        origin_of(path)


def test_what_is_written_now_is_what_the_first_version_wrote(tmp_path: Path) -> None:
    save_tensors(tmp_path / "now.safetensors", {"a": TWO}, RUN, 5)
    tensor_file(tmp_path / "first.safetensors", header_of(), a=[1.0, -2.0])
    assert origin_of(tmp_path / "now.safetensors") == origin_of(tmp_path / "first.safetensors")
    assert Origin(RUN, 5, "x").metadata().keys() == header_of().keys()


def test_a_model_of_the_first_version_says_what_is_behind_it(tmp_path: Path) -> None:
    (tmp_path / "coterie.json").write_bytes((FIRST / "coterie.json").read_bytes())
    assert read_trainings(tmp_path) == (Training("run-a", "budget", "ledger-1", 8.0, 1e-5),)


@pytest.mark.parametrize("form", OTHERS, ids=repr)
def test_a_model_whose_history_is_of_another_format_is_refused(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "coterie.json"
    path.write_bytes((FIRST / "coterie.json").read_bytes())
    edited(path, lambda content: content.update(format=form))
    with refused(ModelError, path, "format", form):
        read_trainings(tmp_path)


@pytest.mark.parametrize("where", ["coterie.json", "config.json"])
@pytest.mark.parametrize("change", [{"privacy": "pooled"}, {"privacy": None}, {"colluding": 2}])
def test_a_training_that_nobody_knows_is_refused(tmp_path: Path, where: str, change: dict[str, Any]) -> None:
    training = json.loads((FIRST / "coterie.json").read_text())["trainings"][0] | change
    content = {"format": 1, "trainings": [training], "coterie_trainings": [training]}
    (tmp_path / where).write_text(json.dumps(content))
    with refused(ModelError, tmp_path / where, next(iter(change))):
        read_trainings(tmp_path)
