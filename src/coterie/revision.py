"""Which coterie made something: its version, and the revision of the source that it was built from.

Every record of a run says both: run folders, ledgers, saved models, audits. Neither says where on whose disk it was.
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from coterie import __version__

BAKED = "_revision.txt"
"""Lies in an installed package, written when it was built; a source tree is asked instead."""

_PATIENCE_S = 10.0


@cache
def revision() -> str | None:
    """Twelve digits of the commit, and ``-dirty`` where files differed from it; None where nobody knows.

    A process asks git once at most, and only where it runs from a source tree.
    """
    package = Path(__file__).parent
    baked = package / BAKED
    if baked.is_file():
        return baked.read_text("ascii").strip() or None
    return describe(package.parents[1]) if package.parent.name == "src" else None


def describe(root: Path) -> str | None:
    """What git says of the source tree at ``root`` itself; None where that is no checkout, or git is absent."""
    checkout = root / ".git"
    if not checkout.exists():
        return None
    git = ["git", "--no-optional-locks", f"--git-dir={checkout}", f"--work-tree={root}"]  # whatever GIT_DIR says
    asked = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(asked, cwd=root, capture_output=True, text=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def software() -> dict[str, str | None]:
    """The two as a record of a run holds them: ``coterie`` (the version) and ``revision``."""
    return {"coterie": __version__, "revision": revision()}
