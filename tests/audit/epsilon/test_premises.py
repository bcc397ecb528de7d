"""The premises of epsilon, with faults planted into the engine as it runs, and without."""

from __future__ import annotations

from types import ModuleType

import pytest

from coterie.audit.epsilon import premises
from coterie.audit.epsilon.subject import Subject
from helpers.epsilon_world import alarms
from helpers.epsilon_world import bench as bench
from helpers.epsilon_world import subject as subject


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
    with bench.FAULTS[fault]():
        measured = premises.measure(subject, seed=seed)
    assert seen_by in alarms(measured)
    assert measured.epsilon(subject) > 1.5 * subject.claim.epsilon
