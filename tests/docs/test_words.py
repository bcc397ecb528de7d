"""One word for one thing: what was renamed does not come back; see docs/reference/glossary.md."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import coterie

PACKAGE = Path(coterie.__file__).parent
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in ("audit", "pages")  # they tell findings, and mean no directive
]
RETIRED = {
    "Switchboard": "BaseTransport",
    "switchboard": "transport",
    "Line": "PeerLane",
    "Link": "Connection",
    "Pool": "ExpertsHost",
    "TrunkHome": "TrunkHost",
    "LoadHome": "PublicLoads",
    "home": "host",
    "HOME": "_MODULES",
    "TokenExchange": "TokensOwner",
    "ExpertHost": "TokensHost",
    "ExpertsWay": "ExpertsOwner",
    "PartyWork": "PartyActor",
    "PartyParts": "PartyInputs",
    "PrivacyParts": "PrivacyInputs",
    "Turn": "DeviceLock",
    "turn": "device_lock",
    "Standing": "PartyMemory",
    "standing": "memory",
    "Participant": "Follower",
    "participant": "follower",
    "told": "state, directive, or what it is",
    "news": "directive",
    "hear": "take",
    "interrupt": "cancel",
    "abandon": "cancel",
    "superseded": "CancelToken.check",
    "books": "ledger",
    "open_books": "open_ledger",
    "expert_weights_NK": "routing_weights_NK",
    "scale_R": "routing_weights_R",
    "Notice": "CoordinatorStatus",
    "notice": "status",
    "notify": "on_change, or nothing",
    "Session": "FrameScope; a session is a private run's",
    "session_of": "scope_of",
    "Made": "SyntheticRecord",
}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file gives or uses, but not its prose and its texts."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name, node.lineno
            case ast.keyword(arg=str(name)):
                yield name, node.lineno


def retired(text: str) -> list[tuple[str, int]]:
    return [(name, line) for name, line in identifiers(ast.parse(text)) if name.lstrip("_") in RETIRED]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_no_retired_word_names_anything(path: Path) -> None:
    found = [
        (name, line) for name, line in retired(path.read_text("utf-8")) if (path.name, name) not in OTHER_MEANING
    ]
    assert not found, {name: RETIRED[name.lstrip("_")] for name, _ in found}


OTHER_MEANING = {("ledger.py", "home")}
"""`Path.home`: a user's folder."""


@pytest.mark.parametrize(
    "text",
    ["def f(told): ...", "class Pool: ...", "x._standing = 1", "f(home=1)", "def interrupt(): ...", "told = 2"],
)
def test_a_retired_word_is_seen_wherever_it_names_something(text: str) -> None:
    assert len(retired(text)) == 1


def test_prose_may_say_it() -> None:
    assert not retired('"""Parties are told."""\nx = "home"  # news')


def words_of(glossary: str) -> list[str]:
    """What stands on the left of its tables."""
    rows = re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE)
    return [word.strip("`") for row in rows if row not in ("word", "---") for word in row.split(", ")]


def test_a_word_has_one_meaning_in_the_glossary() -> None:
    words = words_of((PACKAGE.parents[1] / "docs" / "reference" / "glossary.md").read_text("utf-8"))
    assert len(words) > 80
    assert not [word for word, times in Counter(words).items() if times > 1]


def test_a_second_meaning_is_seen() -> None:
    assert words_of("| word | meaning |\n|---|---|\n| lane | a |\n| frame, lane | b |\n") == ["lane", "frame", "lane"]
