"""`devices` in train.yaml: ranks that the command starts itself, or that torchrun started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coterie.cli.app import main
from coterie.cli.ranks import joined, start_if_asked, started_again
from coterie.config import PreconditionerSpec, TrainConfig, dump_yaml
from coterie.errors import ConfigError, PrivacyError
from coterie.training.single.preconditioned import PublicRecords
from coterie.training.single.run import start
from coterie.training.single.trained import load_trained
from helpers.comparing import relative

NOTES = ["a cough and a fever", "a swollen knee", "no pain in the chest", "the cough is gone", "the fever too"]
SIZES = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip


def settings(folder: Path, name: str = "run", **changes: Any) -> TrainConfig:
    rows = [{"text": f"{note} {i}"} for i, note in enumerate(NOTES * 6)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "public.txt").write_text("the a and is in on has no\n")
    values: dict[str, Any] = {
        "model": {"family": "olmoe", "config": SIZES, "provenance": "public"},
        "data": {
            "train": [folder / "train.jsonl"], "sequence_length": 16, "packing": "records",
            "tokenizer": {"train": {"files": [folder / "public.txt"], "vocab_size": 265}},
        },
        "train": {"rounds": 3, "checkpoint_every": 2, "eval_every": 0},
        "privacy": {
            "epsilon": 8.0, "delta": 1e-3, "lot_size": 10, "physical_batch": 4, "seeded": True,
            "ledger": folder / f"ledger-{name}",
        },
        "run_dir": folder / name,
        "device": "cpu",
    }  # fmt: skip
    return TrainConfig.model_validate(values | changes)


def test_several_devices_are_for_private_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`devices` above 1 is for private training"):
        settings(tmp_path, devices=2, privacy=None)


def test_another_number_of_processes_than_the_settings_say_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="`devices` is 2, and 3 processes were started") as caught:
        joined(settings(tmp_path, devices=2))
    assert caught.value.code == "ranks-count"


@pytest.mark.parametrize(
    ("gpus", "changes", "ranks"),
    [
        (4, {"device": "auto"}, 4),
        (7, {"device": "cuda", "experts_over": 3}, 6),
        (1, {"device": "auto", "experts_over": 2}, 2),
        (0, {"device": "auto"}, 1),
        (4, {"device": "cpu"}, 1),
        (4, {"device": "auto", "privacy": None}, 1),
    ],
)
def test_auto_is_a_rank_for_each_gpu_in_whole_groups(
    gpus: int, changes: dict[str, Any], ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    own = settings(tmp_path, devices="auto", **changes)
    asked: list[int] = []
    monkeypatch.setattr("coterie.cli.ranks._run", lambda count, words: asked.append(count) or 0)
    with nullcontext() if ranks == 1 else pytest.raises(typer.Exit):
        start_if_asked(own, "train", tmp_path / "train.yaml", None)
    assert (own.ranks, asked) == (ranks, [] if ranks == 1 else [ranks])


def test_a_process_of_another_launcher_starts_no_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr("coterie.cli.ranks._run", lambda count, words: pytest.fail("ranks were started"))
    with pytest.raises(PrivacyError, match="this process is one of 2") as caught:
        start_if_asked(settings(tmp_path, devices=2), "train", tmp_path / "train.yaml", None)
    assert caught.value.code == "ranks-missing"


@pytest.mark.parametrize(
    ("words", "ways"), [(["train", "--dry-run"], {"experts_over": 5}), (["plan"], {"layers_over": 8})]
)
def test_what_is_asked_before_a_run_refuses_more_ranks_than_experts(
    words: list[str], ways: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump_yaml(tmp_path / "train.yaml", settings(tmp_path, **ways))
    command, *options = words
    with pytest.raises(SystemExit) as ended:
        main([command, str(tmp_path / "train.yaml"), *options])
    assert ended.value.code
    said = capsys.readouterr().err
    assert f"4 experts, and there are {max(ways.values())} ranks" in said
    assert "spread them over at most 4 ranks" in said


def test_auto_takes_as_many_as_a_launcher_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("coterie.ranks.processes.join_ranks", nullcontext)
    joined(settings(tmp_path, devices="auto"))
    with pytest.raises(ConfigError, match="`experts_over` is 3, and 2 processes"):
        joined(settings(tmp_path, devices="auto", experts_over=3))


def test_other_words_for_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="devices"):
        settings(tmp_path, devices="all")


@pytest.mark.parametrize(("started", "fits"), [(2, True), (4, True), (3, False)])
def test_experts_over_takes_any_number_of_groups_that_a_launcher_started(
    started: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(started))
    monkeypatch.setattr("coterie.ranks.processes.join_ranks", nullcontext)
    with nullcontext() if fits else pytest.raises(ConfigError, match="`experts_over` is 2, and 3 processes"):
        joined(settings(tmp_path, experts_over=2))


@pytest.mark.parametrize("way", ["experts_over", "layers_over"])
def test_devices_are_a_multiple_of_the_ranks_of_a_group(way: str, tmp_path: Path) -> None:
    assert settings(tmp_path, devices=4, **{way: 2}).ranks == 4
    with pytest.raises(ValueError, match=f"give `devices` a multiple of `{way}`"):
        settings(tmp_path, devices=3, **{way: 2})


def test_tokens_travel_or_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`experts_over` and `layers_over` are two ways"):
        settings(tmp_path, experts_over=2, layers_over=2)
    with pytest.raises(ValueError, match="`layers_over` above 1 is for private training"):
        settings(tmp_path, layers_over=2, privacy=None)


def test_a_run_is_gone_on_with_only_where_the_launcher_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "run.json").write_text("{}")
    assert not started_again(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert started_again(config)


def preconditioned(config: TrainConfig, folder: Path) -> TrainConfig:
    """The same in coordinates that three public records give."""
    place = folder / "factors.safetensors"
    if not place.exists():
        PublicRecords.of(config, [folder / "public.txt"], 3).preconditioner(0.25, 0.1, lambda: None).save(place)
    assert config.privacy is not None
    spec = PreconditionerSpec(path=place, provenance="public")
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"preconditioner": spec})})


@pytest.mark.slow
@pytest.mark.parametrize("coordinates", ["own", "from public text"])
def test_two_devices_train_what_one_does_and_the_number_is_no_part_of_a_run(coordinates: str, tmp_path: Path) -> None:
    alone, both = settings(tmp_path, "alone"), settings(tmp_path, "both", devices=2)
    if coordinates != "own":
        alone, both = preconditioned(alone, tmp_path), preconditioned(both, tmp_path)
    dump_yaml(tmp_path / "both.yaml", both)
    ended = subprocess.run(
        [sys.executable, "-m", "coterie", "train", "both.yaml", "--json", "both.json"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("PRIVACY STATEMENT") == 1
    result = start(alone)
    assert json.loads((tmp_path / "both.json").read_text())["privacy"]["epsilon"] == result.privacy["epsilon"]
    expected, found = (
        load_file(tmp_path / name / "private/checkpoints/round-00000003/weights.safetensors")
        for name in ("alone", "both")
    )
    assert max(relative(found[name], value) for name, value in expected.items()) <= 1e-6
    lines = [len(list(tmp_path.glob(f"ledger-{name}/*/ledger.jsonl"))) for name in ("alone", "both")]
    assert lines == [1, 1]


TORCHRUN = (
    "torch.distributed.run", "--nproc-per-node", "4", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    "-m",
)  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "ways"),
    [
        pytest.param(TORCHRUN, {"experts_over": 2}, marks=pytest.mark.slow, id="experts, torchrun"),
        pytest.param((), {"layers_over": 2, "devices": 4}, marks=pytest.mark.ranks, id="layers"),
    ],
)
def test_two_groups_of_two_ranks_train_evaluate_and_export_what_one_process_does(
    launcher: tuple[str, ...], ways: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "test.txt").write_text("the cough and the knee\n" * 9)
    data = settings(tmp_path).data.model_copy(update={"test": (tmp_path / "test.txt",)})
    alone = settings(tmp_path, "alone", data=data)
    dump_yaml(tmp_path / "both.yaml", settings(tmp_path, "both", data=data, **ways))
    ended = subprocess.run(
        [sys.executable, "-m", *launcher, "coterie", "train", "both.yaml", "--json", "both.json"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("PRIVACY STATEMENT") == 1
    assert len(list(tmp_path.glob("ledger-both/*/ledger.jsonl"))) == 1
    result = start(alone)
    found = json.loads((tmp_path / "both.json").read_text())
    assert found["privacy"]["epsilon"] == result.privacy["epsilon"]
    assert found["loss"] == pytest.approx(result.loss, rel=1e-6)
    expected, written = (load_trained(tmp_path / name).model.state_dict() for name in ("alone", "both"))
    assert max(relative(written[name], value) for name, value in expected.items()) <= 1e-6
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "both/private/model").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in written.items())
