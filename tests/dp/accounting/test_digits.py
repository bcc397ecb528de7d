"""An epsilon is printed with digits that say something, wherever it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import coterie
from coterie.cli.privacy_lines import spent_note
from coterie.dp.accounting.budget import Spent
from coterie.dp.accounting.digits import epsilon_digits


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(3.0, "3.000"), (0.1, "0.100"), (0.01234, "0.0123"), (0.00023456, "0.000235"), (1e-7, "1e-07"), (0.0, "0")],
)
def test_small_ones_keep_three_digits(epsilon: float, words: str) -> None:
    assert epsilon_digits(epsilon) == words
    assert str(Spent(epsilon, 1e-5)) == f"epsilon {words} at delta 1e-05"
    assert spent_note({"epsilon": epsilon}) == f"epsilon {words}"


def test_no_epsilon_is_printed_with_a_fixed_number_of_decimals() -> None:
    fixed = re.compile(r"""(epsilon|spent|lifetime)['"\])]*:\.\d+f""")
    found = {}
    for path in Path(coterie.__file__).parent.rglob("*.py"):
        lines = [each for each in path.read_text("utf-8").splitlines() if fixed.search(each)]
        if lines and path.name != "digits.py":
            found[path.name] = lines
    assert not found
