"""Test files stand alone: what several need is in tests/helpers, once."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
STEMS = {path.stem for path in TESTS.rglob("test_*.py")}


def imported(path: Path) -> Iterator[str]:
    """Every part of every module's name that a file imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")


def test_no_two_files_have_one_name() -> None:
    """Where folders are no packages pytest takes them for the same module, and collects one of them."""
    found = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(found) == len(set(found))


def test_no_file_imports_a_test_file_or_by_the_path_of_tests() -> None:
    unwanted = STEMS | {"tests"}
    wrong = {path.name: found for path in TESTS.rglob("*.py") if (found := unwanted & set(imported(path)))}
    assert not wrong


def test_a_helper_is_defined_once() -> None:
    """A test file may not have its own version of what the helpers have for all; fixtures of helpers included."""
    defined = defaultdict(set)
    for path in TESTS.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined[node.name].add(path.relative_to(TESTS))
    shared = {"assert_same", "until", "relative", "World"}
    assert not {name: files for name, files in defined.items() if name in shared and len(files) > 1}
