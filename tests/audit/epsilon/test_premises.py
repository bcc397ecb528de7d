"""The premises of epsilon, with faults planted into the engine as it runs, and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from coterie.audit.epsilon import premises
from coterie.audit.epsilon.findings import Verdict
from coterie.audit.epsilon.subject import Subject

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import audit_epsilon

        yield audit_epsilon


@pytest.fixture(scope="module")
def subject(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.of_settings(bench.small(tmp_path_factory.mktemp("settings")))


@contextmanager
def planted(bench: ModuleType, fault: str) -> Iterator[None]:
    with bench.FAULTS[fault]():
        yield


def alarms(measured: premises.Measured) -> set[str]:
    return {each.name for each in measured.premises if each.verdict is Verdict.ALARM}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_premises_of_an_honest_run_are_quiet(subject: Subject, seed: int) -> None:
    measured = premises.measure(subject, seed=seed)
    assert not alarms(measured)
    assert measured.contribution == pytest.approx(1.0, abs=1e-3)
    assert 0.9 * subject.claim.epsilon < measured.epsilon(subject) <= subject.claim.epsilon


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("fault", "seen_by"),
    [
        ("noise off", "noise"),
        ("noise halved", "noise"),
        ("clipping off", "contribution: two alternating ids"),
        ("tokens clipped singly", "contribution: two alternating ids"),
    ],
)
def test_premises_see_a_planted_fault(
    bench: ModuleType, subject: Subject, fault: str, seen_by: str, seed: int
) -> None:
    with planted(bench, fault):
        measured = premises.measure(subject, seed=seed)
    assert seen_by in alarms(measured)
    assert measured.epsilon(subject) > 1.5 * subject.claim.epsilon
