"""Wheel and sdist are the same bytes wherever they are built, and say what they were built from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from coterie import revision

ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore")
MODULES = ("__init__.py", "revision.py", "pages/page.py")  # some of the package: a build of these takes a second
MINIMAL_ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's sources, committed."""
    folder = tmp_path_factory.mktemp("first") / "coterie"
    for part in (*PARTS, *(f"src/coterie/{module}" for module in MODULES)):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / part, folder / part)
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "a")):
        subprocess.run([*GIT, *words], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def built(checkout: Path) -> Path:
    return build(checkout, TZ="UTC", umask=0o022)


def build(folder: Path, *kinds: str, TZ: str, umask: int) -> Path:
    out = folder.parent / f"{folder.name}-dist"
    asked = [word for kind in kinds or ("wheel", "sdist") for word in ("-t", kind)]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out), *asked],
        cwd=folder, env={**MINIMAL_ENVIRONMENT, "TZ": TZ, "SOURCE_DATE_EPOCH": "1700000000"}, umask=umask,
        check=True, capture_output=True,
    )  # fmt: skip
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_in_two_folders_are_equal_bit_for_bit(checkout: Path, built: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "of-another-name"
    other.parent.mkdir()
    subprocess.run(["git", "clone", "-q", str(checkout), str(other)], check=True, umask=0o077)
    first, second = contents(built), contents(build(other, TZ="Asia/Tokyo", umask=0o077))
    assert len(first) == 2
    assert first == second


def test_a_wheel_from_the_sdist_is_the_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(next(tmp_path.iterdir()), "wheel", TZ="UTC", umask=0o022)
    wheel = next(built.glob("*.whl"))
    assert (again / wheel.name).read_bytes() == wheel.read_bytes()


def test_an_installed_package_knows_its_commit_without_git(checkout: Path, built: Path, tmp_path: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(tmp_path)
    asked = [sys.executable, "-c", "from coterie.revision import revision; print(revision())"]
    alone = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    told = subprocess.run(asked, env=alone, check=True, capture_output=True, text=True).stdout.strip()
    assert len(told) >= 12
    assert commit.stdout.startswith(told)


def test_a_tree_with_changes_says_so_and_nothing_of_where_it_lies(checkout: Path, tmp_path: Path) -> None:
    changed = tmp_path / "secret-place"
    subprocess.run(["git", "clone", "-q", str(checkout), str(changed)], check=True)
    clean = revision.describe(changed)
    (changed / "README.md").write_text("other", "utf-8")
    assert clean is not None
    assert revision.describe(changed) == f"{clean}-dirty"
    assert revision.describe(changed / "src") is None


def test_another_repository_that_git_points_at_is_not_taken_for_the_own(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = revision.describe(checkout)
    subprocess.run([*GIT, "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert revision.describe(checkout) == own
