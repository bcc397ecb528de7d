"""The fault suite: a part runs with every change, all of it with `make faults`, which writes the page."""

from __future__ import annotations

import pytest
from record import RECORD


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RECORD.rows and "or not faults" in session.config.getoption("markexpr"):
        RECORD.keep()
