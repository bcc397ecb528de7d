"""What a run's ledger promises, and what that allows an attacker."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coterie.audit.epsilon.allowed import Allowed, by_mechanism
from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.ledger import default_root
from coterie.dp.accounting.lifetime import ledgers_under
from coterie.errors import AuditError


@dataclass(frozen=True)
class UnitEpsilon:
    """Epsilon at delta for one unit, by what a run released.

    Attributes:
        unit: record or user.
        spent: its mechanism and how often it ran.
    """

    epsilon: float
    delta: float
    unit: str
    spent: tuple[tuple[Mechanism, int], ...]

    @classmethod
    def of_run(cls, run: str, ledger: Path | None, run_dir: Path) -> UnitEpsilon | None:
        """From the ledger. None for a seeded run, which promises nothing.

        Args:
            run: its name in the ledger.
            ledger: folder of ledgers, where the settings name one.
            run_dir: the run's own folder.

        Raises:
            AuditError: no ledger there counts the run.
        """
        root = ledger or default_root(run_dir)
        for counted in ledgers_under(root):
            for held in counted.runs():
                if held.run == run and held.facts:
                    if held.seeded:
                        return None
                    delta = float(held.facts["budget"]["delta"])
                    spent = ((Mechanism.from_json(held.facts["mechanism"]), len(held.releases)),)
                    unit = str(held.facts.get("unit", "record"))
                    return cls(counted.spent(run, delta).epsilon, delta, unit, spent)
        raise AuditError(
            f"No ledger under {root} counts run {run}.",
            code="audit-no-ledger",
            why="without its claim nobody can say whether the model gives away more than it may",
            fix="name the folder of ledgers that the run was made with (`privacy.ledger`)",
        )

    @cached_property
    def allowed(self) -> Allowed:
        """The best test for one unit. Cost: a second or more, once."""
        return by_mechanism(self.spent)

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:.3g} at delta {self.delta:.2g} for one {self.unit}"
