"""The fault suite: a part runs with every change, all of it with `make faults`, which writes the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import ForkedProcesses, Starter
from record import RECORD


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RECORD.rows and "or not faults" in session.config.getoption("markexpr"):
        RECORD.keep()


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    made = Starter()
    yield made
    made.close()


@pytest.fixture
def processes(starter: Starter, tmp_path: Path) -> Iterator[ForkedProcesses]:
    made = ForkedProcesses(starter, tmp_path / "grove")
    yield made
    made.end()
