"""The premises of the accounting, measured at the claim that the run really makes.

The accountant takes for granted that noise is what the ledger says, that lots are drawn as it says, and that no
record adds more than the clip norm. Whoever computes the rounds can look at each of these directly, and sees in
seconds what canaries in a trained model would not show in hours: a bug stands out by hundreds of standard errors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import stats

from coterie.audit.epsilon import checks
from coterie.audit.epsilon.canaries import Alternating, CanaryFamily, Ids, RandomIds, Repeated, ids_of, sequences
from coterie.audit.epsilon.checks import Seen
from coterie.audit.epsilon.findings import CONFIDENCE, ClaimVerdict, Premise
from coterie.audit.epsilon.laws import NoiseLaw, law_of
from coterie.audit.epsilon.rehearsal import Rehearsal
from coterie.audit.epsilon.subject import Subject
from coterie.dp.accounting.accountant import epsilon
from coterie.dp.accounting.lots import Lot
from coterie.dp.noise.bands import block_of
from coterie.dp.plan import PrivacyPlan

ROUNDS = 3
DRAWS = 200
_MOST_DRAWN = 1 << 24
"""Coins, in all draws together."""

_ROUNDING = 1e-6
"""Of adding up a norm, as a share of it."""

_TOGETHER = 1e-3
"""As much may the rounding of the others' contributions move beside one record in a batch (docs/threat-model.md)."""

_OTHER_ACCOUNTANT = 1.01
"""Epsilon of one mechanism by two versions of an accountant."""

_EACH_KIND, _SHORT, _COMPANY = 4, 16, 3


@dataclass(frozen=True)
class MeasuredPremises:
    """What the premises say of the run's epsilon.

    Attributes:
        premises: in the order of the report.
        contribution: the largest that was found, over C.
        noise: standard deviation over the claimed one, at the upper end of its 99.9 % interval.
    """

    premises: tuple[Premise, ...]
    contribution: float
    noise: float

    def epsilon(self, subject: Subject) -> float:
        """What such noise and such a record cost over the run; infinite without noise."""
        claim = subject.claim
        sigma = claim.mechanism.noise_multiplier * self.noise / max(self.contribution, 1e-9)
        return epsilon([(replace(claim.mechanism, noise_multiplier=sigma), claim.rounds)], claim.delta)


def measure(subject: Subject, *, seed: int | None = None, budget_s: float = 12.0) -> MeasuredPremises:
    """Measure every premise.

    Args:
        subject: the run.
        seed: for tests; None: the operating system's randomness.
        budget_s: about how long; lots are cut to what it allows. At least one record of each kind is probed.
    """
    began = time.monotonic()
    plan = replace(subject.plan, seed=seed)
    rehearsal = Rehearsal(subject.model, subject.data(), plan, subject.options)
    law = law_of(subject.claim, rehearsal)
    chance = np.random.default_rng(rehearsal.opened.source.stream("probes").integer(64))
    contributions = list(_contributions(subject, plan, law, chance, began + 0.6 * budget_s))
    seconds = (time.monotonic() - began) / (len(contributions) * 2 * _EACH_KIND)
    looks = _lots(rehearsal)
    most = max(1, int((began + budget_s - time.monotonic()) / (seconds * ROUNDS)))
    noise = _noise(rehearsal, law, most)
    level = (1 - CONFIDENCE) / len([*looks, *noise])
    upper = 1 + float(stats.norm.isf(1 - CONFIDENCE)) * noise[0].seen.error / max(noise[0].seen.value, 1e-9)
    return MeasuredPremises(
        (_named(subject), *(look.judged(level) for look in (*noise, *looks)), *contributions),
        max(each.value for each in contributions),
        noise[0].seen.value * upper,
    )


class _Look(NamedTuple):
    """One statistic, before its verdict."""

    name: str
    expected: float
    seen: Seen
    sentence: str

    def judged(self, level: float) -> Premise:
        verdict = ClaimVerdict.ALARM if self.seen.chance < level else ClaimVerdict.CONSISTENT
        return Premise(
            self.name, self.seen.value, self.expected, self.seen.error, self.seen.chance, verdict, self.sentence
        )


