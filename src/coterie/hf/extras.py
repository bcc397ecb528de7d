"""What a Trainer needs besides this package, named where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

from coterie.errors import ModelError


def check_installed() -> None:
    """Make sure that accelerate is there.

    Raises:
        ModelError: it is not.
    """
    if find_spec("accelerate") is None:
        raise ModelError(
            "PrivateTrainer needs the package accelerate, as every transformers.Trainer does; it is not installed.",
            code="hf-no-accelerate",
            fix="install it with: pip install 'coterie[hf]'",
        )
