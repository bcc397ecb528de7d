"""A run folder holds everything; a stop does not change the result; bad input leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from coterie.audit.evidence import Evidence
from coterie.audit.report.training_page import TrainingRecord
from coterie.config import TrainConfig, load_yaml
from coterie.errors import CheckpointError, ConfigError, CoterieError, DataError, RoundError
from coterie.federation.rounds.run_folder import LOCK_FILE, RunFolder
from coterie.training.evaluate import Evaluation, evaluate, paired_bootstrap
from coterie.training.loop import StopFlag
from coterie.training.metrics import MetricsWriter, read_metrics
from coterie.training.party.process import settings_of_run
from coterie.training.purging import purge
from coterie.training.single.generate import generate
from coterie.training.single.prepared import prepare
from coterie.training.single.previewed import preview
from coterie.training.single.run import resume, start
from coterie.training.single.trained import evaluate_run, load_trained

NOTES = [
    "the patient has a cough and a light fever",
    "the knee is swollen after a fall on the ice",
    "no pain in the chest, the lungs are clear",
    "the cough is gone and the fever too",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
}
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """A config for a few notes; ``make_config("name", rounds=8, data={...})`` changes parts of it."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in NOTES * 3))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": note[::-1]}) + "\n" for note in NOTES))
    (tmp_path / "public.txt").write_text("the a and is in on has no\n")

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        data = {
            "train": [tmp_path / "train.jsonl"],
            "test": [tmp_path / "test.jsonl"],
            "sequence_length": 16,
            "tokenizer": {"train": {"files": [tmp_path / "public.txt"], "vocab_size": 270}},
        }
        train = {"rounds": 6, "batch_size": 7, "micro_batch": 3, "eval_every": 2, "checkpoint_every": 2}
        values = {
            "model": {"family": "olmoe", "config": SIZES},
            "data": data | changes.pop("data", {}),
            "optim": {"lr": 5e-3, "warmup_rounds": 2, "weight_decay": 0.1},
            "train": train | changes.pop("train", {}),
            "run_dir": tmp_path / name,
        }
        return TrainConfig.model_validate(values | changes)

    return make


def weights(run_dir: Path, rounds: int) -> dict[str, Tensor]:
    return load_file(run_dir / "private" / "checkpoints" / f"round-{rounds:08d}" / "weights.safetensors")


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_learns_and_leaves_its_folder_complete(make_config: MakeConfig) -> None:
    config = make_config(train={"rounds": 20, "eval_every": 10, "checkpoint_every": 8})
    seen: list[tuple[int, bool]] = []
    result = start(config, watch=lambda done, outcome, evaluation: seen.append((done, evaluation is not None)))
    assert result.finished
    assert seen == [(done, done in (10, 20)) for done in range(1, 21)]
    assert preview(config).state_bytes == pytest.approx(result.model_state_bytes, rel=1e-3)
    rows = read_metrics(config.run_dir / "private")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0] - 0.5
    assert [row["round"] for row in rows if "test_loss" in row] == [0, 10, 20]
    assert {path.name for path in config.run_dir.iterdir()} == {
        "config.yaml",
        "run.json",
        "private",
        "model",
        LOCK_FILE,
    }
    names = {path.name for path in (config.run_dir / "private").iterdir()}
    files = {"metrics.jsonl", "result.json", "evaluation.safetensors"}
    assert names == files | {"tensorboard", "tokenizer", "checkpoints"}
    kept = sorted(path.name for path in (config.run_dir / "private" / "checkpoints").iterdir())
    assert kept == ["round-00000020"], "once all rounds are done, the newest is enough"
    assert json.loads((config.run_dir / "private" / "result.json").read_text())["loss"] == result.loss
    assert load_yaml(config.run_dir / "config.yaml", TrainConfig) == config


def test_two_runs_with_the_same_settings_give_the_same_result(make_config: MakeConfig) -> None:
    results = [start(make_config(name)) for name in ("one", "two")]
    assert_equal(weights(Path(results[0].run_dir), 6), weights(Path(results[1].run_dir), 6))
    assert results[0].loss == results[1].loss
    other = start(make_config("other", train={"seed": 1}))
    assert other.loss != results[0].loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    make_config: MakeConfig, stop_after: int, dtype: str
) -> None:
    model = {"family": "olmoe", "config": SIZES, "dtype": dtype}
    whole, parts = make_config("whole", model=model), make_config("parts", model=model)
    expected = start(whole)
    stop = StopFlag()
    first = start(parts, stop=stop, watch=lambda done, *_: stop.set() if done == stop_after else None)
    assert (first.finished, first.rounds) == (False, stop_after)
    assert not (parts.run_dir / "model").exists()
    last = resume(parts.run_dir)
    assert last.finished
    assert last.loss == expected.loss
    assert_equal(weights(parts.run_dir, 6), weights(whole.run_dir, 6))
    assert [row["round"] for row in read_metrics(parts.run_dir / "private") if "loss" in row] == list(range(1, 7))