def _named(subject: Subject) -> Premise:
    """What the ledger names costs no more than it claims."""
    claim = subject.claim
    spends = claim.spends()
    wrong = claim.seeded or not spends <= claim.epsilon * _OTHER_ACCOUNTANT
    source = (
        "the run's entry in the ledger" if claim.recorded else "the settings (the ledger has no entry of such a run)"
    )
    sentence = (
        f"{source[0].upper()}{source[1:]}: noise multiplier {claim.mechanism.noise_multiplier:.4g}, sampling rate "
        f"{claim.mechanism.sampling_rate:.4g}, {claim.rounds} rounds; that costs epsilon {spends:.4g}."
    )
    if claim.mechanism.bands > 1:
        sentence += f" Noise hangs together over {claim.mechanism.bands} rounds, and each record has every so many."
    if claim.pooled is not None and claim.pooled.colluding is not None:
        sentence += (
            f" This party adds {claim.own_noise:.4g} of it: the rest comes from others, of whom any "
            f"{claim.pooled.colluding} may know theirs."
        )
    if claim.seeded:
        sentence += " It took its randomness from a seed, and is not private."
    verdict = ClaimVerdict.ALARM if wrong else ClaimVerdict.CONSISTENT
    return Premise("epsilon of the mechanism", spends, claim.epsilon, 0.0, None, verdict, sentence)


# ---- noise ----


def _noise(rehearsal: Rehearsal, law: NoiseLaw, most: int) -> list[_Look]:
    """Rounds with lots of at most so many records, the first with none."""
    noises = []
    computed = []
    bands = rehearsal.opened.lots.bands
    for number in range(1, max(ROUNDS, bands + 1) + 1):  # in bands, until every coefficient was used
        lot = rehearsal.draw(DRAWS + number)
        count = min(most, len(lot)) if 1 < number <= ROUNDS else 0
        noises.append(rehearsal.round(number, Lot(number, lot.records[:count], lot.units[:count])).noise())
        computed.append(count)
    residuals = law.residuals(noises)
    values = sum(value.numel() for value in residuals[0].values())
    of = f"{values:,} values a round, lots of {', '.join(map(str, computed))} records"
    whole, worst, shape, within, between = (
        check(residuals)
        for check in (checks.spread, checks.worst_spread, checks.shape, checks.within_rounds, checks.between_rounds)
    )
    return [
        _Look("noise", 1.0, whole, f"{_figure(whole)} times the claimed standard deviation ({of})."),
        _Look(
            "noise of every tensor", 1.0, worst, f"The tensor furthest off has {_figure(worst)} times the claimed."
        ),
        _Look("shape of the noise", 0.0, shape, f"Furthest from the Gaussian's distribution: {shape.value:.2g}."),
        _Look("noise within a round", 0.0, within, f"Largest correlation of a round with itself: {_small(within)}."),
        _Look("noise between rounds", 0.0, between, f"Largest correlation of two rounds: {_small(between)}."),
    ]


def _figure(seen: Seen) -> str:
    return f"{seen.value:.5f} +- {seen.error:.5f}"


def _small(seen: Seen) -> str:
    return f"{seen.value:.2g} (one standard error: {seen.error:.2g})"


# ---- lots ----


