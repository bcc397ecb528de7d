"""Modes of a run folder, whatever the umask and whatever lay there before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
