"""From noise to epsilon and back, by dp-accounting; and several quantities released as one Gaussian.

Neighbouring relation everywhere: one unit (a record, or a user with all its records) is added or removed.
The privacy loss distribution (PLD) is the accountant that counts; Renyi (RDP) stands beside it as a check. Both are
upper bounds, PLD down to a delta of `PLD_FLOOR`: below it the rounding of its Fourier transforms and the tails that
it cuts off (1e-15) are as large as delta, and Renyi, which has closed forms, is what counts. dp-accounting has no
Renyi bound for truncated Poisson sampling, so that is PLD only, and unbounded below the floor.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import dp_accounting
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution as distribution

from coterie.dp.accounting.budget import Budget
from coterie.dp.accounting.kept import kept
from coterie.errors import BudgetError, LedgerError, PrivacyError
from coterie.storage import check_keys, check_known

Sampler = Literal["poisson", "truncated_poisson"]
Accountant = Literal["pld", "rdp"]

_ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
_LARGEST_MULTIPLIER = 1e4
_SMALLEST_MULTIPLIER = 1e-2
"""Below half of this epsilon counts as infinite: it would be in the thousands, and take as long to compute."""

PLD_FLOOR = 1e-10
"""Smallest delta for which privacy loss distributions are used."""

_MANY_ROUNDS = 100_000
"""Beyond it a fine grid would take minutes; Renyi, whose cost does not grow with the rounds, bounds from above."""

_GRID = 20_000
"""Steps of a grid between no loss and the mean loss of one round of little noise: finer ones take minutes."""

_TOLERANCE = 1e-4
_FEW_ORDERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Renyi orders that are enough to begin a search: a power of two is asked for."""
_HIGH_ORDERS = (2048, 4096, 8192, 16384)
"""Renyi orders for small epsilons at a tiny delta, beyond dp-accounting's own; each costs as many terms."""


