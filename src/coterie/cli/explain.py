"""`coterie explain`: the meaning of an error code, read from the places that raise it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import coterie
from coterie import errors
from coterie.cli.output import say
from coterie.errors import CoterieError


@dataclass(frozen=True)
class Raised:
    """One place in coterie that raises an error with a code; values filled in at run time are shown as `...`."""

    code: str
    message: str
    why: str | None
    fix: str | None


def raised_errors() -> list[Raised]:
    """Every error with a fixed code in the installed package, sorted by code and message."""
    folder = Path(coterie.__file__).parent
    found = {item for path in folder.rglob("*.py") for item in _raised_in(ast.parse(path.read_text("utf-8")))}
    return sorted(found, key=lambda item: (item.code, item.message))


def _raised_in(tree: ast.Module) -> Iterator[Raised]:
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    classes["error"] = CoterieError  # a parameter of this name: the class that the caller asks for
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes):
            continue
        words = {keyword.arg: _text(keyword.value) for keyword in node.keywords}
        message = _text(node.args[0]) if node.args else None
        code = words.get("code") or getattr(classes[node.func.id], "code", None)
        if code and message and "..." not in code:
            yield Raised(code, message, words.get("why"), words.get("fix"))


def _text(node: ast.expr) -> str | None:
    """A string literal, with its filled-in parts as `...`; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return None


def command(
    code: Annotated[
        str | None, typer.Argument(help="The code after the word Error; without it, all are listed.")
    ] = None,
) -> None:
    """Say what an error code means and what to do about it.

    Example:
        coterie explain config-unknown-key
    """
    known = raised_errors()
    if code is None:
        for name in sorted({item.code for item in known}):
            say(name)
        return
    matches = [item for item in known if item.code == code]
    if not matches:
        raise CoterieError(
            f"There is no error code `{code}`.",
            code="explain-unknown-code",
            fix="`coterie explain` without a code lists all of them",
        )
    for item in matches:
        say(f"{item.code}: {item.message}")
        for name, text in (("why", item.why), ("fix", item.fix)):
            if text:
                say(f"  {name:<6} {text}")
