"""`coterie explain`: the meaning of an error code, read from the places that raise it."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
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


@cache
def raised_errors() -> tuple[Raised, ...]:
    """Every error of the installed package, sorted by code and message; a code may end in `...`, too."""
    texts = [path.read_text("utf-8") for path in Path(coterie.__file__).parent.rglob("*.py")]
    found = {item for text in texts if "code=" in text for item in _raised_in(ast.parse(text))}
    return tuple(sorted(found, key=lambda item: (item.code, item.message, item.why or "", item.fix or "")))


def explained(code: str) -> list[Raised]:
    """The places that raise ``code``; where its end is only known at run time, those whose beginning fits."""
    known = raised_errors()
    exact = [item for item in known if item.code == code]
    return exact or [item for item in known if item.code.endswith("...") and code.startswith(item.code[:-3])]


_CLASSES = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
_CLASSES["error"] = CoterieError  # a parameter of this name: the class that the caller asks for


_SAID = "as the message itself says"
"""Where the text is only known at run time."""


def _raised_in(tree: ast.Module) -> Iterator[Raised]:
    """Calls of an error's class, and of a helper with `code=`, whose own call of a class fills in what is missing."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    helpers = {node.name: _class_calls(node) for node in functions}
    module = _assigned(tree.body)
    inside: dict[int, dict[str, ast.expr]] = {}
    for function in functions:
        own = module | _assigned(ast.walk(function))
        inside |= {id(node): own for node in ast.walk(function) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _raised_by(node, helpers, inside.get(id(node), module))


def _raised_by(
    node: ast.Call, helpers: Mapping[str, list[ast.Call]], values: Mapping[str, ast.expr]
) -> Iterator[Raised]:
    words = {keyword.arg: _texts(keyword.value, values) for keyword in node.keywords}
    kind = _class_of(node)
    for helper in [] if kind or not words.get("code") else helpers.get(_name(node.func), []):
        kind = _class_of(helper)
        words = {word.arg: _texts(word.value, values) for word in helper.keywords} | words
    codes = words.get("code", [getattr(kind, "code", "")])
    messages = (_texts(node.args[0], values) if node.args else []) or words.get("why") or []
    if kind is None and not messages:
        return
    why = next(iter(words.get("why") or []), None)
    fix = (words["fix"] or [_SAID])[0] if "fix" in words else getattr(kind, "fix", None)
    for code, message in itertools.product(codes, messages or [_SAID]):
        if code and not code.startswith("..."):
            yield Raised(code, message if message.strip(".") else _SAID, why, fix)


def _class_calls(function: ast.FunctionDef) -> list[ast.Call]:
    return [node for node in ast.walk(function) if isinstance(node, ast.Call) and _class_of(node)]


def _class_of(node: ast.Call) -> type | None:
    return _CLASSES.get(node.func.id) if isinstance(node.func, ast.Name) else None


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _assigned(nodes: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """What plain names of a function or a module stand for."""
    return {
        node.targets[0].id: node.value
        for node in nodes
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    }


def _texts(node: ast.expr, values: Mapping[str, ast.expr]) -> list[str]:
    """What a string expression can be, filled-in parts as `...`; empty for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr():
            return ["".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)]
        case ast.IfExp():
            return _texts(node.body, values) + _texts(node.orelse, values)
        case ast.BoolOp():
            return [text for value in node.values for text in _texts(value, values)]
        case ast.BinOp(op=ast.Add()):
            left, right = _texts(node.left, values), _texts(node.right, values)
            return [one + other for one in left or ["..."] for other in right or ["..."]]
        case ast.Name() if node.id in values:
            rest = {name: value for name, value in values.items() if name != node.id}
            return _texts(values[node.id], rest)
        case _:
            return []


def command(
    code: Annotated[
        str | None, typer.Argument(help="The code after the word Error; without it, all are listed.")
    ] = None,
) -> None:
    """Say what an error code means and what to do about it.

    Example:
        coterie explain config-unknown-key
    """
    if code is None:
        for name in sorted({item.code for item in raised_errors()}):
            say(name)
        return
    matches = explained(code)
    if not matches:
        near = get_close_matches(code, [item.code for item in raised_errors()], cutoff=0.5)
        meant = f"did you mean {' or '.join(f'`{name}`' for name in dict.fromkeys(near))}? " if near else ""
        raise CoterieError(
            f"There is no error code `{code}`.",
            code="explain-unknown-code",
            fix=f"{meant}`coterie explain` without a code lists all of them",
        )
    for item in matches:
        say(f"{item.code}: {item.message}")
        for name, text in (("why", item.why), ("fix", item.fix)):
            if text:
                say(f"  {name:<6} {text}")
