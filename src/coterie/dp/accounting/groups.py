"""What several units of a run are worth for one person or one text: groups, and contributions that are replaced.

A figure speaks of one unit, a record or a user. Another run on the same text may hold it as something else: as
several records of its own, or as a part of what one of its users contributes. `Share` says as what, `joint_epsilon`
adds up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as distribution
from scipy.special import ndtr

from coterie.dp.accounting.accountant import PLD_FLOOR, Accountant, Mechanism, epsilon, one_round
from coterie.dp.accounting.kept import kept

LARGEST_GROUP = 64
"""Beyond this many units the bound counts as infinite: it would be useless, and slow to compute."""

_INTERVAL = 1e-2
_LEAST_DELTA = 1e-30
_LARGEST_EXPONENT = 600.0
_NEGLIGIBLE = 1e-22
_LARGEST_MOVE = 50.0
_LARGEST_REPLACED = 25.0
"""Of what is replaced: beyond it the powers of e in `_replaced_delta` leave the range of floating-point numbers."""


@dataclass(frozen=True)
class Share:
    """What one run means for the unit that a figure speaks of.

    Attributes:
        mechanism, count: of the run; releases so far.
        size: how many of the run's own units go when that unit goes; above `LARGEST_GROUP`: no bound.
        replaced: they do not go, other contributions take their place: a record that is taken out of its user's text
            moves the sum by up to two clip norms.
        apart: the group's units may be in different blocks (`Mechanism.bands`), so that what they move overlaps.
    """

    mechanism: Mechanism
    count: int
    size: float = 1
    replaced: bool = False
    apart: bool = False

    def of_one_unit(self) -> Share:
        """The same in turns that one unit has; see `Mechanism.for_one_unit`."""
        mechanism, turns = self.mechanism.for_one_unit(self.count)
        apart = self.apart or (self.mechanism.bands > 1 and self.size > 1)
        return replace(self, mechanism=mechanism, count=turns, apart=apart)

    @property
    def loose(self) -> bool:
        """Whether only the general bound of group privacy is known."""
        return self.size > 1 and (self.apart or self.mechanism.sampler != "poisson")


def group_epsilon(spent: Iterable[tuple[Mechanism, int]], delta: float, size: int) -> float:
    """Epsilon at ``delta`` for ``size`` units added or removed together: copies of a text, or a person's records.

    Returns:
        Infinity where the bound says nothing.

    Cost: about a second for a group of 4.
    """
    return joint_epsilon([Share(mechanism, count, size) for mechanism, count in spent], delta)


def joint_epsilon(shares: Iterable[Share], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon at ``delta`` of several runs together, for one unit that each of them holds in its own way.

    How many members of a group join a lot is binomial, so a round is a mixture of Gaussians whose means are that
    number of clip norms (Ganesh 2024, arXiv:2401.10294): for Poisson sampling this is tight, and composes. For what
    is replaced see `_replaced_round`. Where neither applies (truncated sampling, groups over several blocks, Renyi, a
    delta below `PLD_FLOOR`) the general bounds of group privacy stand in, which are loose.

    Returns:
        Infinity where the bound says nothing.
    """
    held = [share.of_one_unit() for share in shares if share.count]
    if any(share.size > LARGEST_GROUP for share in held):
        return math.inf
    plain = all(share.size == 1 and not share.replaced for share in held)
    if plain:
        return epsilon([(share.mechanism, share.count) for share in held], delta, accountant)
    if any(_move(share) > (_LARGEST_REPLACED if share.replaced else _LARGEST_MOVE) for share in held):
        return math.inf  # it would be above a thousand, on a grid that takes long
    general = any(share.loose or (share.mechanism.sampler != "poisson" and share.replaced) for share in held)
    if general or accountant == "rdp" or delta < PLD_FLOOR:
        return _by_steps(held, delta, accountant)
    return _composed(tuple(sorted(held, key=repr)), delta)


def _move(share: Share) -> float:
    """How far one round can move, in standard deviations of its noise; infinite without noise."""
    noise_multiplier = share.mechanism.noise_multiplier
    return share.size * (2 if share.replaced else 1) / noise_multiplier if noise_multiplier > 0 else math.inf


@kept(1024)
def _composed(shares: tuple[Share, ...], delta: float) -> float:
    total = distribution.identity(value_discretization_interval=_INTERVAL)
    for share in shares:
        size = int(share.size)
        if share.replaced:
            one = _replaced_round(share.mechanism, size)
        else:
            one = one_round(share.mechanism, _INTERVAL) if size == 1 else _group_round(share.mechanism, size)
        total = total.compose(one.self_compose(share.count))
    return float(total.get_epsilon_for_delta(delta))


@kept(64)
def _group_round(mechanism: Mechanism, size: int) -> distribution.PrivacyLossDistribution:
    rate = mechanism.sampling_rate
    return distribution.from_mixture_gaussian_mechanism(
        standard_deviation=mechanism.noise_multiplier,
        sensitivities=[float(count) for count in range(size + 1)],
        sampling_probs=[math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(size + 1)],
        value_discretization_interval=_INTERVAL,
    )


