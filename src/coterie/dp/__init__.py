"""Differential privacy for any model: exact per-sample clipping, noise, accounting.

Names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and the reference pages
    from coterie.dp.accounting import Mechanism as Mechanism
    from coterie.dp.accounting import epsilon as epsilon
    from coterie.dp.accounting import noise_multiplier as noise_multiplier
    from coterie.dp.balance import Balance as Balance
    from coterie.dp.budget import Budget as Budget
    from coterie.dp.budget import PrivacyWarning as PrivacyWarning
    from coterie.dp.budget import Spent as Spent
    from coterie.dp.clipping import Automatic as Automatic
    from coterie.dp.clipping import Flat as Flat
    from coterie.dp.clipping import PerGroup as PerGroup
    from coterie.dp.clipping import PerLayer as PerLayer
    from coterie.dp.engine import Engine as Engine
    from coterie.dp.functional import clipped_sum as clipped_sum
    from coterie.dp.functional import per_sample_norms as per_sample_norms
    from coterie.dp.isolation import ExactEngine as ExactEngine
    from coterie.dp.ledger import Ledger as Ledger
    from coterie.dp.ledger import open_ledger as open_ledger
    from coterie.dp.provenance import Artefact as Artefact
    from coterie.dp.session import PrivateSession as PrivateSession
    from coterie.dp.setup import make_private as make_private
    from coterie.dp.statement import Statement as Statement

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
