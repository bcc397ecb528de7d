"""What people may rely on, name by name: tests/public_surface.txt. A change of it is meant, and in the changelog."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

import coterie
from coterie import dp, hf
from coterie.cli.app import COMMANDS
from coterie.config import FederationConfig, PartyConfig, TrainConfig
from coterie.config.load import specs_in

SURFACE = Path(__file__).parent / "public_surface.txt"
REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
OPEN = ("Engine", "ExactEngine", "Ledger", "Ranks")
"""Building blocks: their names stay, their members are not promised."""
FILES = {"train.yaml": TrainConfig, "federation.yaml": FederationConfig, "party.yaml": PartyConfig}


def names_of(package: str, exported: dict[str, Any]) -> Iterator[str]:
    """Exported names; of functions and data classes also the parameters, of classes the other public members."""
    for name, found in exported.items():
        shown = not inspect.isclass(found) or dataclasses.is_dataclass(found)
        parameters = list(inspect.signature(found).parameters) if shown else []
        yield f"{package}.{name}" + (f"({', '.join(parameters)})" if shown else "")
        if inspect.isclass(found) and name not in OPEN:
            bases = [base for base in found.__mro__ if base.__module__.startswith("coterie.")]
            members = {member for base in bases for member in vars(base) if not member.startswith("_")}
            yield from (f"{package}.{name}.{member}" for member in members - {*parameters})


def settings_of(file: str, spec: type[BaseModel]) -> Iterator[str]:
    for name, field in spec.model_fields.items():
        yield f"{file} {name}"
        for inner in specs_in(field.annotation):
            yield from settings_of(f"{file} {name}:", inner)


def surface() -> list[str]:
    python = [
        *names_of("coterie.dp", {name: getattr(dp, name) for name in dp.__all__}),
        *names_of("coterie.hf", {name: getattr(hf, name) for name in hf.__all__}),
    ]
    settings = [line for file, spec in FILES.items() for line in settings_of(file, spec)]
    return sorted({*python, *settings, *(f"coterie {command}" for command in COMMANDS)})


def test_the_public_names_are_the_listed_ones() -> None:
    listed, found = SURFACE.read_text("utf-8").splitlines(), surface()
    assert {"gone": sorted({*listed} - {*found}), "new": sorted({*found} - {*listed})} == {"gone": [], "new": []}
    assert listed == sorted(listed)


@pytest.mark.parametrize("package", [dp, hf], ids=lambda package: package.__name__)
def test_type_checkers_see_the_names_that_are_loaded_late(package: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(package))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "coterie" in str(node.module)]
    seen = {
        alias.asname: str(node.module).removeprefix(f"{package.__name__}.")
        for node in imports
        for alias in node.names
    }
    assert seen == package._MODULES


def test_every_exported_name_has_an_entry_in_the_reference() -> None:
    pages = "".join(page.read_text("utf-8") for page in REFERENCE.glob("*.md"))
    exported = [f"{package.__name__}.{name}" for package in (dp, hf) for name in package.__all__]
    assert not [name for name in exported if f"::: {name}\n" not in pages]


def test_the_package_itself_exports_its_version_alone() -> None:
    public = [name for name in vars(coterie) if name.isupper() and not name.startswith("_")]
    assert [*public, *({"__version__"} & vars(coterie).keys())] == ["__version__"]
