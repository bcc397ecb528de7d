"""What `make release` looks at first: a clean tree, and one version in code, tag and changelog."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "release_state"
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
CHANGELOG = "# Changelog\n\n## [Unreleased]\n{waiting}\n## [{version}] - 2026-01-02\n\n### Added\n\n- a thing\n"


@pytest.fixture
def commit(tmp_path: Path) -> Callable[..., Path]:
    """Makes a repository of one commit."""

    def make(code: str = "1.2.3", tag: str = "v1.2.3", changelog: str = "1.2.3", waiting: str = "") -> Path:
        (tmp_path / "src" / "coterie").mkdir(parents=True)
        (tmp_path / "src" / "coterie" / "__init__.py").write_text(f'__version__ = "{code}"\n', "utf-8")
        (tmp_path / "CHANGELOG.md").write_text(CHANGELOG.format(version=changelog, waiting=waiting), "utf-8")
        for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "a"), ("tag", tag)):
            subprocess.run([*GIT, *words], cwd=tmp_path, check=True)
        return tmp_path

    return make


def problems(root: Path) -> list[str]:
    asked = subprocess.run([sys.executable, str(SCRIPT), str(root)], capture_output=True, text=True)
    assert asked.returncode == bool(asked.stderr)
    return asked.stderr.splitlines()


def test_a_commit_with_one_version_everywhere_may_be_released(commit: Callable[..., Path]) -> None:
    assert problems(commit()) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tag": "v1.2.4"}, "v1.2.3 is not among them"),
        ({"tag": "1.2.3"}, "v1.2.3 is not among them"),
        ({"code": "1.2.4", "tag": "v1.2.4"}, "no heading `## [1.2.4] - YYYY-MM-DD`"),
        ({"code": "1.2", "tag": "v1.2"}, "no heading `## [1.2] - YYYY-MM-DD`"),
        ({"waiting": "\n### Fixed\n\n- something\n"}, "under [Unreleased]"),
    ],
)
def test_each_place_that_says_something_else_is_named(
    commit: Callable[..., Path], wrong: dict[str, str], said: str
) -> None:
    (problem,) = problems(commit(**wrong))
    assert said in problem


@pytest.mark.parametrize("path", ["new.txt", "CHANGELOG.md"])
def test_what_is_not_committed_stops_it(commit: Callable[..., Path], path: str) -> None:
    root = commit()
    with (root / path).open("a", encoding="utf-8") as file:
        file.write("\nmore\n")
    (problem,) = problems(root)
    assert "not committed" in problem
