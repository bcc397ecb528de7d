"""`coterie train`, Ctrl-C, `resume`, `eval` and `generate` as a person runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coterie.cli.app import main

SETTINGS = """\
model:
  family: olmoe
  config: {hidden_size: 32, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, num_experts: 4, num_experts_per_tok: 2, max_position_embeddings: 64}
data:
  train: text.txt
  test: text.txt
  split_text: line
  sequence_length: 16
  tokenizer: {train: {files: [text.txt], vocab_size: 280}}
train: {rounds: ROUNDS, batch_size: 4, micro_batch: 2, eval_every: 0, checkpoint_every: 0}
run_dir: run
"""


def coterie(*arguments: str | Path) -> None:
    """Run a command in this process: it saves importing torch again."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code


def write_settings(folder: Path, name: str, rounds: int) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(SETTINGS.replace("ROUNDS", str(rounds)).replace("run_dir: run", f"run_dir: {name}"))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"line {n} speaks of the cat and the mat\n" for n in range(40)))
    return tmp_path


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_resume_ends_where_an_uninterrupted_run_ends(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "coterie.cli.app", "train", str(write_settings(folder, "parts", 60))],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round "):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == 5, err
    assert "stopped after round" in out
    assert f"coterie resume {folder / 'parts'}" in out
    coterie("resume", folder / "parts")
    coterie("train", write_settings(folder, "whole", 60))
    assert capsys.readouterr().out.count("held-out loss") == 2
    name = "private/checkpoints/round-00000060/weights.safetensors"
    whole, parts = (load_file(folder / run / name) for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_dry_run_and_a_plan_say_the_same_and_write_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(folder, "run", 5)
    coterie("train", settings, "--dry-run", "--json", folder / "figures.json")
    said = capsys.readouterr().out
    coterie("plan", settings, "--json", folder / "plan.json")
    planned = capsys.readouterr().out.splitlines()
    here = [line for line in planned if line.startswith(("on this machine: ", "(measured on synthetic records"))]
    assert len(here) == 2
    compared = next(at for at, line in enumerate(planned) if line.startswith("full training or adapters"))
    assert [line for line in [*planned[:compared], planned[-1]] if line not in here] == said.splitlines()
    both = [line.split()[0] for line in planned[compared + 2 : -2]]
    assert both == ["all", "adapters,"], "a line of the table each"
    assert planned[-2].startswith("so adapters suit a model that is trained already")
    figures = json.loads((folder / "plan.json").read_text())
    measured = figures["calibration"]
    assert measured["round_seconds"] > 0
    assert 0 < figures["lora"]["state_bytes"] < figures["state_bytes"]
    assert f"{measured['round_seconds']:.3g} s a round" in here[0]
    assert "nothing was trained or spent" in said
    assert json.loads((folder / "figures.json").read_text())["rounds"] == 5
    assert not (folder / "run").exists()


def test_train_eval_and_generate_work_one_after_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = write_settings(folder, "run", 5)
    coterie("train", settings, "--json", folder / "r.json")
    shown = capsys.readouterr()
    assert "round 5/5" in shown.err
    assert "held-out loss" in shown.out
    figures = json.loads((folder / "r.json").read_text())
    assert figures["finished"] is True
    coterie("eval", folder / "run", "--json", folder / "e.json")
    assert "perplexity" in capsys.readouterr().out
    assert json.loads((folder / "e.json").read_text())["loss"] == figures["loss"]
    coterie("generate", folder / "run", "--prompt", "line 3", "--tokens", "5")
    assert capsys.readouterr().out.startswith("line 3")
    with pytest.raises(SystemExit) as ended:
        main(["train", str(settings)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("Error run-dir-taken")
