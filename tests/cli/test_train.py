"""`coterie train`, Ctrl-C, `resume`, `eval` and `generate` as a person runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def coterie(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "coterie.cli.app", *map(str, arguments)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"line {n} speaks of the cat and the mat\n" for n in range(40)))
    return tmp_path


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_resume_ends_where_an_uninterrupted_run_ends(folder: Path) -> None:
    for name, run_dir in (("whole", "whole"), ("parts", "parts")):
        (folder / f"{name}.yaml").write_text(
            SETTINGS.replace("ROUNDS", "60").replace("run_dir: run", f"run_dir: {run_dir}")
        )
    subprocess.run(coterie("train", folder / "whole.yaml"), check=True, capture_output=True)
    process = subprocess.Popen(
        coterie("train", folder / "parts.yaml"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round "):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped after round" in out
    assert f"coterie resume {folder / 'parts'}" in out
    subprocess.run(coterie("resume", folder / "parts"), check=True, capture_output=True)
    name = "checkpoints/round-00000060/weights.safetensors"
    whole, parts = (load_file(folder / run / name) for run in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.slow
def test_train_eval_and_generate_work_one_after_the_other(folder: Path) -> None:
    (folder / "train.yaml").write_text(SETTINGS.replace("ROUNDS", "5"))
    done = subprocess.run(
        coterie("train", folder / "train.yaml", "--json", folder / "r.json"),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "round 5/5" in done.stderr
    assert "held-out loss" in done.stdout
    figures = json.loads((folder / "r.json").read_text())
    assert figures["finished"] is True
    measured = subprocess.run(
        coterie("eval", folder / "run", "--json", folder / "e.json"), check=True, capture_output=True, text=True
    )
    assert "perplexity" in measured.stdout
    assert json.loads((folder / "e.json").read_text())["loss"] == figures["loss"]
    text = subprocess.run(
        coterie("generate", folder / "run", "--prompt", "line 3", "--tokens", "5"),
        check=True,
        capture_output=True,
        text=True,
    )
    assert text.stdout.startswith("line 3")
    again = subprocess.run(coterie("train", folder / "train.yaml"), capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith("Error run-dir-taken")
