"""A small private run for audits of epsilon, and the faults that the benchmark plants into the engine as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from coterie.audit.epsilon import premises
from coterie.audit.epsilon.findings import ClaimVerdict
from coterie.audit.epsilon.subject import Subject

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import audit_epsilon

        yield audit_epsilon


@pytest.fixture(scope="module")
def subject(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.of_settings(bench.small(tmp_path_factory.mktemp("settings")))


def alarms(measured: premises.MeasuredPremises) -> set[str]:
    return {each.name for each in measured.premises if each.verdict is ClaimVerdict.ALARM}
