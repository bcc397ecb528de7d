"""docs/concepts/invariants.md and the tests named after its numbers know each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "concepts" / "invariants.md").read_text("utf-8")
STATED = {int(number): text for number, text in re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", PAGE, re.M | re.S)}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def cited(path: Path) -> set[int]:
    """The numbers in the names of a file's tests."""
    return {int(number) for number in re.findall(r"^ *def test_invariant_(\d+)_", path.read_text("utf-8"), re.M)}


def test_every_number_that_a_test_cites_is_stated_and_every_invariant_has_a_test() -> None:
    assert list(STATED) == list(range(1, len(STATED) + 1))
    assert set().union(*map(cited, TESTS)) == set(STATED)


@pytest.mark.parametrize("number", STATED)
def test_an_invariant_says_why_and_names_the_files_that_test_it(number: int) -> None:
    text = STATED[number]
    assert "- **Why.** " in text
    assert "- **Code.** " in text
    listed = set(re.findall(r"`(tests/[\w/]+\.py)`", text))
    assert listed == {str(path.relative_to(ROOT)) for path in TESTS if number in cited(path)}
