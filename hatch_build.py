"""What the build adds to wheel and sdist: the revision that they were built from."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = "src"


class BakedRevision(BuildHookInterface[Any]):
    """Puts ``coterie/_revision.txt`` into what is built. A source tree in use (``pip install -e``) asks git."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        sys.path.insert(0, str(Path(self.root, SOURCES)))
        from coterie.revision import BAKED, describe

        inside = Path("coterie", BAKED)
        source = Path(self.root, SOURCES, inside)  # an unpacked sdist has it
        if not source.exists():
            self._folder = TemporaryDirectory()
            source = Path(self._folder.name, BAKED)
            source.write_text(f"{describe(Path(self.root)) or ''}\n", "ascii")
        target = Path(SOURCES, inside) if self.target_name == "sdist" else inside
        build_data["force_include"][str(source)] = str(target)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()
