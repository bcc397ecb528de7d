"""What was released, to whom it belonged, and what it cost.

`coterie.dp.accounting.dataset` and `coterie.dp.accounting.users` say what a unit is, `coterie.dp.accounting.lots`
draws who is in a round, `coterie.dp.accounting.budget` is what may be spent, and `coterie.dp.accounting.accountant`
turns noise into epsilon, computed once (`coterie.dp.accounting.kept`). A result leaves once:
`coterie.dp.accounting.releases`, out of a `coterie.dp.accounting.spool`, each in a
`coterie.dp.accounting.release_file`, after an entry in the `coterie.dp.accounting.ledger`;
`coterie.dp.accounting.run_entry` is what a run fixes at its start. Several runs on
the same text: `coterie.dp.accounting.texts` tells it again, `coterie.dp.accounting.lifetime` adds up with
`coterie.dp.accounting.overlap` and `coterie.dp.accounting.groups`, `coterie.dp.accounting.merging` joins two
machines' ledgers. `coterie.dp.accounting.provenance` says what the start was made from,
`coterie.dp.accounting.statement` says it all in words, every epsilon as `coterie.dp.accounting.digits` prints it.
"""

from importlib import import_module
from typing import Any

_HERE = ("Mechanism", "epsilon", "noise_multiplier")


def __getattr__(name: str) -> Any:
    if name not in _HERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("coterie.dp.accounting.accountant"), name)
