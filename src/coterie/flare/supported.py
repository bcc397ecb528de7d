"""Which FLARE this runs in. What imports FLARE imports this first: another version is refused in one sentence, before
a part of it is missed somewhere inside.
"""

from __future__ import annotations

import contextlib
import re
from importlib.metadata import PackageNotFoundError, version

from coterie.errors import ConfigError

MINOR = "2.9"


def check_version(found: str) -> None:
    """Whether it is a FLARE that coterie's job runs in.

    Args:
        found: its version.

    Raises:
        ConfigError: it is another.
    """
    if not re.match(rf"{re.escape(MINOR)}(\D|$)", found):
        raise ConfigError(
            f"coterie's job runs in NVIDIA FLARE {MINOR}, and here is {found}.",
            code="flare-version",
            fix="pip install 'coterie[nvflare]' into the environment of FLARE's jobs, at the hub and at every site",
        )


with contextlib.suppress(PackageNotFoundError):  # none is here: importing it says so
    check_version(version("nvflare"))
