"""A script around `PrivateTrainer` that a launcher starts several times trains what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coterie.hf.shared import begun_checkpoint
from helpers import trainer_tasks
from helpers.comparing import relative
from helpers.rank_processes import Ended, run_ranks, values


def launched(world: int, task: Any, *arguments: Any, attempt: int = 0) -> list[Ended]:
    return run_ranks(world, task, *arguments, attempt=attempt, join=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to."""
    return values(launched(1, trainer_tasks.train, tmp_path_factory.mktemp("alone")))[0]


def same_weights(alone: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["weights"] == second["weights"]
    for name, expected in alone["weights"].items():
        assert relative(torch.tensor(first["weights"][name]), torch.tensor(expected)) <= 1e-6


def entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What the only ledger in a folder holds."""
    (ledger,) = folder.glob("ledger/*/ledger.jsonl")
    lines = (json.loads(line) for line in ledger.read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_script_trains_what_one_process_trains(alone: dict[str, Any], tmp_path: Path) -> None:
    first, second = values(launched(2, trainer_tasks.train, tmp_path))
    same_weights(alone, first, second)
    for own in (first, second):
        assert not own["wrapped"]
        assert own["most"] == trainer_tasks.BATCH
        assert own["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert own["evaluated"] == pytest.approx(alone["evaluated"], rel=0.05)  # accelerate fills up the last batch
        assert own["statement"] == first["statement"]
        assert (own["spent"], own["epsilons"]) == (alone["spent"], alone["epsilons"])
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved["lm_head.weight"].tolist() == first["weights"]["lm_head.weight"]
    assert len(entries(tmp_path, "run")) == 1
    assert len(entries(tmp_path, "release")) == trainer_tasks.ROUNDS


def test_a_process_that_fails_ends_all_with_its_error_and_started_again_they_go_on(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    for each in launched(2, trainer_tasks.train, tmp_path, 1):
        assert each.error is not None
        assert "the callback of this rank" in each.error
    first, second = values(launched(2, trainer_tasks.train, tmp_path, attempt=1))
    same_weights(alone, first, second)
    assert len(entries(tmp_path, "run")) == 1
    assert len(entries(tmp_path, "release")) == trainer_tasks.ROUNDS


def test_only_whole_checkpoints_of_the_run_that_was_begun_are_gone_on_with(alone: dict[str, Any]) -> None:
    private = Path(alone["private"])
    newest, earlier = (str(private.parent / f"checkpoint-{step}") for step in (4, 2))
    assert begun_checkpoint(private) == newest
    Path(newest, "private_session").rename(private / "aside")  # as a kill leaves it that came before the last file
    assert begun_checkpoint(private) == earlier
    (private / "trainer.json").write_text(json.dumps({"run": "another"}))
    assert begun_checkpoint(private) is None
    (private / "trainer.json").unlink()
    assert begun_checkpoint(private) is None


def test_only_the_first_process_publishes(tmp_path: Path) -> None:
    first, second = values(launched(2, trainer_tasks.published, tmp_path))
    assert first == second
    assert "PRIVACY STATEMENT" in Path(first, "statement.txt").read_text()
    assert Path(first, "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (trainer_tasks.with_another_model, "ranks-differ: the ranks differ in"),
        (trainer_tasks.with_experts_apart, "hf-option: the model's experts are spread over ranks"),
    ],
)
def test_models_that_cannot_be_shared_are_refused_by_all(task: Any, words: str, tmp_path: Path) -> None:
    for each in launched(2, task, tmp_path):
        assert each.error is not None
        assert each.error.startswith(words)
    assert not (tmp_path / "ledger").exists()
