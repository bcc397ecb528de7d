"""Names of code in the documentation exist: dotted names in full, paths from the repository's root, tests by name."""

from __future__ import annotations

import ast
import dataclasses
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import coterie

PACKAGE = Path(coterie.__file__).parent
PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
DIRECTIVE = re.compile(r"^::: (\S+)", re.MULTILINE)
DOTTED = re.compile(r"\b(?:coterie|dp|hf)(?:\.\w+)+")
PATH = re.compile(r"[\w./-]*\w\.py\b")
FOLDER = re.compile(r"^(?:src|tests|docs|benchmarks|examples)/[\w./-]*$")
TEST = re.compile(r"\btest_\w+$")
OTHER = {"coterie.json", "coterie.log", "coterie.Lanes"}  # two files and a gRPC service


def exists(dotted: str) -> bool:
    """Whether ``coterie.a.b.C.d`` is a module, or something in one; ``dp.x`` stands for ``coterie.dp.x``."""
    names = dotted.removeprefix("coterie.").split(".")
    found: Any = import_module("coterie")
    for at, name in enumerate(names, start=1):
        if hasattr(found, name):
            found = getattr(found, name)
        elif dataclasses.is_dataclass(found) or isinstance(found, type):
            return at == len(names) and any(name in vars(base).get("__annotations__", {}) for base in found.__mro__)
        else:
            try:
                found = import_module(".".join(["coterie", *names[:at]]))
            except ModuleNotFoundError as missing:  # the module itself, or what an extra would bring
                return not (missing.name or "").startswith("coterie")
    return True


def spans(page: Path) -> list[str]:
    text = page.read_text("utf-8")
    return [*SPAN.findall(FENCED.sub("", text)), *DIRECTIVE.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_code_on_a_page_exist(page: Path) -> None:
    tests = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    wrong = []
    for span in spans(page):
        wrong += [name for name in DOTTED.findall(span) if name not in OTHER and not exists(name)]
        wrong += [path for path in PATH.findall(span) if not (ROOT / path).is_file()]
        wrong += [path for path in FOLDER.findall(span) if not (ROOT / path).exists()]
        wrong += [name for name in TEST.findall(span) if name not in tests]
    assert not wrong


@pytest.mark.parametrize(
    "name", ["coterie.dp.nothing", "dp.Flat.nothing", "coterie.nothing.dp", "coterie.dp.accounting.budget.A"]
)
def test_the_check_sees_names_that_are_gone(name: str) -> None:
    assert not exists(name)


@pytest.mark.parametrize(
    "name", ["dp.Budget.epsilon", "dp.make_private", "coterie.federation.wire.frame", "coterie.cli"]
)
def test_the_check_finds_fields_functions_modules_and_packages(name: str) -> None:
    assert exists(name)


STORIES = {
    ".".join(["coterie", *package.relative_to(PACKAGE).parts]): ast.get_docstring(
        ast.parse((package / "__init__.py").read_text("utf-8"))
    )
    or ""
    for package in PACKAGES
}
MODULES = [
    ".".join(["coterie", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
]


def test_every_module_and_package_is_named_once_in_the_story_of_its_package() -> None:
    """Or of a package above it; the root's names what lies directly below it."""
    told = dict.fromkeys([*MODULES, *(STORIES.keys() - {"coterie"})], 0)
    for package, story in STORIES.items():
        for module in told:
            inside = (
                module.rpartition(".")[0] == package if package == "coterie" else module.startswith(package + ".")
            )
            told[module] += inside and story.count(f"`{module}`")
    assert not {module: times for module, times in told.items() if times != 1}


def test_what_is_run_fast_is_there() -> None:
    lines = (ROOT / "tests" / "fast.txt").read_text("utf-8").splitlines()
    assert not [line for line in lines if not line.startswith("#") and not (ROOT / line).exists()]


def test_stories_name_nothing_that_is_gone() -> None:
    names = [name for story in STORIES.values() for name in re.findall(r"`(coterie\.[\w.]+)`", story)]
    assert not [name for name in names if not exists(name)]


def test_the_tree_in_the_readme_has_a_line_for_every_folder() -> None:
    tree = next(block for block in FENCED.findall((ROOT / "README.md").read_text("utf-8")) if "src/coterie/" in block)
    lines = re.findall(r"^( *)([\w./-]+) {2,}\S", tree, re.MULTILINE)
    folders = {path.relative_to(PACKAGE).as_posix() for path in PACKAGES} - {"."}
    inside: list[str] = []
    listed = set()
    for indent, name in lines:
        inside[len(indent) // 2 :] = [name.removesuffix("/")]
        listed.add("/".join(inside))
    assert not [name for name in listed if not (ROOT / name).exists()]
    assert {f"src/coterie/{name}" for name in folders} <= listed