@dataclass(frozen=True)
class Mechanism:
    """One round's mechanism in public numbers: a Gaussian on a sampled lot.

    Attributes:
        noise_multiplier: sigma; noise standard deviation over the bound of one unit's contribution.
        sampling_rate: q, the probability with which each unit joins a lot.
        sampler: how lots are drawn.
        units: N, records or users of the dataset.
        limit: largest lot of truncated Poisson sampling, in units.
        bands: every unit is in one of so many blocks, which take turns, and joins with the sampling rate when it is
            its block's turn (`coterie.dp.noise.bands`); 1: in every round.
    """

    noise_multiplier: float
    sampling_rate: float
    sampler: Sampler = "poisson"
    units: int | None = None
    limit: int | None = None
    bands: int = 1

    def for_one_unit(self, rounds: int) -> tuple[Mechanism, int]:
        """What so many rounds of one run are for one unit: this mechanism without blocks, and its block's turns."""
        return replace(self, bands=1), -(-rounds // self.bands)

    def event(self) -> dp_accounting.DpEvent:
        """The event that dp-accounting composes."""
        if self.noise_multiplier <= 0:
            return dp_accounting.NonPrivateDpEvent()
        if self.sampler == "truncated_poisson":
            return dp_accounting.TruncatedSubsampledGaussianDpEvent(
                self.units, self.sampling_rate, self.limit, self.noise_multiplier
            )
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        return dp_accounting.PoissonSampledDpEvent(self.sampling_rate, gaussian)

    def to_json(self) -> dict[str, Any]:
        """JSON values. Of blocks only where there are some: what came before them would refuse the word."""
        values = asdict(self)
        if self.bands == 1:
            del values["bands"]
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mechanism:
        return cls(**data)


def check_mechanism(data: Mapping[str, Any], where: str) -> None:
    """Make sure that a stored mechanism (`Mechanism.to_json`) is one that this version can account for.

    Raises:
        LedgerError: it has a field or a sampler that is not known.
    """
    known = [field.name for field in fields(Mechanism)]
    check_keys(where, "field of a mechanism", data, known, LedgerError)
    check_known(where, "sampler", data["sampler"], get_args(Sampler), LedgerError)


def epsilon(spent: Iterable[tuple[Mechanism, int]], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon at ``delta`` of everything in ``spent`` together: pairs of a mechanism and how often a run ran it.

    Below a delta of `PLD_FLOOR` the answer is the Renyi one, whichever was asked for.

    Returns:
        0 if nothing ran, infinity if something ran without noise, or if truncated sampling is asked about below the
        floor.

    Raises:
        PrivacyError: RDP was asked for truncated Poisson sampling.

    Cost: 0.1 s to a few seconds; results are kept, so asking again is free.
    """
    counts: dict[Mechanism, int] = {}
    for mechanism, count in (each.for_one_unit(rounds) for each, rounds in spent):
        counts[mechanism] = counts.get(mechanism, 0) + count
    key = tuple(sorted(((m, c) for m, c in counts.items() if c), key=repr))
    return _epsilon(key, delta, accountant) if key else 0.0


@kept(4096)
def _epsilon(spent: tuple[tuple[Mechanism, int], ...], delta: float, accountant: Accountant) -> float:
    if any(mechanism.noise_multiplier < _SMALLEST_MULTIPLIER / 2 for mechanism, _ in spent):
        return math.inf  # it would be tens of thousands, on a grid that no memory holds
    truncated = any(mechanism.sampler == "truncated_poisson" for mechanism, _ in spent)
    if accountant == "rdp" and truncated:
        raise PrivacyError(
            "truncated Poisson sampling cannot be accounted by RDP.",
            code="dp-accountant",
            why="no Renyi bound for it is known to dp-accounting; the one for plain Poisson would be too small",
            fix="use the PLD accountant",
        )
    if accountant == "rdp" or delta < PLD_FLOOR:
        return math.inf if truncated else _renyi_epsilon(spent, delta)
    rounds = sum(count for _, count in spent)
    rough = _rough_epsilon(spent, delta)
    if not math.isfinite(rough) or rough >= 100:
        return rough
    # Rounding in the discretised losses grows with the rounds and matters most for small epsilon. Every grid gives
    # an upper bound; this choice keeps it within about 0.1 % at a cost of at most a second or two.
    fine = rounds <= _MANY_ROUNDS and (rough < 1 or rounds > 5000)
    return min(rough, _pld_epsilon(spent, delta, 1e-4 if fine else 1e-3))


def _rough_epsilon(spent: tuple[tuple[Mechanism, int], ...], delta: float) -> float:
    """An upper bound that is quick and may be loose; beyond `_MANY_ROUNDS` never looser than Renyi's."""
    found = _pld_epsilon(spent, delta, 1e-2)
    many = sum(count for _, count in spent) > _MANY_ROUNDS
    truncated = any(mechanism.sampler == "truncated_poisson" for mechanism, _ in spent)
    return min(found, _renyi_epsilon(spent, delta)) if many and not truncated else found


def _renyi_epsilon(spent: tuple[tuple[Mechanism, int], ...], delta: float) -> float:
    """By dp-accounting's orders; by higher ones too where the highest of these is the best."""
    orders = rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS
    found, best = _renyi(spent, delta, orders)
    return min(found, _renyi(spent, delta, _HIGH_ORDERS)[0]) if best == orders[-1] else found


def _renyi(spent: tuple[tuple[Mechanism, int], ...], delta: float, orders: Sequence[float]) -> tuple[float, float]:
    renyi = rdp.RdpAccountant(orders)
    with _without_warnings():
        for mechanism, count in spent:
            renyi.compose(mechanism.event(), count)
        found, best = renyi.get_epsilon_and_optimal_order(delta)
    return float(found), float(best)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """dp-accounting warns of each order whose series does not converge and leaves it out, which is sound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@kept(4096)
def _pld_epsilon(spent: tuple[tuple[Mechanism, int], ...], delta: float, interval: float) -> float:
    interval = max(interval, *(0.5 / mechanism.noise_multiplier**2 / _GRID for mechanism, _ in map(_merged, spent)))
    total = distribution.identity(value_discretization_interval=interval)
    for mechanism, count in map(_merged, spent):
        total = total.compose(one_round(mechanism, interval).self_compose(count))
    return float(total.get_epsilon_for_delta(delta))


def _merged(spent: tuple[Mechanism, int]) -> tuple[Mechanism, int]:
    """Rounds on all units are one Gaussian together: nothing to compose, and nothing rounded."""
    mechanism, count = spent
    if mechanism.sampler != "poisson" or mechanism.sampling_rate < 1:
        return spent
    return replace(mechanism, noise_multiplier=mechanism.noise_multiplier / math.sqrt(count)), 1


@kept(64)
def one_round(mechanism: Mechanism, interval: float) -> distribution.PrivacyLossDistribution:
    """What dp-accounting's PLD accountant builds for `Mechanism.event`; kept, because building it is slow."""
    if mechanism.sampler == "truncated_poisson":
        return distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=mechanism.units,
            sampling_probability=mechanism.sampling_rate,
            truncated_batch_size=mechanism.limit,
            noise_multiplier=mechanism.noise_multiplier,
            value_discretization_interval=interval,
            neighboring_relation=_ADD_OR_REMOVE,
        )
    return distribution.from_gaussian_mechanism(
        standard_deviation=mechanism.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=mechanism.sampling_rate,
        neighboring_relation=_ADD_OR_REMOVE,
    )


@kept(256)
def noise_multiplier(
    budget: Budget,
    sampling_rate: float,
    rounds: int,
    sampler: Sampler = "poisson",
    units: int | None = None,
    limit: int | None = None,
    accountant: Accountant = "pld",
) -> float:
    """The smallest noise multiplier (to 1e-4 relative) with which ``rounds`` rounds stay within ``budget``.

    Raises:
        BudgetError: no noise multiplier below 10,000 reaches the budget (code dp-unreachable); truncated sampling at
            a delta below `PLD_FLOOR` (code dp-delta).

    Cost: a few seconds; tens of seconds beyond 100,000 rounds, or where hardly any noise is needed.
    """
    if sampler == "truncated_poisson" and budget.delta < PLD_FLOOR:
        raise BudgetError(
            f"delta is {budget.delta:.3g}, and truncated Poisson sampling can be accounted down to {PLD_FLOOR:g}.",
            code="dp-delta",
            why="below that the accountant's own rounding is as large as delta, and its epsilon would be no bound",
            fix=f"choose a delta of at least {PLD_FLOOR:g}, or the sampler `poisson`",
        )

    def spent(sigma: float) -> tuple[tuple[Mechanism, int], ...]:
        return ((Mechanism(sigma, sampling_rate, sampler, units, limit), rounds),)

    def rough(sigma: float) -> float:
        by_renyi = accountant == "rdp" or budget.delta < PLD_FLOOR
        return cost(sigma) if by_renyi else _rough_epsilon(spent(sigma), budget.delta)

    def cost(sigma: float) -> float:
        return epsilon(spent(sigma), budget.delta, accountant)

    high = 1.0  # Renyi's answer for plain sampling is a start, and quick also where there is far too little noise
    while high <= _LARGEST_MULTIPLIER and (
        _renyi(((Mechanism(high, sampling_rate), rounds),), budget.delta, _FEW_ORDERS)[0] > budget.epsilon
    ):
        high *= 2
    while rough(high) > budget.epsilon:
        high *= 2
        if high > _LARGEST_MULTIPLIER:
            if cost(high) <= budget.epsilon:
                break
            raise BudgetError(
                f"epsilon {budget.epsilon} at delta {budget.delta:.3g} cannot be reached in {rounds} rounds at "
                f"sampling rate {sampling_rate:.4g}.",
                code="dp-unreachable",
                why="it would take more than 10,000 times the clip norm in noise, which leaves nothing to learn",
                fix="allow a larger epsilon or delta, or plan fewer rounds or a smaller lot",
            )
    low = high / 2
    while low > _SMALLEST_MULTIPLIER and rough(low) <= budget.epsilon:
        low, high = low / 2, low
    low, high = _narrow(rough, budget.epsilon, low, high)
    # The coarse grid errs upwards, so the answer on the fine one is at `high` or somewhat below.
    high, step = (high, 0.005) if cost(high) <= budget.epsilon else (high * 2, 0.5)
    low = high * (1 - step)
    while low > _SMALLEST_MULTIPLIER and cost(low) <= budget.epsilon:
        step = min(2 * step, 0.5)
        low, high = low * (1 - step), low
    return _narrow(cost, budget.epsilon, low, high)[1]


def needed_noise(budget: Budget, mechanism: Mechanism, rounds: int) -> float:
    """The noise multiplier that a run of so many such rounds needs, whatever that of ``mechanism`` is; a unit's turns
    are counted where it is in a block. See `noise_multiplier`."""
    own, turns = mechanism.for_one_unit(rounds)
    return noise_multiplier(budget, own.sampling_rate, turns, own.sampler, own.units, own.limit)


def _narrow(cost: Callable[[float], float], target: float, low: float, high: float) -> tuple[float, float]:
    """Shrink a bracket with cost(low) > target >= cost(high) to a relative width of `_TOLERANCE`.

    log epsilon is almost linear in log sigma: interpolate, then step just past the root to close the bracket.
    """
    while high / low > 1 + _TOLERANCE:
        guess = math.sqrt(low * high)
        if 0 < cost(high) < cost(low) < math.inf:
            slope = math.log(cost(high) / cost(low)) / math.log(high / low)
            line = high * math.exp(math.log(target / cost(high)) / slope)
            guess = line if low < line < high else guess
        if cost(guess) > target:
            low, trial = guess, min(guess * (1 + _TOLERANCE), math.sqrt(guess * high))
        else:
            high, trial = guess, max(guess / (1 + _TOLERANCE), math.sqrt(guess * low))
        low, high = (trial, high) if cost(trial) > target else (low, trial)
    return low, high


def joint_multiplier(parts: Mapping[str, tuple[float, float]]) -> float:
    """The noise multiplier of several noisy sums released in one round as the one Gaussian that they are.

    Dividing each part by its noise standard deviation gives unit noise everywhere, and one unit moves the whole by at
    most sqrt(sum_k (C_k / s_k)^2).

    Args:
        parts: for each part (C_k, s_k): the largest contribution of one unit, and the noise standard deviation.

    Returns:
        sigma = 1 / sqrt(sum_k (C_k / s_k)^2); 0 if some part has no noise.
    """
    if any(std <= 0 for norm, std in parts.values() if norm > 0):
        return 0.0
    total = sum((norm / std) ** 2 for norm, std in parts.values() if norm > 0)
    return math.inf if total == 0 else 1 / math.sqrt(total)


def joint_noise(
    sigma: float, norms: Mapping[str, float], shares: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Noise standard deviations that make several parts one Gaussian with noise multiplier ``sigma``.

    Args:
        sigma: what the accountant was given.
        norms: C_k of each part.
        shares: how much of 1 / sigma^2 each part uses; positive, scaled to sum to one. Default: equal shares.

    Returns:
        s_k = sigma C_k / sqrt(share_k), so that sum_k (C_k / s_k)^2 = 1 / sigma^2.
    """
    weights = dict.fromkeys(norms, 1.0) if shares is None else dict(shares)
    if set(weights) != set(norms) or any(not weight > 0 for weight in weights.values()):
        raise PrivacyError(
            f"the parts {sorted(norms)} need one positive share each, got {weights}.",
            code="dp-joint",
            why="a part without a share would be released without noise",
            fix="give every part a share above 0",
        )
    total = sum(weights.values())
    return {name: sigma * norm / math.sqrt(weights[name] / total) for name, norm in norms.items()}


def check_joint(sigma: float, parts: Mapping[str, tuple[float, float]]) -> None:
    """Make sure that what is about to be released together is no less noisy than what is accounted for.

    Raises:
        PrivacyError: the parts together have a smaller noise multiplier than ``sigma``.
    """
    actual = joint_multiplier(parts)
    if actual < sigma * (1 - 1e-9):
        raise PrivacyError(
            f"the parts {sorted(parts)} released together have noise multiplier {actual:.4f}, accounted was "
            f"{sigma:.4f}.",
            code="dp-joint",
            why="everything released in a round is one Gaussian; the parts' privacy losses add up",
            fix="give the parts more noise: sum over k of (C_k / s_k)^2 must stay within 1 / sigma^2",
        )