def _lots(rehearsal: Rehearsal) -> list[_Look]:
    """Draw many lots, and compute none of them."""
    units, lots = rehearsal.data.units, rehearsal.opened.lots
    bands = lots.bands
    draws = max(2, min(DRAWS, _MOST_DRAWN // units.count) // bands)  # of each block
    unit_of = np.arange(units.records)
    if units.order is not None and units.starts is not None:
        unit_of[units.order] = np.repeat(np.arange(units.count), np.diff(units.starts))
    block, out_of_turn = block_of(units.count, bands), 0
    included = np.zeros((draws, units.count), bool)
    for turn in range(draws * bands):
        drawn = np.unique(unit_of[rehearsal.draw(turn + 1).records])
        included[turn // bands, drawn] = True
        out_of_turn += int(np.count_nonzero(block[drawn] != turn % bands))
    sentences = {
        "rate": ("a record's inclusion in lots", lots.rate, "Of {draws} lots, a record was in {value:.4f} of them; "
                 "claimed: {expected:.4f}."),
        "sizes": ("sizes of lots", 1.0, "Lots vary in size {value:.3f} times as much as coins make them."),
        "units": ("each record's inclusion", 1.0, "Records differ in how often they were drawn {value:.3f} times as "
                  "much as coins make them."),
    }  # fmt: skip
    looks = []
    for key, seen in checks.inclusion(included, lots.rate, lots.max_lot):
        name, expected, sentence = sentences[key]
        told = sentence.format(draws=draws, value=seen.value, expected=expected)
        looks.append(_Look(name, expected, seen, told))
    if bands > 1:
        seen = Seen(float(out_of_turn), 0.0, 0.0 if out_of_turn else 1.0)
        told = f"Of {draws * bands} lots, {out_of_turn} records were drawn when it was not their block's turn."
        looks.append(_Look("turns of blocks", 0.0, seen, told))
    return looks


# ---- contributions ----


def _contributions(
    subject: Subject, plan: PrivacyPlan, law: NoiseLaw, chance: np.random.Generator, until: float
) -> Iterator[Premise]:
    """What single records, or users, add to the sums: alone, and beside others."""
    kinds = _kinds(subject, chance)
    own = subject.records.users is not None
    each = min(plan.records_per_user, subject.options.physical_batch + 1) if own else 1
    company = [ids_of(subject.records, int(row)) for row in chance.integers(0, len(subject.records), _COMPANY)]
    probes = [ids for records in kinds.values() for ids in records]
    records = sequences(
        [ids for ids in (*probes, *company) for _ in range(each)], subject.records,
        [f"probe {number}" for number in range(len(probes) + _COMPANY) for _ in range(each)] if own else None,
    )  # fmt: skip
    alone = replace(
        plan,
        lot_size=1,
        sampler="poisson",
        max_lot=None,
        bands=None,
        noise_multiplier=subject.claim.mechanism.noise_multiplier,
    )
    rehearsal = Rehearsal(subject.model, subject.data(records), alone, subject.options)
    others = _lot(range(len(probes), len(probes) + _COMPANY), each)
    without = rehearsal.sums(1, others)
    first = 0
    for kind, members in kinds.items():
        found: list[float] = []
        for number in range(first, first + len(members)):
            if found and time.monotonic() > until:
                break
            found.append(law.contribution(rehearsal.sums(1, _lot([number], each))))
        furthest = first + int(np.argmax(found))
        beside = rehearsal.sums(1, _lot([furthest, *range(len(probes), len(probes) + _COMPANY)], each))
        together = law.contribution({name: value - without[name] for name, value in beside.items()})
        first += len(members)
        yield _contribution(kind, found, together, law)


def _lot(units: Iterable[int], each: int) -> Lot:
    """A lot of these units, which have so many records each."""
    of = np.array([unit for unit in units for _ in range(each)], np.int64)
    records = of * each + np.tile(np.arange(each), len(of) // each)
    return Lot(1, records, np.unique(of, return_inverse=True)[1].astype(np.int64))


def _kinds(subject: Subject, chance: np.random.Generator) -> dict[str, list[Ids]]:
    """Probing records by kind."""
    records, longest = subject.records, max(2, subject.longest)
    lengths = records.lengths.numpy()
    ordinary = chance.choice(len(records), min(_EACH_KIND, len(records)), replace=False)
    made: tuple[CanaryFamily, ...] = (Alternating(), RandomIds(), Repeated())
    kinds = {"ordinary text": [ids_of(records, int(row)) for row in ordinary]}
    for family in made:
        half = _EACH_KIND // 2
        kinds[family.name] = [
            ids
            for length in (longest, max(2, min(_SHORT, longest)))
            for ids in family.make(half, subject.vocabulary, length, chance)
        ]
    kinds["shortest record"] = [ids_of(records, int(lengths.argmin()))]
    kinds["longest record"] = [ids_of(records, int(lengths.argmax()))]
    return kinds


def _contribution(kind: str, alone: list[float], together: float, law: NoiseLaw) -> Premise:
    value = max(*alone, together)
    wrong = max(alone) > (1 + law.slack) * (1 + _ROUNDING) or together > (1 + law.slack) * (1 + _TOGETHER)
    sentence = (
        f"The furthest of {len(alone)} added {max(alone):.5f} times the clip norm alone and {together:.5f} times "
        f"beside others."
    )
    verdict = ClaimVerdict.ALARM if wrong or not math.isfinite(value) else ClaimVerdict.CONSISTENT
    return Premise(f"contribution: {kind}", value, 1.0, 0.0, None, verdict, sentence)
