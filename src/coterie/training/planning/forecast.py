"""What a private run will cost and how noisy it will be, before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from coterie.config import PrivacySpec
from coterie.dp.accounting.accountant import epsilon
from coterie.dp.accounting.digits import epsilon_digits
from coterie.dp.accounting.groups import group_epsilon
from coterie.dp.plan import PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.training.data.packing import Sequences

_DROWNED = 1.0
_NOISY = 0.1
_WEAK = 20.0
_LOTS = (0.25, 0.5, 1, 2, 4)
_BUDGETS = (1.0, 3.0, 8.0)


@dataclass(frozen=True)
class Forecast:
    """Figures of a private run that are known before its first lot. Lengths of documents are the owner's: not public.

    Attributes:
        unit: what is protected: record or user.
        units: N.
        lot_size: expected units in a round; rate: each unit's chance to be in it, where it can be in it.
        rounds: planned.
        bands: blocks of units that take turns; a unit can be in each round whose turn its block has.
        noise_multiplier: standard deviation of a round's noise, in clip norms.
        epsilon, delta: for one unit, when all rounds are released.
        pieces: most records that one document became; 1 where units are users.
        document_epsilon: for a whole document of so many records, at the same delta; infinite without a promise.
        remarks: what is odd about these numbers, a sentence each.
    """

    unit: str
    units: int
    lot_size: int
    rate: float
    rounds: int
    bands: int
    noise_multiplier: float
    epsilon: float
    delta: float
    pieces: int
    document_epsilon: float
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """The same in sentences."""
        whole = f"{self.document_epsilon:.3g}" if math.isfinite(self.document_epsilon) else "without bound"
        document = (
            [f"a whole document is up to {self.pieces} records here: its epsilon is {whole}, not {self.epsilon:.3g}"]
            if self.pieces > 1
            else []
        )
        rate = f"rate {self.rate:.4g}"
        if self.bands > 1:
            rate += f" of one block in {self.bands}, which take turns"
        return [
            f"N = {self.units} {self.unit}s, about {self.lot_size} of them in each of {self.rounds} rounds "
            f"({rate}); noise multiplier {self.noise_multiplier:.3f}",
            f"epsilon {epsilon_digits(self.epsilon)} at delta {self.delta:g} for one {self.unit} when all rounds are "
            "done",
            *document,
            *(f"note: {remark}" for remark in self.remarks),
        ]

    def as_json(self) -> dict[str, Any]:
        """JSON values; an epsilon without bound becomes None."""
        values = asdict(self)
        values["document_epsilon"] = self.document_epsilon if math.isfinite(self.document_epsilon) else None
        return values


Announce = Callable[[Forecast], None]


@dataclass(frozen=True)
class Choice:
    """Another budget, or another lot with as many rounds as use each unit as often.

    Attributes:
        epsilon: at the plan's delta.
        lot_size, rounds: of it.
        noise_multiplier: that the budget needs then.
        round_noise: standard deviation of a round's noise in clip norms, over the lot: what each unit must outweigh.
        run_noise: the same for the average of all rounds.
    """

    epsilon: float
    lot_size: int
    rounds: int
    noise_multiplier: float
    round_noise: float
    run_noise: float


def choices(plan: PrivacyPlan, units: int) -> list[Choice]:
    """What other lots and budgets would mean for the same text, used as often; the plan's own among them.

    Args:
        plan: of the run.
        units: records or users in the text.
    """
    own, used = plan.budget.epsilon, plan.rounds * plan.lot_size
    lots = {
        lot: round(used / lot) for lot in (round(plan.lot_size * factor) for factor in _LOTS) if 1 <= lot <= units
    }
    asked = [(own, lot, rounds) for lot, rounds in lots.items() if abs(lot * rounds - used) <= used / 8]
    asked += [(other, plan.lot_size, plan.rounds) for other in _BUDGETS if other != own]
    found = []
    for budget, lot, rounds in asked:
        other = replace(
            plan, budget=replace(plan.budget, epsilon=budget), lot_size=lot, rounds=rounds, max_lot=None,
            noise_multiplier=None,
        )  # fmt: skip
        noise = other.mechanism(other.lots(units)).noise_multiplier
        found.append(Choice(budget, lot, rounds, noise, noise / lot, noise / lot / math.sqrt(rounds)))
    return sorted(found, key=lambda each: (each.epsilon, each.lot_size))


def forecast(
    spec: PrivacySpec, plan: PrivacyPlan, records: Sequences, pieces: int, *, tested: bool, parties: int = 1
) -> Forecast:
    """What a run will spend on these records; nothing is drawn, written or counted.

    Args:
        spec: its `privacy` block.
        plan: made of it.
        records: its text as it is trained on.
        pieces: most records that one document became.
        tested: there is held-out text.
        parties: that train together, each with noise of its own.

    Raises:
        BudgetError: no noise reaches the budget, or lots are larger than the data.
    """
    data = PrivateData.of(records, users=records.users, records_per_user=plan.records_per_user)
    lots = plan.lots(data.units.count)
    mechanism = plan.mechanism(lots)
    spent = epsilon([(mechanism, plan.rounds)], spec.delta)
    pieces = pieces if spec.unit == "record" else 1
    whole = group_epsilon([(mechanism, plan.rounds)], spec.delta, pieces) if pieces > 1 else spent
    figures = Forecast(
        spec.unit, lots.units, lots.lot_size, lots.rate, plan.rounds, mechanism.bands, mechanism.noise_multiplier,
        spent, spec.delta, pieces, whole, (),
    )  # fmt: skip
    return replace(figures, remarks=(*_against(plan), *_remarks(figures, tested, parties)))


def _against(plan: PrivacyPlan) -> list[str]:
    """Against whom the epsilon holds, where that is not everybody."""
    if plan.pooled is None or plan.pooled.colluding is None:
        return []
    return [
        f"this epsilon holds against any {plan.pooled.colluding} of the {plan.pooled.parties - 1} other parties "
        "together, as each adds only its share of the noise; `coterie plan` says what holds against more"
    ]


def _remarks(figures: Forecast, tested: bool, parties: int) -> list[str]:
    found, relative = [], figures.noise_multiplier / figures.lot_size / math.sqrt(parties)
    what = f"noise of {figures.noise_multiplier:.3g} clip norms on a sum of about {figures.lot_size} {figures.unit}s"
    what += f", at each of {parties} parties," if parties > 1 else ""
    if relative >= _DROWNED:
        found.append(
            f"{what} is larger than the sum itself even along one direction: nothing can be learnt. "
            "Larger lots of more records, a larger epsilon or fewer rounds"
        )
    elif relative >= _NOISY:
        found.append(f"{what} leaves little to learn from: larger lots, or fewer rounds, help most")
    if figures.delta >= 1 / figures.units:
        found.append(f"delta {figures.delta:g} is not below 1/N = {1 / figures.units:.2g}: choose a smaller one")
    if figures.epsilon > _WEAK:
        found.append(f"epsilon {figures.epsilon:.3g} promises next to nothing; 1 to 10 is usual")
    if figures.pieces > 1:
        found.append("`data.packing: records` makes a document one record, and cuts off what is longer")
    if figures.bands > figures.rounds:
        found.append(
            f"of {figures.bands} blocks that take turns only {figures.rounds} have one: the rest of the text is "
            "never used. More rounds, or fewer `noise_bands`"
        )
    if figures.rate / figures.bands > 0.5:
        found.append("every record is in most rounds, so sampling hides little: smaller lots cost less noise")
    if not tested:
        found.append("without `data.test` nobody sees whether it learns")
    return found
