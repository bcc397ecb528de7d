"""What may be spent, and what was: epsilon and delta, checked where they enter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from coterie.dp.accounting.digits import epsilon_digits
from coterie.dp.numbers import check_fields


class PrivacyWarning(UserWarning):
    """A privacy setting that is allowed but weaker than it looks."""


@dataclass(frozen=True)
class Budget:
    """The (epsilon, delta) that a run may spend, for adding or removing one record (or one user).
    With noise in bands its number stays empty, and the others keep theirs.

    Args:
        epsilon: above 0, at most `LARGEST_EPSILON`.
        delta: in (0, 1); choose it well below 1 / number of records.

    Raises:
        BudgetError: a value outside its range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        check_fields(self, "epsilon", "delta")

    def warn_for(self, units: int, unit: str = "record") -> None:
        """Warn when delta is so large that publishing one whole record at random would satisfy it."""
        if self.delta >= 1 / units:
            warnings.warn(
                f"delta {self.delta:.3g} is not below 1/N = {1 / units:.3g} (N = {units} {unit}s): a mechanism that "
                f"publishes one {unit} chosen at random would pass; choose a smaller delta.",
                PrivacyWarning,
                stacklevel=3,
            )


@dataclass(frozen=True)
class Spent:
    """What was spent: for any outputs, P[with the record] <= e^epsilon P[without] + delta, and the reverse."""

    epsilon: float
    delta: float

    def __str__(self) -> str:
        return f"epsilon {epsilon_digits(self.epsilon)} at delta {self.delta:.3g}"
