"""The page of a run's training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from coterie.audit.report.training_page import TrainingRecord, training_page
from coterie.cli.app import main
from coterie.errors import CheckpointError

WIRE = {"birch": {"sent": 2_020_000, "received": 3_000_000, "tensors_sent": 2_000_000, "tensors_received": 2_900_000}}


def run_folder(tmp_path: Path, rounds: int = 3, *, private: bool = True, finished: bool = True) -> Path:
    """A party's run folder with what the page reads of it."""
    folder = tmp_path / "run"
    (folder / "private").mkdir(parents=True)
    rows: list[dict[str, float]] = []
    for at in range(rounds):
        own = {"loss_not_private": 4.5 - at / 10, "drawn_not_private": 250 + at, "epsilon": 4.0 + at}
        plain = {"loss": 4.5 - at / 10, "tokens": 960.0 + at}
        rows.append({"round": at + 1, **(own if private else plain), "seconds": 2.0, "noise_seconds": 0.5})
    rows.append({"round": rounds, "test_loss": 4.234})
    (folder / "private" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    spent = {"epsilon": 3.0 + rounds, "delta": 1e-5, "noise_multiplier": 0.7125, "revealed_to": ["birch", "cedar"]}
    result = {
        "finished": True,
        "model_state_bytes": 13_300_000,
        "peak_rss_bytes": 907_800_000,
        "privacy": spent if private else None,
        "statement": "PRIVACY STATEMENT\n  this run <5>" if private else "",
        "wire": WIRE,
    }
    if finished:
        (folder / "private" / "result.json").write_text(json.dumps(result), "utf-8")
    marker = {"kind": "federation", "party": "alder", "run": "ac742cef", "agreement": "4d" * 32}
    marker |= {"coterie": "0.1.0", "revision": "0123456789ab"}
    (folder / "run.json").write_text(json.dumps(marker), "utf-8")
    return folder


def page_of(folder: Path) -> str:
    return training_page(TrainingRecord.read(folder)).replace("\xa0", " ")


def test_a_private_run_shows_budget_losses_and_where_they_may_go(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path))
    assert "3 rounds, finished; epsilon 6.000 spent at delta 1e-05." in page
    assert "training 4.300, held-out 4.234" in page
    assert page.index("For the owner alone") < page.index("Loss, private to the owner")
    for piece in (
        "0.1.0, commit 0123456789ab",
        "Budget over the rounds",
        "records in the lot",
        "13.3 MB",
        "907.8 MB",
        "2.0 MB",
        "PRIVACY STATEMENT",
    ):
        assert piece in page
    assert "1.010 bytes for each byte of tensors sent" in page  # 2.02 of 2
    assert re.search(r"noise</td><td[^>]*>0.500</td><td[^>]*>25.0 %", page)
    assert "&lt;5&gt;" in page
    assert "<script" not in page


def test_a_run_without_a_budget_says_that_nothing_bounds_it(tmp_path: Path) -> None:
    page = page_of(run_folder(tmp_path, private=False))
    assert "no privacy budget: nothing bounds what the result reveals" in page
    assert "Budget over the rounds" not in page
    assert "tokens in a round" in page


def test_loads_that_a_budget_released_are_shown_and_no_others(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    assert "Expert load" not in page_of(folder)
    assert TrainingRecord.read(folder).as_json()["expert_load"] == {}
    path = folder / "private" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    loads = [{"load_most": 1.8, "load_least": -0.1}, {"load_most": 1.4, "load_least": 0.3}]
    for row, load in zip(rows, loads, strict=False):
        row |= load
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    page = page_of(folder)
    assert "Expert load, released within the budget" in page
    assert "the most used expert 1.40, the least used expert 0.30" in page
    figures = TrainingRecord.read(folder).as_json()
    assert figures["expert_load"] == {"load_most": [(1.0, 1.8), (2.0, 1.4)], "load_least": [(1.0, -0.1), (2.0, 0.3)]}


def test_a_run_that_goes_on_has_a_page_too(tmp_path: Path) -> None:
    assert "2 rounds, not finished" in page_of(run_folder(tmp_path, 2, finished=False))


def test_the_figures_keep_what_is_private_apart(tmp_path: Path) -> None:
    figures = TrainingRecord.read(run_folder(tmp_path)).as_json()
    assert figures["not_private"]["loss_not_private"] == [(1.0, 4.5), (2.0, 4.4), (3.0, 4.3)]
    assert figures["not_private"]["test_loss"] == [(3.0, 4.234)]
    assert figures["epsilon"] == [(1.0, 4.0), (2.0, 5.0), (3.0, 6.0)]
    assert figures["wire"] == WIRE


def test_a_folder_without_a_run_and_a_run_without_a_round_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        TrainingRecord.read(tmp_path)
    assert error.value.code == "run-dir-none"
    (tmp_path / "run.json").write_text('{"run": "a"}', "utf-8")
    with pytest.raises(CheckpointError) as error:
        TrainingRecord.read(tmp_path)
    assert error.value.code == "run-no-round"


def test_the_command_writes_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), "--json", str(tmp_path / "report.json")])
    assert end.value.code == 0
    assert "epsilon 6.000 spent" in (folder / "private" / "report.html").read_text("utf-8")
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["rounds"] == 3
    assert "report.html" in capsys.readouterr().out
