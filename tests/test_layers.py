"""Imports go one way.

errors < revision < storage < ranks < pages < config < models < checkpoints < {dp, federation} < training < hf
< audit < demonstration < flare < cli
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import coterie

PACKAGE = Path(coterie.__file__).parent
ORDER = (
    "errors",
    "revision",
    "storage",
    "ranks",
    "pages",
    "config",
    "models",
    "checkpoints",
    "dp",
    "federation",
    "training",
    "hf",
    "audit",
    "demonstration",
    "flare",
    "cli",
    "__main__",
)
NEVER = {("dp", "federation"), ("federation", "dp")}
FILES = sorted(PACKAGE.rglob("*.py"))


def subject(dotted: str) -> str | None:
    """The layer a dotted name is in; None for the root package and what is not coterie's."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "coterie" and len(parts) > 1 else None


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(importer: str, imported: str) -> bool:
    if importer == imported:
        return False
    return (importer, imported) in NEVER or ORDER.index(imported) > ORDER.index(importer)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_file_imports_only_from_layers_below_it(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer == "__init__":
        return
    assert layer in ORDER, f"{layer} has no place in the import order"
    names = imported_names(ast.parse(path.read_text("utf-8")))
    used = {name for name in map(subject, names) if name in ORDER}
    assert not {name for name in used if forbidden(layer, name)}


def test_the_check_would_notice_a_wrong_import() -> None:
    names = list(imported_names(ast.parse("from coterie import cli\nimport coterie.federation.wire.frame")))
    assert [subject(name) for name in names] == ["cli", "federation"]
    assert forbidden("training", "cli")
    assert forbidden("dp", "federation")
    assert not forbidden("training", "dp")


def cycle(imports: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a ring, each once; empty where there is none."""
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        return sorted(set(error.args[1]))
    return []


def test_files_do_not_import_each_other_also_not_for_types_or_inside_functions() -> None:
    dotted = {".".join(("coterie", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    imports = {}
    for name, path in dotted.items():
        found = set(imported_names(ast.parse(path.read_text("utf-8"))))
        imports[name] = (found | {part.rpartition(".")[0] for part in found}) & dotted.keys() - {name}
    # A ledger's lifetime is that of all ledgers beside it, which are opened for it.
    imports["coterie.dp.accounting.lifetime"].discard("coterie.dp.accounting.ledger")
    assert not cycle(imports)


def test_the_check_would_notice_a_ring() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


@pytest.mark.parametrize("statement", ["import coterie", "import coterie.config", "import coterie.cli.app"])
def test_light_imports_do_not_load_torch(statement: str) -> None:
    code = f"import sys\n{statement}\nassert not {{'torch', 'transformers', 'grpc'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
