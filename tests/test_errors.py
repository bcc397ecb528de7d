"""What an editor shows of an error is a sentence; the tree at the top of the file is the tree of the classes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from coterie import errors
from coterie.errors import CoterieError, as_argument

CLASSES = [found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, CoterieError)]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_says_what_it_is_for(error: type[CoterieError]) -> None:
    own = vars(error).get("__doc__") or ""
    assert own.splitlines()[0].endswith((".", "it."))
    assert len(own.split()) >= 4


def test_the_tree_shows_every_class_under_its_parent() -> None:
    above: list[str] = []
    shown = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.fullmatch(r"    (\W*)(\w+Error)", line):
            depth = len(match[1]) // 4
            above = [*above[:depth], match[2]]
            shown[match[2]] = above[depth - 1] if depth else "Exception"
    assert shown == {error.__name__: error.__bases__[0].__name__ for error in CLASSES}


def test_codes_of_the_classes_differ() -> None:
    assert len({error.code for error in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("name", ["run", "a run", "it's", "$HOME"])
def test_a_path_in_a_command_that_is_shown_can_be_pasted(name: str) -> None:
    assert shlex.split(f"coterie resume {as_argument(Path(name))}") == ["coterie", "resume", name]
