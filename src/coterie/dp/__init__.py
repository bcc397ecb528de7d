"""Differential privacy for any model: exact per-sample clipping, noise, accounting.

Names are loaded when they are first used, so that importing the package stays cheap.

What people call: `coterie.dp.setup` (`make_private`), `coterie.dp.session` (a run), `coterie.dp.numbers`. A
federation's party has `coterie.dp.party_session` in place of the session.

A run is declared once: `coterie.dp.plan` holds what bounds its cost and what cannot, `coterie.dp.private_data` its
records; `coterie.dp.saved_plan` keeps a plan in checkpoints (`coterie.dp.checkpoint`). `coterie.dp.start` checks and
begins or resumes a session's run, and `coterie.dp.open_run` opens it, a party's too. Where several ranks share it,
`coterie.dp.ownership` says who noises and steps what, and `coterie.dp.shared_releases` keeps them together.

One round: `coterie.dp.lot_sums` adds up a lot, whose physical batches `coterie.dp.lot_batches` runs on a
`coterie.dp.sum_engine`; `coterie.dp.clipping` says how much of each record counts, `coterie.dp.lot_figures` what the
owner sees of it, and `coterie.dp.stepping` gives the noised result to the optimizer. `coterie.dp.released_state`
keeps what later rounds know from it: thresholds, and loads, of which `coterie.dp.balance` says what they do and which
`coterie.dp.router_watch` sees. Around it: `coterie.dp.losses`, `coterie.dp.heads`,
`coterie.dp.label_words`, `coterie.dp.threads`, `coterie.dp.refusals`.

The folders, in the order of a record's way: `coterie.dp.checks` (before the first lot, and while a run goes),
`coterie.dp.per_sample` (norms and sums of every record's gradient), `coterie.dp.isolation` (each record alone, for
half precision and served weights), `coterie.dp.noise`, `coterie.dp.accounting` (what was released and what it cost).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and the reference pages
    from coterie.dp.accounting.accountant import Mechanism as Mechanism
    from coterie.dp.accounting.accountant import epsilon as epsilon
    from coterie.dp.accounting.accountant import noise_multiplier as noise_multiplier
    from coterie.dp.accounting.budget import Budget as Budget
    from coterie.dp.accounting.budget import PrivacyWarning as PrivacyWarning
    from coterie.dp.accounting.budget import Spent as Spent
    from coterie.dp.accounting.ledger import Ledger as Ledger
    from coterie.dp.accounting.ledger import open_ledger as open_ledger
    from coterie.dp.accounting.provenance import Artefact as Artefact
    from coterie.dp.accounting.statement import Statement as Statement
    from coterie.dp.balance import Balance as Balance
    from coterie.dp.clipping import Automatic as Automatic
    from coterie.dp.clipping import Flat as Flat
    from coterie.dp.clipping import PerGroup as PerGroup
    from coterie.dp.clipping import PerLayer as PerLayer
    from coterie.dp.isolation.exact_engine import ExactEngine as ExactEngine
    from coterie.dp.per_sample.engine import Engine as Engine
    from coterie.dp.per_sample.functional import clipped_sum as clipped_sum
    from coterie.dp.per_sample.functional import per_sample_norms as per_sample_norms
    from coterie.dp.session import PrivateSession as PrivateSession
    from coterie.dp.setup import make_private as make_private
    from coterie.models.spread.spread import spread_experts as spread_experts
    from coterie.ranks.processes import join_ranks as join_ranks
    from coterie.ranks.ranks import Ranks as Ranks

_MODULES = {
    "Budget": "accounting.budget",
    "Spent": "accounting.budget",
    "PrivacyWarning": "accounting.budget",
    "make_private": "setup",
    "PrivateSession": "session",
    "Balance": "balance",
    "Artefact": "accounting.provenance",
    "Statement": "accounting.statement",
    "Ledger": "accounting.ledger",
    "open_ledger": "accounting.ledger",
    "Mechanism": "accounting.accountant",
    "epsilon": "accounting.accountant",
    "noise_multiplier": "accounting.accountant",
    "per_sample_norms": "per_sample.functional",
    "clipped_sum": "per_sample.functional",
    "Engine": "per_sample.engine",
    "ExactEngine": "isolation.exact_engine",
    "Flat": "clipping",
    "PerLayer": "clipping",
    "PerGroup": "clipping",
    "Automatic": "clipping",
    "Ranks": "coterie.ranks.ranks",
    "join_ranks": "coterie.ranks.processes",
    "spread_experts": "coterie.models.spread.spread",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name] if _MODULES[name].startswith("coterie.") else f"{__name__}.{_MODULES[name]}"
    return getattr(import_module(module), name)
