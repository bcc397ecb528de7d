"""Docstrings are the reference: what they name as an argument is one, line by line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import coterie

PACKAGE = Path(coterie.__file__).parent
ARGS = re.compile(r"^Args:\n((?:    .*\n?|\n)+)", re.MULTILINE)
Documented = ast.ClassDef | ast.FunctionDef


def wrong_arguments(tree: ast.AST) -> Iterator[str]:
    """Lines of Args sections that do not begin with names of parameters (of a class: also its fields)."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (section := ARGS.search(ast.get_docstring(node) or "")):
            known = parameters(node)
            for line in re.findall(r"^    (?!    )(.*)$", section[1], re.MULTILINE):
                names, colon, _ = line.partition(":")
                if line and not (colon and set(names.split(", ")) <= known):
                    yield f"{node.name}, line {node.lineno}: {line}"


def parameters(node: Documented) -> set[str]:
    if isinstance(node, ast.ClassDef):
        fields = {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
        starts = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        return fields.union(*map(parameters, starts))
    given = node.args
    rest = [extra for extra in (given.vararg, given.kwarg) if extra is not None]
    return {argument.arg for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs, *rest]}


def test_documented_arguments_exist() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    wrong = {str(path): list(wrong_arguments(ast.parse(path.read_text("utf-8")))) for path in files}
    assert not {path: lines for path, lines in wrong.items() if lines}


def test_the_check_sees_a_renamed_argument_and_a_torn_line() -> None:
    code = '''
def f(x_RD, scale=1, **kwargs):
    """Text.

    Args:
        x_RI: rows.
        x_RD, scale: and
        more of it.
            Fine: a longer line.
        kwargs: passed on.

    Returns:
        y: the result.
    """
'''
    assert [line.partition(": ")[2] for line in wrong_arguments(ast.parse(code))] == ["x_RI: rows.", "more of it."]
