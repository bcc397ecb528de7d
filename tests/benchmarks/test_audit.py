"""The benchmark of attacks goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("audit_benchmark", BENCHMARKS / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


def test_a_part_that_was_measured_is_not_measured_again(benchmark: ModuleType, tmp_path: Path) -> None:
    path, calls = tmp_path / "audit.json", []

    def part(name: str) -> object:
        def measure() -> str:
            calls.append(name)
            if name == "c":
                raise KeyboardInterrupt
            return name.upper()

        return measure

    wanted = {name: part(name) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        benchmark.measure(wanted, path, {"places": 5})
    with pytest.raises(KeyboardInterrupt):
        benchmark.measure(wanted, path, {"places": 5})
    assert calls == ["a", "b", "c", "c"]
    assert {name: one["outcome"] for name, one in json.loads(path.read_text("utf-8"))["parts"].items()} == {
        "a": "A",
        "b": "B",
    }
    with pytest.raises(SystemExit, match="another file"):
        benchmark.measure(wanted, path, {"places": 6})


def test_every_lot_and_attacker_is_measured_and_epsilon_as_often_as_asked(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "experts_dp" / "alder").mkdir(parents=True)
    names = list(benchmark.parts(tmp_path, 1000, 3, 0))
    assert {f"experts/{who}/lot {lot}" for who in ("T2", "T4") for lot in (1, 4, 16)} < set(names)
    assert {"experts_dp/T2/places", "experts_dp/T4/membership", "epsilon/0", "epsilon/2"} < set(names)
    assert "epsilon/3" not in names
