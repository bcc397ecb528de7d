"""Differential privacy for any model: exact per-sample clipping, noise, accounting.

Names are loaded when they are first used, so that importing the package stays cheap. In reading order.

What people call: `coterie.dp.functional` (norms and clipped sums), `coterie.dp.setup` (`make_private`),
`coterie.dp.session` (a run), `coterie.dp.budget`, `coterie.dp.numbers`. A federation's party has
`coterie.dp.contributor` in place of the session.

A run is declared once: `coterie.dp.plan` holds what bounds its cost and what cannot, `coterie.dp.private_data` its
records; `coterie.dp.saved_plan` keeps a plan in checkpoints (`coterie.dp.checkpoint`). `coterie.dp.start` checks and
begins or resumes a session's run, and `coterie.dp.open_run` opens it, a party's too.

One round: `coterie.dp.lots` draws who is in it, `coterie.dp.lot_sums` runs physical batches on a
`coterie.dp.sum_engine`, `coterie.dp.clipping` says how much of each record counts, `coterie.dp.lot_noise` how much
noise what is released gets, as one Gaussian (`coterie.dp.mechanism`), `coterie.dp.releases` lets it out once, and
`coterie.dp.stepping` hands it to the optimizer. `coterie.dp.balance` says what becomes of released loads, which
`coterie.dp.router_watch` sees. Around it: `coterie.dp.dataset`, `coterie.dp.users`, `coterie.dp.losses`,
`coterie.dp.heads`, `coterie.dp.threads`.

Per-sample gradients, from operations to sums. `coterie.dp.engine` adds up; `coterie.dp.gradient_groups` says what is
clipped together, `coterie.dp.memory_choice` in how many backwards. `coterie.dp.captured_pass` runs one of them;
`coterie.dp.capture` sees every use of a parameter in it, `coterie.dp.derived` follows values computed from parameters
alone, `coterie.dp.probe` and `coterie.dp.sites` know where the records lie. A use is handled by a rule:
`coterie.dp.rules`, then `coterie.dp.rules_matrix`, `coterie.dp.rules_elementwise`, `coterie.dp.rules_other`,
`coterie.dp.replays`. A rule makes a term: `coterie.dp.terms`, `coterie.dp.segments` for stacked experts, and
`coterie.dp.resolve` where a parameter is used several times. Norms without cancellation: `coterie.dp.gram`,
`coterie.dp.gram_kernel`, `coterie.dp.scaling`, `coterie.dp.precision`. Experts: `coterie.dp.experts` behind the seam,
`coterie.dp.adapters` for Switch Transformers.

Each record alone: `coterie.dp.isolation`, `coterie.dp.lone_experts`, `coterie.dp.grid_sums`.

Checks before the first lot: `coterie.dp.refusals`, `coterie.dp.records`, `coterie.dp.dry_step`,
`coterie.dp.provenance`; the self-check `coterie.dp.selfcheck` by `coterie.dp.batches_of_one`,
`coterie.dp.comparison`, `coterie.dp.made_up` and `coterie.dp.draws`. Checks while it runs: `coterie.dp.watched`,
`coterie.dp.model_state`, `coterie.dp.guard`.

Noise: `coterie.dp.randomness`, `coterie.dp.noise`, `coterie.dp.noise_kernel`.

Accounting: `coterie.dp.accounting` turns noise into epsilon, `coterie.dp.spool` and `coterie.dp.ledger` keep what
was released, `coterie.dp.run_facts` what a run fixed at its start, `coterie.dp.texts` what tells the same text
again, `coterie.dp.lifetime` with `coterie.dp.overlap` and `coterie.dp.groups` add up runs, `coterie.dp.merging` two
machines; `coterie.dp.statement` says it.
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
