"""Differential privacy for any model: exact per-sample clipping, noise, accounting.

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Budget": "budget",
    "Spent": "budget",
    "PrivacyWarning": "budget",
    "make_private": "setup",
    "PrivateSession": "session",
    "Balance": "balance",
    "Artefact": "provenance",
    "Statement": "statement",
    "Ledger": "ledger",
    "open_ledger": "ledger",
    "Mechanism": "accounting",
    "epsilon": "accounting",
    "noise_multiplier": "accounting",
    "per_sample_norms": "functional",
    "clipped_sum": "functional",
    "Engine": "engine",
    "ExactEngine": "isolation",
    "Flat": "clipping",
    "PerLayer": "clipping",
    "PerGroup": "clipping",
    "Automatic": "clipping",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