@kept(64)
def _replaced_round(mechanism: Mechanism, size: int) -> distribution.PrivacyLossDistribution:
    """One round in which ``size`` units contribute something else, each of norm at most one before and after.

    Whether any of them joins has the same probability p = 1 - (1 - q)^size before and after. Given that none does,
    the two sums are equally distributed (R); given that one does they are G and G', at most ``size`` clip norms from
    R and twice that from each other. By advanced joint convexity (Balle, Barthe and Gaboardi 2018,
    arXiv:1807.01647), with a = 1 + (e^x - 1) / p and b = e^x / a, the divergence at x >= 0 is at most
    p ((1 - b) H_a(G, R) + b H_a(G, G')). The same holds the other way round, which gives x < 0.
    """
    joins = _joins(mechanism, size)
    move = size / mechanism.noise_multiplier
    last = 1
    while _replaced_delta(np.array([last * _INTERVAL]), joins, move)[0] > _NEGLIGIBLE:
        last *= 2
    x = np.arange(last + 1) * _INTERVAL
    above = _replaced_delta(x, joins, move)
    below = (np.exp(-x) * above - np.expm1(-x))[:0:-1]
    deltas = np.clip(np.concatenate([below, above]), 0.0, 1.0)
    return distribution.PrivacyLossDistribution(
        pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(_INTERVAL, -last, last, deltas)
    )


def _replaced_delta(x: np.ndarray, joins: float, move: float) -> np.ndarray:
    a = 1 + np.expm1(x) / joins
    b = np.exp(x) / a
    found: np.ndarray = joins * ((1 - b) * _gaussian_delta(a, move) + b * _gaussian_delta(a, 2 * move))
    return found


def _gaussian_delta(a: np.ndarray, move: float) -> np.ndarray:
    """Hockey-stick divergence of order ``a`` between unit Gaussians that are ``move`` apart (Balle and Wang 2018)."""
    at = np.log(a) / move
    found: np.ndarray = np.maximum(ndtr(move / 2 - at) - a * ndtr(-move / 2 - at), 0.0)
    return found


def _joins(mechanism: Mechanism, size: int) -> float:
    """The probability with which at least one of a group joins a lot."""
    rate = mechanism.sampling_rate
    return -math.expm1(size * math.log1p(-rate)) if rate < 1 else 1.0


def _by_steps(shares: Sequence[Share], delta: float, accountant: Accountant) -> float:
    """What is replaced goes first, then comes: P <= e^a R + d and R <= e^b Q + d' give P <= e^(a+b) Q + d + e^a
    d'."""
    coming = [share for share in shares if share.replaced]
    if not coming:
        return _leaving(shares, delta, accountant)
    step = delta
    while step > _LEAST_DELTA:
        step *= 0.5
        first, second = (_leaving(part, step, accountant) for part in (shares, coming))
        if max(first, second) > _LARGEST_EXPONENT:
            return math.inf
        grown = step * (1 + math.exp(max(first, second)))
        if grown <= delta:
            return first + second
        step *= min(1.0, 2 * delta / grown)
    return math.inf


def _leaving(shares: Sequence[Share], delta: float, accountant: Accountant) -> float:
    """Epsilon where every share's units go."""
    loose = [share for share in shares if share.loose]
    rest = [share for share in shares if share not in loose]
    part = delta / (len(loose) + bool(rest))
    total = sum(_general([(s.mechanism, s.count)], part, int(s.size)) for s in loose)
    if not rest:
        return total
    if accountant == "pld" and part >= PLD_FLOOR:
        return total + joint_epsilon([Share(s.mechanism, s.count, s.size) for s in rest], part)
    together = epsilon([(_as_one(s.mechanism, int(s.size)), s.count) for s in rest], part, accountant)
    apart = sum(_general([(s.mechanism, s.count)], part / len(rest), int(s.size)) for s in rest)
    return total + min(together, apart)


def _as_one(mechanism: Mechanism, size: int) -> Mechanism:
    """One unit that costs no less than a group of ``size``: it joins when any member does, with all contributions.

    A round on the group is a mixture of rounds in which, when any member joins, the mean moves by 1 to ``size`` clip
    norms; Renyi and hockey-stick divergences are convex in the mixture and grow with the move.
    """
    return mechanism if size == 1 else Mechanism(mechanism.noise_multiplier / size, _joins(mechanism, size))


def _general(events: list[tuple[Mechanism, int]], delta: float, size: int) -> float:
    """k e for k units, from (e, d) for one, with d such that d (exp(k e) - 1) / (exp(e) - 1) is at most ``delta``."""
    one_delta = delta
    while one_delta > _LEAST_DELTA:
        one = epsilon(events, one_delta)
        if not math.isfinite(one) or size * one > _LARGEST_EXPONENT:
            return math.inf
        grown = one_delta * (math.expm1(size * one) / math.expm1(one) if one > 0 else size)
        if grown <= delta:
            return size * one
        one_delta *= min(0.5, delta / grown)
    return math.inf
