"""`benchmarks/private_gain.py`: what its arms share, what they do not, and its summary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from coterie.training.data.packing import Sequences

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import private_gain

    threads = torch.get_num_threads()
    yield private_gain
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(gain: ModuleType) -> Any:
    return gain.Recipe("demo", 3, 6, 0.15, 2.5e-3, "linear", 0.9, 1.0, 8.0, 1e-5, 1, True)


def test_no_two_parties_of_an_arm_share_noise(gain: ModuleType, recipe: Any) -> None:
    assert len({gain.number_of(name, recipe) for name in (*recipe.names, "all")}) == recipe.parties + 1


def test_losses_alone_are_kept_for_one_recipe_and_seed(gain: ModuleType, recipe: Any, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"lr": 1e-3}, {"rounds": 7}, {"epsilon": 3.0}, {"preconditioned": False}]
    others = [replace(recipe, **change) for change in changes]
    names = {gain.kept_alone(tmp_path / "a.jsonl", each, seed) for each in (recipe, *others) for seed in (0, 1)}
    assert len(names) == 10


def test_everybodys_records_are_one_partys(gain: ModuleType) -> None:
    def records(first: int, *lengths: int) -> Sequences:
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return Sequences(torch.arange(first, first + int(starts[-1])), starts, torch.arange(len(lengths)), 0)

    some = [records(10, 2, 3), records(50, 4)]
    whole = gain.joined(some)
    assert [whole.tokens[whole.starts[i] : whole.starts[i + 1]].tolist() for i in range(3)] == [
        [10, 11],
        [12, 13, 14],
        [50, 51, 52, 53],
    ]
    assert whole.document_S.tolist() == [0, 1, 2]


def test_news_are_dealt_whole_and_once(gain: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "news"
    source.mkdir()
    lines = [f"text {i}\t{i % 4}" for i in range(60)]
    (source / "a.tsv").write_text("\n".join([*lines, "text 3\t1"]) + "\n", "utf-8")
    gain.write_news(tmp_path / "out", ("alder", "birch", "cedar"), source)
    files = {file: file.read_text("utf-8").splitlines() for file in (tmp_path / "out").rglob("*.jsonl")}
    dealt = [json.loads(row)["text"] for rows in files.values() for row in rows]
    assert sorted(dealt) == sorted(f"text {i}" for i in range(60))
    assert {len(rows) for file, rows in files.items() if file.name == "test.jsonl"} == {2}


def test_the_summary_says_what_sharing_closes_with_its_interval(
    gain: ModuleType, recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gains = {"isolated_dp": 0.04, "experts_dp": 0.05, "experts_dp_shared": 0.07, "centralised_dp": 0.08}
    shift = {0: 0.0, 1: 0.01, 2: -0.01}  # of the arm with shared noise: closes 2/3, 1 and 1/3
    rows = [
        {
            "recipe": asdict(recipe), "seed": seed, "arm": arm,
            "gain": dict.fromkeys(recipe.names, value + (moved if arm == "experts_dp_shared" else 0)),
            "better_than_alone": dict.fromkeys(recipe.names, seed != 2),
        }
        for seed, moved in shift.items()
        for arm, value in gains.items()
    ]  # fmt: skip
    file = tmp_path / "gain.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"recipe"', "utf-8")
    gain.summary(file)
    said = capsys.readouterr().out
    reach = 4.30 * (1 / 3) / 3**0.5  # Student's t at two degrees of freedom
    assert f"closes 0.667 ({2 / 3 - reach:.3f} to {2 / 3 + reach:.3f})" in said
    assert "every party better than alone beyond chance in 2 of 3 seeds" in said


def test_one_that_was_computed_before_the_parties_alone_is_not_counted_as_better(
    gain: ModuleType, recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gain.jsonl"
    better: dict[int, dict[str, bool]] = {0: {}, 1: dict.fromkeys(recipe.names, True)}
    for seed, by_name in better.items():
        row = {"recipe": asdict(recipe), "seed": seed, "arm": "experts_dp_shared", "gain": {"alder": 0.1}}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({**row, "better_than_alone": by_name}) + "\n")
    gain.summary(file)
    assert "every party better than alone beyond chance in 1 of 1 seeds" in capsys.readouterr().out
