"""`coterie plan` of one party: six shapes, planned from models of few layers, against the run itself.

A test does not look at the clock. What a round's time is planned from, work that grows with layers and records, is
compared here as products counted; seconds in `benchmarks/planning.py`.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from helpers.counted_products import CountedProducts

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def planning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import planning

    return planning


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_planned_memory_is_within_a_tenth_and_planned_work_within_a_quarter_of_a_round(
    planning: ModuleType, tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    config = planning.settings(planning.CASES[number], tmp_path, hidden=16, layers=5, length=20)
    with CountedProducts() as work:
        found = planning.outcome(config, work.clock)
    assert found.memory_ratio == pytest.approx(1, abs=0.1), planning.CASES[number].name
    assert found.planned_seconds > 1e5, "products of a round"
    assert found.time_ratio == pytest.approx(1, abs=0.25), planning.CASES[number].name
    assert "profiler" not in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_there_are_six_shapes(planning: ModuleType) -> None:
    assert len({case.name for case in planning.CASES}) == 6
