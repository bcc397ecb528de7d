"""Processes of a federation, for the tests that start some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.federation_processes import Processes


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path / "grove")
    yield made
    made.end()