def test_a_run_that_died_between_checkpoints_repeats_the_lost_rounds(make_config: MakeConfig) -> None:
    whole, broken = make_config("whole"), make_config("broken")
    start(whole)

    def die(done: int, *_: object) -> None:
        if done == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        start(broken, watch=die)
    assert resume(broken.run_dir).finished
    assert_equal(weights(broken.run_dir, 6), weights(whole.run_dir, 6))
    assert [row["round"] for row in read_metrics(broken.run_dir / "private") if "loss" in row] == list(range(1, 7))


def test_resuming_a_finished_run_changes_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    first = start(config)
    before = weights(config.run_dir, 6)
    assert resume(config.run_dir).loss == first.loss
    assert_equal(weights(config.run_dir, 6), before)


def test_the_final_model_is_an_ordinary_hugging_face_checkpoint(make_config: MakeConfig) -> None:
    config = make_config()
    start(config)
    theirs = AutoModelForCausalLM.from_pretrained(config.run_dir / "model").eval()
    ours = load_trained(config.run_dir)
    ids = torch.tensor([ours.tokenizer("the patient")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_trained_run_is_measured_as_it_was_in_training(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    result = start(config)
    trained = load_trained(config.run_dir)
    measured = evaluate_run(trained)
    assert measured.loss == result.loss
    kept = Evaluation.load(config.run_dir / "private" / "evaluation.safetensors")
    assert paired_bootstrap(kept, measured).mean == 0.0
    other = evaluate_run(trained, [tmp_path / "train.jsonl"])
    assert other.loss < measured.loss, "it has seen this text"


def test_the_loss_before_the_first_round_is_the_starting_models(make_config: MakeConfig) -> None:
    config = make_config(train={"rounds": 2})
    stop = StopFlag()
    start(config, stop=stop, watch=lambda *_: stop.set())
    result = resume(config.run_dir)
    prepared = prepare(config)[0]
    assert prepared.test is not None
    assert result.loss_before == pytest.approx(evaluate(prepared.model, prepared.test, batch_size=3).loss)
    assert result.loss != result.loss_before


def test_a_run_is_made_longer_as_if_it_had_been_planned_so(make_config: MakeConfig) -> None:
    constant = {"lr": 1e-2, "schedule": "constant"}
    short, long = (
        make_config(name, optim=constant, train={"rounds": rounds}) for name, rounds in (("a", 2), ("b", 4))
    )
    first = start(short)
    result = resume(short.run_dir, rounds=4)
    assert (first.rounds, result.rounds, result.finished) == (2, 4, True)
    assert result.loss == start(long).loss != first.loss
    assert resume(short.run_dir).rounds == 4, "it stays so long"
    with pytest.raises(ConfigError, match="has 4 rounds already") as refused:
        resume(short.run_dir, rounds=3)
    assert refused.value.code == "run-longer"


def test_generation_repeats_with_the_seed(make_config: MakeConfig) -> None:
    config = make_config(train={"rounds": 3})
    start(config)
    trained = load_trained(config.run_dir)
    texts = [generate(trained.model, trained.tokenizer, "the", tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [generate(trained.model, trained.tokenizer, "the", tokens=5, temperature=0, seed=s) for s in (0, 1)]
    assert greedy[0] == greedy[1]
    assert isinstance(generate(trained.model, trained.tokenizer, "", tokens=3), str)


def test_generation_with_a_cache_gives_the_likeliest_tokens_piece_by_piece(make_config: MakeConfig) -> None:
    config = make_config(train={"rounds": 1})
    start(config)
    trained = load_trained(config.run_dir)
    ids = trained.tokenizer("the").input_ids
    given = len(ids)
    for _ in range(8):  # the whole text anew for every token, without a cache
        with torch.no_grad():
            ids.append(int(trained.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == trained.tokenizer.eos_token_id:
            del ids[-1]
            break
    pieces: list[str] = []
    text = generate(trained.model, trained.tokenizer, "the", tokens=8, temperature=0, show=pieces.append)
    assert text == trained.tokenizer.decode(ids[given:]) == "".join(pieces)
    assert len(pieces) > 2


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud83d"])
def test_a_prompt_that_is_not_utf8_is_one_sentence(prompt: str) -> None:
    with pytest.raises(DataError, match="not UTF-8"):
        generate(None, None, prompt, tokens=1)  # type: ignore[arg-type]


def test_a_folder_that_holds_a_run_is_not_used_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(run_dir=tmp_path / "a run")
    start(config)
    with pytest.raises(ConfigError, match="already holds a run") as caught:
        start(make_config(run_dir=config.run_dir, train={"rounds": 9}))
    assert caught.value.code == "run-dir-taken"
    assert f"`coterie resume '{config.run_dir}'`" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"data": {"train": ["/nowhere/a.jsonl"]}}, DataError, "no data file /nowhere/a.jsonl"),
        ({"data": {"text": "body"}}, DataError, "no column `body`; its columns are: text"),
        ({"data": {"sequence_length": 65}}, ConfigError, "is 65, but the model has 64 positions"),
        ({"model": {"family": "olmoe", "config": SIZES | {"vocab_size": 100}}}, ConfigError, "vocabulary only 100"),
        ({"model": {"family": "llama", "config": {"hidden_size": 32}}}, CoterieError, "llama"),
        ({"device": "cuda"}, ConfigError, "torch finds no GPU"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    make_config: MakeConfig, changes: dict[str, Any], kind: type[CoterieError], words: str
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = make_config(**changes)
    with pytest.raises(kind) as caught:
        start(config)
    assert words.lower() in caught.value.message.lower()
    assert not config.run_dir.exists()


def test_resuming_where_no_run_is_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        resume(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b"[" * 100_000, b"\xff"])
def test_a_marker_of_any_other_content_is_no_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    for look in (resume, load_trained, purge):
        with pytest.raises(CheckpointError) as caught:
            look(tmp_path)
        assert caught.value.code == "run-dir-none"


def test_commands_that_take_a_run_tell_a_folder_that_is_not_there_from_one_without_a_run(tmp_path: Path) -> None:
    for look in (
        resume,
        load_trained,
        purge,
        settings_of_run,
        TrainingRecord.read,
        lambda run: Evidence.read(run, []),
    ):
        for folder, words in (tmp_path, "holds no run"), (tmp_path / "none", "There is no folder"):
            with pytest.raises(CheckpointError, match=words) as caught:
                look(folder)
            assert caught.value.code == "run-dir-none"


def test_lines_of_figures_that_a_crash_left_are_dropped_and_written_anew(tmp_path: Path) -> None:
    lines = [b'{"round": 1, "loss": 1.0}', b'{"loss": 2.0}', b'{"round": 7}', b'{"round": 2, "lo\xff\n[5]\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with MetricsWriter(tmp_path, finished=3) as metrics:
        metrics.log(4, loss=0.5)
    assert read_metrics(tmp_path) == [{"round": 1, "loss": 1.0}, {"round": 4, "loss": 0.5}]


def test_changed_settings_or_text_are_noticed_on_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    stop = StopFlag()
    stop.set()
    start(config, stop=stop)
    settings = config.run_dir / "config.yaml"
    original = settings.read_text()
    settings.write_text(original.replace("rounds: 6", "rounds: 7"))
    with pytest.raises(CheckpointError, match=r"The settings of .* changed"):
        resume(config.run_dir)
    settings.write_text(original)
    (tmp_path / "train.jsonl").write_text('{"text": "something else"}\n')
    with pytest.raises(CheckpointError, match=r"The training text of .* changed"):
        resume(config.run_dir)


def test_a_damaged_checkpoint_stops_the_resume(make_config: MakeConfig) -> None:
    config = make_config()
    start(config)
    path = config.run_dir / "private" / "checkpoints" / "round-00000006" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        resume(config.run_dir)


@pytest.mark.data
def test_training_on_real_text_beats_a_unigram_model(
    make_config: MakeConfig, real_text_dir: Path, tmp_path: Path
) -> None:
    text = (real_text_dir / "tiny_shakespeare" / "input.txt").read_text(encoding="utf-8")
    (tmp_path / "a.txt").write_text(text[:120_000])
    (tmp_path / "b.txt").write_text(text[120_000:140_000])
    config = make_config(
        data={"train": [tmp_path / "a.txt"], "test": [tmp_path / "b.txt"], "sequence_length": 32},
        train={"rounds": 150, "batch_size": 16, "micro_batch": 16, "eval_every": 0, "checkpoint_every": 0},
    )
    result = start(config)
    trained = load_trained(config.run_dir)
    train_ids, test_ids = (
        torch.tensor(trained.tokenizer(part)["input_ids"]) for part in (text[:120_000], text[120_000:140_000])
    )
    counts = torch.bincount(train_ids, minlength=len(trained.tokenizer)).double() + 1
    unigram = -(counts / counts.sum()).log()[test_ids].mean().item()
    assert result.loss is not None
    assert result.loss < unigram - 0.3


def test_a_folder_in_use_is_neither_resumed_nor_started_in(make_config: MakeConfig) -> None:
    config = make_config()
    with RunFolder(config.run_dir):
        for begin in (lambda: resume(config.run_dir), lambda: start(config)):
            with pytest.raises(RoundError, match="another process is running"):
                begin()


def test_run_that_diverges_says_so_and_keeps_what_was_saved_before(make_config: MakeConfig) -> None:
    good = start(make_config("good", train={"rounds": 2, "checkpoint_every": 1}))
    assert good.finished
    config = make_config("bad", optim={"lr": 1e30, "warmup_rounds": 0, "weight_decay": 0.0})
    with pytest.raises(RoundError, match="training has diverged") as caught:
        start(config)
    assert caught.value.code == "run-diverged"
    assert not list(config.run_dir.rglob("weights.safetensors"))
    assert not list(config.run_dir.rglob("result.json"))
