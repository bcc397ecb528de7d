"""`lot_size: auto`: lot, rounds and noise for a budget, from public numbers and a processor time that was agreed to.

Public are the number of records, `data.sequence_length`, the budget, and how long made-up records of that length take
on this machine. No token of the text is counted: how long documents are may not decide what is released.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from coterie.config import TrainConfig
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.errors import BudgetError, ConfigError
from coterie.ranks.world import check_alone
from coterie.training.data.documents import read_documents
from coterie.training.data.tokenizer import get_tokenizer, tokenize
from coterie.training.planning.record_time import seconds_per_record
from coterie.training.single.setup import as_trained, build_for, plan_of

FEWEST_ROUNDS = 40
"""Steps that an optimiser is left with, where `train.rounds` allows as many: with fewer it does not get far."""
HIGHEST_RATE = 0.5
"""Beyond it larger lots lower the noise of an average no further."""
_STEP = 1.6
"""Between two numbers of rounds that are tried."""
_NEAR = 1.1
"""Of the least noise: up to here more rounds are worth more than less noise."""


@dataclass(frozen=True)
class Tried:
    """One lot and number of rounds within the time.

    Attributes:
        run_noise: standard deviation of the noise in the average of all rounds, in clip norms, over the lot.
        hours: of processor time.
    """

    lot_size: int
    rounds: int
    noise_multiplier: float
    run_noise: float
    hours: float


@dataclass(frozen=True)
class AutoLot:
    """What was chosen, and of what.

    Attributes:
        units: N.
        seconds: that one unit of full length takes.
        hours: that the run may take.
        chosen: one of ``tried``.
    """

    units: int
    seconds: float
    hours: float
    chosen: Tried
    tried: tuple[Tried, ...]

    def lines(self) -> list[str]:
        """Why, in sentences."""
        best, most = self.chosen, math.floor(HIGHEST_RATE * self.units)
        why = (
            f"half of the {self.units}, the largest that still lowers the noise"
            if best.lot_size == most
            else "as large as that time allows with so many rounds"
        )
        return [
            f"lot_size: auto. One record of full length takes {1000 * self.seconds:.3g} ms here, measured on made-up "
            f"ones; {self.hours:g} hours are for the run",
            f"chosen: lots of {best.lot_size} ({why}), {best.rounds} rounds, noise multiplier "
            f"{best.noise_multiplier:.3f}: the average of all rounds has noise {best.run_noise:.3g} clip norms a "
            f"record, in {best.hours:.2g} hours of processor time",
        ]


def asked(config: TrainConfig) -> bool:
    """Whether a run's lot is to be chosen."""
    return config.privacy is not None and config.privacy.lot_size == "auto"


def settled(config: TrainConfig) -> tuple[TrainConfig, AutoLot]:
    """The settings with numbers in place of ``auto``: `train.rounds` is what was chosen, too.

    Raises:
        ConfigError: several processes are to share the run (code ``auto-lot-devices``).
        PrivacyError: a launcher started several.
        BudgetError: no noise reaches the budget, or the time is too short for one record a round.
    """
    spec = config.privacy
    assert spec is not None
    if config.ranks > 1:
        raise ConfigError(
            "`lot_size: auto` is for one process.",
            code="auto-lot-devices",
            why="every rank would measure, and choose, for itself",
            fix="run `coterie plan train.yaml` without `devices`, `experts_over` and `layers_over`, and write its "
            "numbers down",
        )
    check_alone()
    data = config.data
    documents = read_documents(data.train, data, user_column=spec.user_column)
    tokenizer = get_tokenizer(data.tokenizer, config.model, data)
    records = tokenize(documents, data, tokenizer)
    model = as_trained(build_for(config, tokenizer), config)
    numbers = config.model_copy(update={"privacy": spec.model_copy(update={"lot_size": 1})})
    plan = plan_of(numbers, spec.model_copy(update={"lot_size": 1}), model)
    units = PrivateData.of(records, users=records.users, records_per_user=plan.records_per_user).units.count
    each = plan.records_per_user if spec.unit == "user" else 1
    like, options = records.collate([records[0]]), ComputeOptions.of_settings(spec)
    seconds = each * seconds_per_record(model, like, plan, options, data.sequence_length)
    found = choose(plan, units, config.train.rounds, seconds, spec.compute_hours)
    privacy = spec.model_copy(update={"lot_size": found.chosen.lot_size})
    train = config.train.model_copy(update={"rounds": found.chosen.rounds})
    return config.model_copy(update={"privacy": privacy, "train": train}), found


def choose(plan: PrivacyPlan, units: int, rounds: int, seconds: float, hours: float) -> AutoLot:
    """Lot and rounds with little noise in the average of all rounds, within a time.

    A lot is as large as the time allows, up to half of all units. Of the numbers of rounds from `FEWEST_ROUNDS` to
    ``rounds``, the largest whose noise is within a tenth of the least.

    Args:
        plan: its budget; lot and rounds mean nothing yet.
        units: N.
        rounds: the most.
        seconds: a unit takes.
        hours: that the run may take.

    Raises:
        BudgetError: no noise reaches the budget; the time is too short (code ``auto-lot-time``).
    """
    affordable = 3600 * hours / seconds
    tried = []
    for count in _numbers(min(FEWEST_ROUNDS, rounds), rounds):
        lot = min(math.floor(HIGHEST_RATE * units), math.floor(affordable / count))
        if lot >= 1:
            tried.append(_tried(plan, units, lot, count, seconds))
    if not tried:
        raise BudgetError(
            f"in {hours:g} hours not one record a round can be computed at {seconds:.3g} s each.",
            code="auto-lot-time",
            fix="raise `privacy.compute_hours`, or train fewer values",
        )
    least = min(each.run_noise for each in tried)
    chosen = max((each for each in tried if each.run_noise <= _NEAR * least), key=lambda each: each.rounds)
    return AutoLot(units, seconds, hours, chosen, tuple(tried))


def _numbers(fewest: int, most: int) -> list[int]:
    """From ``fewest`` in steps of `_STEP`, and ``most``."""
    found, count = [], float(fewest)
    while count < most:
        found.append(round(count))
        count *= _STEP
    return [*found, most]


def _tried(plan: PrivacyPlan, units: int, lot: int, rounds: int, seconds: float) -> Tried:
    other = replace(plan, lot_size=lot, rounds=rounds)
    noise = other.mechanism(other.lots(units)).noise_multiplier
    return Tried(lot, rounds, noise, noise / lot / math.sqrt(rounds), rounds * lot * seconds / 3600)
