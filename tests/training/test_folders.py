"""Modes of a run folder, whatever the umask and whatever lay there before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coterie.errors import ConfigError
from coterie.training.folders import kept_private, private_folder, public_folder


def modes(folder: Path) -> set[int]:
    return {path.lstat().st_mode & 0o777 for path in folder.rglob("*") if not path.is_symlink()}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o277])
def test_a_run_folder_is_readable_by_its_owner_alone_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "old").mkdir(mode=0o777)
    (run / "old" / "losses").write_text("1.0")
    os.chmod(run / "old" / "losses", 0o666)
    outside = tmp_path / "outside"
    outside.write_text("x")
    os.chmod(outside, 0o644)
    (run / "link").symlink_to(outside)
    before = os.umask(mask)
    try:
        with kept_private(run) as private:
            assert private == private_folder(run)
            (private / "metrics.jsonl").write_text("{}")
            (private / "deep").mkdir()
            public_folder(run).mkdir()
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert modes(run) == {0o700, 0o600}
    assert run.stat().st_mode & 0o777 == 0o700
    assert outside.stat().st_mode & 0o777 == 0o644


def test_what_lies_in_a_run_folder_can_be_used_by_its_owner_as_before(tmp_path: Path) -> None:
    tool = tmp_path / "tool.sh"
    tool.write_text("#!/bin/sh\n")
    os.chmod(tool, 0o755)
    with kept_private(tmp_path):
        pass
    assert tool.stat().st_mode & 0o777 == 0o700


def test_what_belongs_to_another_user_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted volume, where this user may write but not change modes."""
    os.chmod(tmp_path, 0o775)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with kept_private(tmp_path) as private:
        assert private.is_dir()
    assert tmp_path.stat().st_mode & 0o777 == 0o775


@pytest.mark.parametrize("link", [True, False])
def test_neither_the_home_folder_nor_the_root_is_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "link").symlink_to(home)
    for place in (tmp_path / "link" if link else home, Path("/"), home / "a" / ".."):
        with pytest.raises(ConfigError, match="no folder of a run's own"), kept_private(place):
            pass
    assert home.stat().st_mode & 0o777 == 0o755
    assert not list(home.iterdir())
