"""`coterie train` with a privacy block: within the budget, resumable, and honest at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from coterie import __version__
from coterie.cli.app import main
from coterie.config import TrainConfig, dump_yaml
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.session import PrivateSession
from coterie.errors import CheckpointError, ConfigError, CoterieError, DataError, ProvenanceError, RoundError
from coterie.federation.rounds.run_folder import RunFolder
from coterie.models.split.pushing import check_may_be_pushed
from coterie.models.split.trainings import read_trainings
from coterie.revision import revision
from coterie.training.data.tokenizer import get_tokenizer
from coterie.training.loop import StopFlag
from coterie.training.metrics import read_metrics
from coterie.training.optim import make_optimizer
from coterie.training.planning.forecast import Forecast
from coterie.training.single.prepared import prepare
from coterie.training.single.previewed import preview
from coterie.training.single.result import export_run
from coterie.training.single.run import resume, start
from coterie.training.single.trained import evaluate_run, load_trained

NOTES = ["a cough and a fever", "a swollen knee", "no pain in the chest", "the cough is gone", "the fever too"]
ALL = [f"{note} {i}" for i, note in enumerate(NOTES * 6)]
SIZES = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    rows = [{"text": text, "patient": f"p{i % 6}"} for i, text in enumerate(ALL)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in NOTES))
    (tmp_path / "public.txt").write_text("the a and is in on has no\n")

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        privacy = {
            "epsilon": 8.0, "delta": 1e-3, "lot_size": 10, "physical_batch": 4, "ledger": tmp_path / "ledger",
        }  # fmt: skip
        train = {"rounds": 4, "eval_every": 2, "checkpoint_every": 2}
        values = {
            "model": {"family": "olmoe", "config": SIZES},
            "data": {
                "train": [tmp_path / "train.jsonl"], "test": [tmp_path / "test.jsonl"], "sequence_length": 16,
                "packing": "records", "tokenizer": {"train": {"files": [tmp_path / "public.txt"], "vocab_size": 265}},
            },
            "optim": {"lr": 5e-3, "warmup_rounds": 2},
            "train": train | changes.pop("train", {}),
            "privacy": privacy | changes.pop("privacy", {}),
            "run_dir": tmp_path / name,
        }  # fmt: skip
        return TrainConfig.model_validate(values | changes)

    return make


def test_private_run_stays_in_budget_and_says_what_it_promises(make_config: MakeConfig, tmp_path: Path) -> None:
    seen = []
    result = start(make_config(), watch=lambda done, step, evaluation: seen.append((done, step.spent)))
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    assert result.finished
    assert 0 < result.privacy["epsilon"] <= 8
    assert result.privacy["delta"] == 1e-3
    for part in ("one record", "adding or removing one record", "lifetime", "poisson", "not covered"):
        assert part in result.statement
    assert "provenance was not declared" not in result.statement
    assert "  a document " not in result.statement, "each is one record"
    assert (tmp_path / "run/public/statement.txt").read_text().strip() == result.statement
    assert json.loads((tmp_path / "run/private/result.json").read_text())["privacy"]["noise_multiplier"] > 0
    names = set().union(*read_metrics(tmp_path / "run" / "private"))
    owners = {"loss_not_private", "drawn_not_private", "not_finite_not_private"}
    assert names == {"round", "epsilon", "delta", "noise_multiplier", "test_loss", *owners}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/public/model")
    assert model.config.num_experts == 4
    assert evaluate_run(load_trained(tmp_path / "run")).loss == pytest.approx(result.loss, rel=1e-4)


def test_every_record_of_a_run_says_which_commit_made_it_and_not_where(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.revision.describe", lambda root: "c0ffee012345")
    revision.cache_clear()
    start(make_config())
    revision.cache_clear()
    made_by = {"coterie": __version__, "revision": "c0ffee012345"}
    run = tmp_path / "run"
    (ledger,) = tmp_path.rglob("ledger.jsonl")
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    records = [entry["data"] for entry in entries if entry["kind"] == "run"]
    for path in ("run.json", "private/result.json", "public/model/coterie.json"):
        records.append(json.loads((run / path).read_text()))
    assert len(records) == 4
    for record in records:
        assert made_by.items() <= record.items()
    for public in (run / "public").rglob("*.json"):
        assert str(tmp_path) not in public.read_text()


@pytest.mark.slow
def test_before_anything_is_spent_a_run_says_what_it_will_cost(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"packing": "chunks", "sequence_length": 8})}
    )

    class Enough(Exception):
        pass

    told: list[Forecast] = []

    def announce(figures: Forecast) -> None:
        told.append(figures)
        raise Enough

    with pytest.raises(Enough):
        start(config, announce=announce)
    assert not (tmp_path / "ledger").exists()
    assert not (tmp_path / "run" / "run.json").exists()
    (figures,) = told
    assert preview(config).privacy == figures
    ids = [len(get_tokenizer(config.data.tokenizer, config.model, config.data)(text).input_ids) + 1 for text in ALL]
    pieces = [-(-length // 8) for length in ids]
    assert figures.pieces == max(pieces)
    assert figures.units == sum(count - (length % 8 == 1) for count, length in zip(pieces, ids, strict=True))
    assert (figures.rounds, figures.lot_size, figures.rate) == (4, 10, 10 / figures.units)
    accountant = PLDAccountant()
    event = dp_accounting.PoissonSampledDpEvent(figures.rate, dp_accounting.GaussianDpEvent(figures.noise_multiplier))
    accountant.compose(event, 4)
    assert figures.epsilon == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-3)
    assert figures.epsilon < figures.document_epsilon
    assert any(f"its epsilon is {figures.document_epsilon:.3g}" in line for line in figures.lines())


def test_a_vocabulary_made_from_the_private_text_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """It is published with the model, word by word."""
    config = make_config()
    made = {"files": list(config.data.train), "vocab_size": 265}
    tokenizer = config.data.tokenizer.model_validate({"train": made})
    private = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer})})
    for entry in (preview, start):
        with pytest.raises(DataError, match=r"is a file of `data\.train`") as refused:
            entry(private)
        assert (refused.value.code, refused.value.where) == ("data-not-public", "data.tokenizer.train.files")
    assert not (tmp_path / "run/public").exists()
    assert preview(private.model_copy(update={"privacy": None})).privacy is None


@pytest.mark.parametrize(("bands", "rounds"), [(2, 4), (5, 4)])
def test_in_bands_the_rate_is_of_the_block_whose_turn_it_is(make_config: MakeConfig, bands: int, rounds: int) -> None:
    config = make_config(
        train={"rounds": rounds}, privacy={"lot_size": 5, "noise_bands": bands}, optim={"kind": "sgd"}
    )
    told = preview(config).privacy
    assert told is not None
    assert told.rate == pytest.approx(5 * bands / told.units)
    assert any(f"of one block in {bands}, which take turns" in line for line in told.lines())
    assert not any("every record is in most rounds" in remark for remark in told.remarks)
    unused = [remark for remark in told.remarks if "the rest of the text is never used" in remark]
    assert len(unused) == (bands > rounds)


def test_a_hopeless_budget_gets_a_remark(make_config: MakeConfig) -> None:
    """Epsilon 0.01 on 30 records is possible and useless; epsilon 8 on the same is said nothing bad of."""

    def told(epsilon: float) -> Forecast:
        config = make_config(privacy={"epsilon": epsilon})
        told = preview(config).privacy
        assert told is not None
        return told

    poor = told(0.01)
    assert poor.noise_multiplier > poor.lot_size
    assert any("nothing can be learnt" in remark for remark in poor.remarks)
    assert not any("learn" in remark for remark in told(8.0).remarks)


@pytest.mark.slow
def test_a_statement_on_pieces_says_what_longer_documents_are_promised(make_config: MakeConfig) -> None:
    config = make_config(train={"rounds": 1})
    data = config.data.model_copy(update={"packing": "chunks", "sequence_length": 8})
    result = start(config.model_copy(update={"data": data}))
    (line,) = [line for line in result.statement.splitlines() if line.startswith("  a document")]
    copies = dict(result.privacy["copies"])
    assert f"of up to 16 tokens epsilon {copies[2]:.3f}" in line
    assert result.statement.index("a document") < result.statement.index("this run")


def test_a_private_run_cannot_be_made_longer(make_config: MakeConfig) -> None:
    config = make_config()
    config.run_dir.mkdir()
    dump_yaml(config.run_dir / "config.yaml", config)
    (config.run_dir / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="more rounds would spend more") as refused:
        resume(config.run_dir, rounds=9)
    assert refused.value.code == "run-longer"
    assert "ledger adds up" in str(refused.value.fix)


def test_runs_on_the_same_text_add_up_however_it_is_cut(make_config: MakeConfig) -> None:
    first = start(make_config("one"))
    config = make_config("two")
    data = config.data.model_copy(update={"sequence_length": 8})
    cut = start(config.model_copy(update={"data": data}))
    assert cut.privacy["ledger"] == first.privacy["ledger"]
    assert cut.privacy["lifetime"]["epsilon"] > 1.3 * cut.privacy["epsilon"]
    assert "counted          2 runs for the same unit" in cut.statement


@pytest.mark.parametrize(("stop_after", "dtype"), [(1, "float32"), (3, "float32"), (3, "bfloat16")])
def test_stopped_seeded_run_continues_as_if_it_had_not_stopped(
    make_config: MakeConfig, tmp_path: Path, stop_after: int, dtype: str
) -> None:
    model = {"family": "olmoe", "config": SIZES, "dtype": dtype}
    seeded = {"seeded": True}
    start(make_config("whole", model=model, privacy=seeded | {"ledger": tmp_path / "a"}))
    stop = StopFlag()
    parts = make_config("parts", model=model, privacy=seeded | {"ledger": tmp_path / "b"})
    half = start(parts, stop=stop, watch=lambda done, *_: stop.set() if done == stop_after else None)
    assert (half.rounds, half.finished) == (stop_after, False)
    result = resume(tmp_path / "parts")
    assert result.finished
    assert "NOT PRIVATE" in result.statement
    whole, again = (load_file(tmp_path / name / "private/model/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_private_run_that_was_killed_goes_on_without_spending_twice(make_config: MakeConfig, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, *_: Any) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        start(make_config(), watch=kill)
    result = resume(tmp_path / "run")
    assert (result.rounds, result.privacy["rounds"]) == (4, 4)


def test_private_run_that_was_killed_after_its_last_round_ends_with_that_rounds_weights(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    def fail(done: int, *_: Any) -> None:
        if done == 4:
            raise MemoryError

    with pytest.raises(MemoryError):
        start(make_config(), watch=fail)
    result = resume(tmp_path / "run")
    assert (result.finished, result.privacy["rounds"]) == (True, 4)
    trained = load_trained(tmp_path / "run")
    assert trained.rounds == 4
    assert evaluate_run(trained).loss == pytest.approx(result.loss, rel=1e-4)


def test_checkpoint_of_a_private_run_holds_its_weights_once_and_a_session_resumes_from_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    stop = StopFlag()
    config = make_config(privacy={"seeded": True})
    start(config, stop=stop, watch=lambda done, *_: stop.set() if done == 3 else None)
    private = tmp_path / "run/private"
    assert not (private / "session").exists()
    newest = private / "checkpoints/round-00000003"
    names = {"manifest.json", "weights.safetensors", "optimizer.safetensors", "session.safetensors"}
    assert {path.name for path in newest.iterdir()} == names
    assert {path.name for path in newest.parent.iterdir()} == {"round-00000002", "round-00000003"}
    weights = load_file(newest / "weights.safetensors")
    steps = {name for name in load_file(newest / "optimizer.safetensors") if name.endswith("/step")}
    assert steps == {f"{name}/step" for name in weights}
    prepared, documents = prepare(config, kept=private)
    optimizer = make_optimizer(prepared.model.parameters(), config.optim)
    session = PrivateSession.resume(
        newest, prepared.model, optimizer, prepared.train, prepared.train.collate, ledger=config.privacy.ledger,
        digest=dataset_digest(documents.texts),
    )  # fmt: skip
    with session:
        assert session.round == 3
    assert all(torch.equal(weights[name], value) for name, value in prepared.model.named_parameters())


def as_the_first_version_wrote_it(config: TrainConfig) -> None:
    """Model, optimizer by number and facts in ``private/session``, the weights alone once more in the checkpoint."""
    private = config.run_dir / "private"
    newest = sorted((private / "checkpoints").iterdir())[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    state = manifest.pop("state")
    model = prepare(config, kept=private)[0].model
    names = [name for name, _ in model.named_parameters()]
    numbered = {
        f"state.{names.index(name.rpartition('/')[0])}.{name.rpartition('/')[2]}": value
        for name, value in load_file(newest / "optimizer.safetensors").items()
    }
    session = private / "session"
    session.mkdir()
    shutil.copy(newest / "weights.safetensors", session / "model.safetensors")
    save_file(numbered, session / "optimizer.safetensors")
    (newest / "session.safetensors").rename(session / "state.safetensors")
    (newest / "optimizer.safetensors").unlink()
    (session / "session.json").write_text(json.dumps({"facts": state["session"], "optimizer": state["optimizer"]}))
    files = {"weights.safetensors": manifest["files"]["weights.safetensors"]}
    (newest / "manifest.json").write_text(json.dumps(manifest | {"files": files, "state": {}}))


def test_run_folder_of_the_first_version_goes_on_and_is_then_like_any_other(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    seeded = {"seeded": True}
    start(make_config("whole", privacy=seeded | {"ledger": tmp_path / "a"}))
    stop = StopFlag()
    config = make_config("parts", privacy=seeded | {"ledger": tmp_path / "b"})
    start(config, stop=stop, watch=lambda done, *_: stop.set() if done == 3 else None)
    as_the_first_version_wrote_it(config)
    assert load_trained(config.run_dir).rounds == 3
    assert resume(config.run_dir).finished
    assert not (config.run_dir / "private/session").exists()
    whole, again = (load_file(tmp_path / name / "private/model/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_run_that_has_done_no_round_has_nothing_to_measure(make_config: MakeConfig) -> None:
    stop = StopFlag()
    stop.set()
    assert start(make_config(), stop=stop).rounds == 0
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_trained(make_config().run_dir)


def test_users_are_units_when_the_column_says_so(make_config: MakeConfig) -> None:
    changes = {"unit": "user", "user_column": "patient", "records_per_user": 3, "lot_size": 2}
    result = start(make_config(privacy=changes))
    assert "one user; neighbouring datasets differ by adding or removing one user" in result.statement
    assert result.privacy["units"] == 6


@pytest.mark.parametrize("mode", ["per_sequence", "private_load"])
def test_balance_modes_run_inside_the_budget(make_config: MakeConfig, mode: str) -> None:
    config = make_config(privacy={"balance": mode})
    assert start(config).privacy["epsilon"] <= 8
    told = set().union(*read_metrics(config.run_dir / "private"))
    assert ({"load_most", "load_least"} <= told) is (mode == "private_load"), "only what was released is told"


def test_bad_private_runs_are_refused_before_anything_is_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("clash")
    model = config.model.model_copy(update={"provenance": "private"})
    with pytest.raises(ProvenanceError, match="made from private records"):
        start(config.model_copy(update={"model": model}))
    with pytest.raises(CoterieError, match="a lot of 31 is larger than the data"):
        start(make_config("clash", privacy={"lot_size": 31}))
    with pytest.raises(DataError, match="has no column `doctor`"):
        start(make_config("clash", privacy={"unit": "user", "user_column": "doctor"}))
    assert not (tmp_path / "clash").exists()
    start(make_config("taken"))
    with pytest.raises(ConfigError, match="already holds a run"):
        start(make_config("taken"))
    settings = tmp_path / "taken/config.yaml"
    settings.write_text(settings.read_text().replace("rounds: 4", "rounds: 9"))
    with pytest.raises(CheckpointError, match="changed since the run was started"):
        resume(tmp_path / "taken")


def test_command_prints_epsilon_and_statement_and_writes_json(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump_yaml(tmp_path / "train.yaml", make_config())
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "train.yaml"), "--json", str(tmp_path / "figures.json")])
    assert not ended.value.code
    shown = capsys.readouterr()
    assert "epsilon" in shown.err
    assert "PRIVACY STATEMENT" in shown.out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["privacy"]["epsilon"] <= 8


def texts_in(folder: Path) -> str:
    return "\n".join(path.read_bytes().decode("latin-1") for path in sorted(folder.rglob("*")) if path.is_file())


def test_what_is_public_holds_no_private_figure_and_no_path_and_the_rest_is_closed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        result = start(make_config())
    finally:
        os.umask(before)
    public, private = tmp_path / "run/public", tmp_path / "run/private"
    assert {path.name for path in public.iterdir()} == {"model", "README.md", "statement.txt"}
    shown = texts_in(public)
    assert str(tmp_path) not in shown
    assert "not_private" not in shown
    ledger = result.privacy["ledger"]
    assert ledger in shown
    (folder,) = [path.name for path in (tmp_path / "ledger").iterdir() if (path / "ledger.jsonl").exists()]
    assert folder not in shown, "the digest of the text would let others test guesses of it"
    assert str(result.loss) not in shown
    assert str(result.loss) in (private / "result.json").read_text()
    export_run(tmp_path / "run", tmp_path / "out", adapter=False)
    check_may_be_pushed(tmp_path / "out")
    for model in (public / "model", tmp_path / "out"):
        assert json.loads((model / "privacy.json").read_text())["promise"] == "budget"
        assert f"| budget | {ledger} | 8.0 | 0.001 |" in (model / "README.md").read_text()
    assert {path.stat().st_mode & 0o077 for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]} == {0}


def test_a_seeded_run_has_nothing_to_give_away(make_config: MakeConfig, tmp_path: Path) -> None:
    start(make_config(privacy={"seeded": True}))
    assert not (tmp_path / "run/public").exists()
    assert "NOT PRIVATE" in (tmp_path / "run/private/statement.txt").read_text()


@pytest.mark.parametrize("seeded", [False, True])
def test_a_start_that_was_trained_on_private_text_is_refused_whatever_is_declared(
    make_config: MakeConfig, tmp_path: Path, seeded: bool
) -> None:
    if seeded:
        start(make_config("before", privacy={"seeded": True}))
    else:
        start(make_config("before").model_copy(update={"privacy": None}))
    upcycled = tmp_path / "copied"
    shutil.copytree(tmp_path / ("before/private/model" if seeded else "before/model"), upcycled)
    words = "noise from a seed" if seeded else "without privacy"
    for declared in ("public", "dp:abc"):
        model = {"path": upcycled, "provenance": declared}
        with pytest.raises(ProvenanceError, match=f"declared .*, but run .* trained them on private text.*{words}"):
            start(make_config("after", model=model))
    assert not (tmp_path / "after").exists()
    model = {"path": upcycled, "provenance": "public", "overrule_origin": "the text was ours and is published now"}
    result = start(make_config("after", model=model))
    assert "what was saved with them was overruled: the text was ours and is published now" in result.statement
    assert not (tmp_path / "after/public").exists()
    assert [t.privacy for t in read_trainings(tmp_path / "after/private/model")] == [
        "seeded" if seeded else "none", "budget",
    ]  # fmt: skip


def test_a_start_under_a_budget_is_counted_as_one_and_public_text_starts_anything(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    first = start(make_config("first"))
    model = {"path": tmp_path / "first/public/model", "provenance": "public"}
    second = start(make_config("second", model=model))
    assert f"what the starting weights cost: counted in ledger {first.privacy['ledger']}" in second.statement
    runs = [training.run for training in read_trainings(tmp_path / "second/public/model")]
    assert runs == [first.privacy["run"], second.privacy["run"]]
    config = make_config("open").model_copy(update={"privacy": None})
    start(config.model_copy(update={"data": config.data.model_copy(update={"provenance": "public"})}))
    model = {"path": tmp_path / "open/model", "provenance": "public"}
    assert start(make_config("third", model=model)).finished


def test_two_private_runs_never_spend_in_one_folder(make_config: MakeConfig) -> None:
    config = make_config()
    with RunFolder(config.run_dir):
        for begin in (lambda: start(config), lambda: resume(config.run_dir)):
            with pytest.raises(RoundError, match="another process is running"):
                begin()
    assert not list((config.run_dir.parent / "ledger").glob("*/*"))
