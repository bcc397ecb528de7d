"""A run that trained all weights is exported as other results are, and pushed by the same rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coterie.cli.app import main
from coterie.config import TrainConfig
from coterie.models.split import pushing
from coterie.training.loop import StopFlag
from coterie.training.single.run import resume, start
from coterie.training.single.trained import load_trained

IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])


class Hub:
    """Notes the folders that are given to it."""

    def __init__(self) -> None:
        self.given: list[Path] = []

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert private

    def upload_folder(self, *, folder_path: Path, **_: str) -> str:
        self.given.append(folder_path)
        return "there"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(pushing, "HfApi", lambda: found)
    return found


def settings(folder: Path, provenance: str = "private", **changes: object) -> TrainConfig:
    """A run of one round on a few notes."""
    (folder / "train.jsonl").write_text('{"text": "a cough and a fever"}\n{"text": "a swollen knee"}\n' * 6)
    (folder / "public.txt").write_text("the a and is in on has no\n")
    sizes = {
        "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    tokenizer = {"train": {"files": [folder / "public.txt"], "vocab_size": 270}}
    values = {
        "model": {"family": "olmoe", "config": sizes},
        "data": {"train": [folder / "train.jsonl"], "sequence_length": 16, "packing": "records",
                 "tokenizer": tokenizer, "provenance": provenance},
        "train": {"rounds": 1, "batch_size": 3},
        "run_dir": folder / "run",
    }  # fmt: skip
    return TrainConfig.model_validate(values | changes)


def coterie(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("provenance", ["public", "private"])
def test_a_run_of_all_weights_is_exported_with_a_card_and_pushed_where_its_text_is_public(
    provenance: str, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run within a budget: see test_private.py."""
    config, promise = settings(tmp_path, provenance), "public" if provenance == "public" else "none"
    start(config)
    out = tmp_path / "out"
    ended = coterie("export", config.run_dir, "--out", out, "--push", "grove/notes")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    ours, theirs = load_trained(config.run_dir), AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, ours.model(IDS).logits)
    assert len(AutoTokenizer.from_pretrained(out)) == len(ours.tokenizer)
    for folder in (out, config.run_dir / "model"):
        said = json.loads((folder / "privacy.json").read_text())
        assert [said["promise"], *(each["privacy"] for each in said["trainings"])] == [promise, promise]
        assert said["words"] in (folder / "README.md").read_text()
    assert "3 safetensors files" in (out / "README.md").read_text()
    assert (ended, hub.given) == ((0, [out]) if promise == "public" else (1, []))
    assert ("hub-unprotected" in capsys.readouterr().err) is (promise == "none")


def test_what_started_from_private_weights_is_not_pushed_though_its_own_text_is_public(
    tmp_path: Path, hub: Hub
) -> None:
    """Nothing beside the weights says so, but the settings do."""
    base = settings(tmp_path, train={"rounds": 1, "batch_size": 3}, run_dir=tmp_path / "base")
    start(base)
    weights = tmp_path / "weights"
    shutil.copytree(base.run_dir / "model", weights)
    (weights / "coterie.json").unlink()
    config = json.loads((weights / "config.json").read_text())
    del config["coterie_trainings"]
    (weights / "config.json").write_text(json.dumps(config))
    start(settings(tmp_path, "public", model={"path": weights, "provenance": "private"}))
    assert coterie("export", tmp_path / "run", "--out", tmp_path / "out", "--push", "grove/notes") == 1
    assert json.loads((tmp_path / "out" / "privacy.json").read_text())["promise"] == "none"
    assert hub.given == []


def test_words_that_were_taken_from_private_text_are_not_pushed(tmp_path: Path, hub: Hub) -> None:
    """A tokenizer's vocabulary lies in the export; here it is declared as made from private text."""
    config = settings(tmp_path, "public")
    tokenizer = config.data.tokenizer.model_copy(update={"provenance": "private"})
    start(config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": tokenizer})}))
    assert coterie("export", tmp_path / "run", "--out", tmp_path / "out", "--push", "grove/notes") == 1
    assert json.loads((tmp_path / "out" / "privacy.json").read_text())["promise"] == "none"
    assert hub.given == []


def test_an_unfinished_run_has_no_model_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, train={"rounds": 2, "batch_size": 3})
    stop = StopFlag()
    watch: Callable[..., None] = lambda *_: stop.set()  # noqa: E731
    start(config, stop=stop, watch=watch)
    assert coterie("export", config.run_dir, "--out", tmp_path / "out") == 1
    assert "has no model yet" in capsys.readouterr().err
    assert coterie("export", config.run_dir, "--out", tmp_path / "out", "--adapter") == 1
    assert "trained all weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_model_of_a_shorter_run_is_not_exported_for_the_longer_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`generate` reads the newest checkpoint: an export of the earlier model would be another one."""
    config, stop = settings(tmp_path), StopFlag()
    start(config)
    watch: Callable[..., None] = lambda *_: stop.set()  # noqa: E731
    assert not resume(config.run_dir, stop=stop, watch=watch, rounds=3).finished
    assert coterie("export", config.run_dir, "--out", tmp_path / "out") == 1
    assert "was made 3 rounds long and is at 2" in " ".join(capsys.readouterr().err.split())
    assert resume(config.run_dir).finished
    assert coterie("export", config.run_dir, "--out", tmp_path / "out") == 0
