"""Several processes that nobody joined are refused, wherever a private or federated run starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn

from coterie import dp
from coterie.cli.app import main
from coterie.errors import PrivacyError
from coterie.federation.rounds.run_folder import RunFolder
from coterie.ranks.world import check_alone

COUNTS = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]
SETTINGS = """\
model: {family: olmoe, config: {hidden_size: 16, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 2, num_experts: 4, num_experts_per_tok: 2, max_position_embeddings: 32}}
data:
  {train: text.txt, split_text: line, sequence_length: 8, tokenizer: {train: {files: [text.txt], vocab_size: 270}}}
train: {rounds: 2, batch_size: 4}
run_dir: run
"""


@pytest.mark.parametrize("name", COUNTS)
def test_a_launchers_count_above_one_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(PrivacyError, match="one of 2") as caught:
        check_alone()
    assert (caught.value.code, caught.value.where) == ("ranks-missing", name)


@pytest.mark.parametrize("value", ["", "1", " 1 "])
def test_one_process_may_run_under_a_launcher(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for name in COUNTS:
        monkeypatch.setenv(name, value)
    check_alone()


def test_a_count_that_is_no_number_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(PrivacyError, match="one of many"):
        check_alone()


def test_processes_that_torch_joined_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(PrivacyError, match="one of 3"):
        check_alone()


def test_make_private_is_refused_before_its_ledger_knows_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PrivacyError) as caught:
        dp.make_private(
            model, optimizer, [{"x": torch.ones(3)}] * 4, loss_fn=lambda m, b: m(b["x"]).sum(1) ** 2,
            budget=dp.Budget(8.0, 1e-3), lot_size=2, ledger=tmp_path / "ledger",
        )  # fmt: skip
    assert caught.value.code == "ranks-missing"
    assert not (tmp_path / "ledger").exists()


def test_a_run_folder_is_not_taken_whoever_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`train`, `resume`, `up` and `coordinator` hold theirs before anything else."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PrivacyError, match="one of 2"):
        RunFolder(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_coterie_train_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.yaml").write_text(SETTINGS)
    (tmp_path / "text.txt").write_text("the cat sat\n" * 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        main(["train", "train.yaml"])
    assert ended.value.code == 1
    assert "Error ranks-missing: this process is one of 2" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_starts_no_second_run(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(SETTINGS)
    (tmp_path / "text.txt").write_text("the cat sat\n" * 20)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "-m", "coterie.cli.app", "train", "train.yaml",
    ]  # fmt: skip
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode != 0
    assert "Error ranks-missing" in ended.stderr
    assert not (tmp_path / "run").exists()
