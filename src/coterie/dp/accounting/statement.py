"""The final statement of a private run: what is promised, to whom, and what is not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.accounting.budget import Budget, Spent
from coterie.dp.accounting.digits import epsilon_digits
from coterie.dp.accounting.groups import group_epsilon
from coterie.dp.accounting.ledger import Ledger
from coterie.dp.accounting.lifetime import lifetime
from coterie.dp.accounting.run_entry import UNCHECKED
from coterie.dp.noise.pooled import PooledNoise


@dataclass(frozen=True)
class Statement:
    """Everything a reader needs to judge a run's privacy.

    Attributes:
        unit: record or user.
        relation: the neighbouring relation.
        units: N, which is public.
        sampler, sampling_rate, limit: how lots were drawn.
        noise_multiplier: sigma.
        clip_norm: C.
        rounds: releases so far, burned ones included.
        planned: releases fixed in advance.
        budget: what the run may spend.
        spent: what it spent, by the privacy loss distribution.
        renyi_epsilon: the same by Renyi accounting; None for truncated sampling, for which there is no bound.
        record: what one record is, in public words and numbers, as the caller said.
        clipping: the clipping policy.
        eta: the part by which rounding may exceed the clip norm; noise is calibrated to ``clip_norm * (1 + eta)``.
        isolation: ``exact``, or ``fast``: whether one record may move what others contribute by rounding.
        lifetime: what all private runs on some of the same text spent together, for this run's unit.
        counted: how many runs that figure counts, and by which rule.
        seeded_runs: runs on some of the same text that were not private and released something.
        revealed: runs that showed some of the text to others, so that no lifetime epsilon holds.
        copies: for groups of records, (size, epsilon) at the same delta.
        not_covered: what no number above speaks about.
        private: False for a seeded run: then none of the numbers is a promise.
        pooled: whose noise lies in all that others see of this party; None: its own alone, whole.
        against: where it is several parties', (k, spent) against any k of the others who pool what they know.
        fewer: where it is several parties', (parties, rounds) of rounds to which not all of them contributed.
        trained: what of the model is, where the run said so: everything else is as it was before.
        bands: over how many rounds noise hangs together (`coterie.dp.noise.bands`); the sampling rate is then that of
            a unit in its block's turn. 1: noise is independent.
    """

    unit: str
    relation: str
    units: int
    sampler: str
    sampling_rate: float
    limit: int | None
    noise_multiplier: float
    clip_norm: float
    record: dict[str, Any]
    clipping: str | None
    eta: float | None
    isolation: str
    rounds: int
    planned: int
    budget: Budget
    spent: Spent
    renyi_epsilon: float | None
    lifetime: Spent
    counted: tuple[str, ...]
    seeded_runs: tuple[str, ...]
    copies: tuple[tuple[int, float], ...]
    not_covered: tuple[str, ...]
    private: bool
    ledger: str
    run: str
    revealed: tuple[str, ...] = ()
    pooled: PooledNoise | None = None
    against: tuple[tuple[int, Spent], ...] = ()
    bands: int = 1
    fewer: tuple[tuple[int, int], ...] = ()
    trained: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values; infinite epsilons become None."""
        data = asdict(self)
        for spent in (data["spent"], data["lifetime"], *(spent for _, spent in data["against"])):
            spent["epsilon"] = _finite(spent["epsilon"])
        data["against"] = [list(pair) for pair in data["against"]]
        data["fewer"] = [list(pair) for pair in self.fewer]
        data["copies"] = [[size, _finite(eps)] for size, eps in self.copies]
        return data

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Statement:
        """What `to_json` gave."""
        several = ("counted", "seeded_runs", "not_covered", "revealed")
        return cls(
            **{
                **values,
                **{name: tuple(values[name]) for name in several},
                "budget": Budget(**values["budget"]),
                "spent": _spent(values["spent"]),
                "lifetime": _spent(values["lifetime"]),
                "copies": tuple((size, _or_infinite(eps)) for size, eps in values["copies"]),
                "pooled": PooledNoise.from_json(values["pooled"]),
                "against": tuple((others, _spent(spent)) for others, spent in values["against"]),
                "fewer": tuple((parties, rounds) for parties, rounds in values["fewer"]),
            }
        )

    def __str__(self) -> str:
        sampling = f"{self.sampler.replace('_', ' ')} sampling at rate {self.sampling_rate:.5g}"
        if self.limit is not None:
            sampling += f", lots of at most {self.limit}"
        if self.bands > 1:
            sampling += f" in every {self.bands}th round, the turn of the unit's block"
        lines = ["PRIVACY STATEMENT"]
        if not self.private:
            lines += [
                "  NOT PRIVATE: lots and noise came from a seed. The numbers below describe the same run with",
                "  secret randomness; what this run produced must not be released.",
            ]
        lines += [
            f"  protected unit   one {self.unit}; neighbouring datasets differ by {self.relation}{self._record()}",
            *self._documents(),
            *([] if self.trained is None else [f"  trained          {self.trained}"]),
            f"  this run         {self.spent} ({self.rounds} of {self.planned} rounds; budget "
            f"epsilon {self.budget.epsilon:g} at delta {self.budget.delta:.3g})",
            *self._pooled(),
            f"  lifetime         {self.lifetime}, for this unit by all runs on some of this text, failed ones too",
            *(f"  counted          {line}" for line in self.counted),
            f"  accountant       privacy loss distribution (dp-accounting){self._beside()}",
            f"  mechanism        discrete Gaussian, noise multiplier {self.noise_multiplier:.4f}, clip norm "
            f"{self.clip_norm:g}{self._clipping()}, isolation {self.isolation}; {sampling}; "
            f"N = {self.units} {self.unit}s, which is public",
            *self._bands(),
        ]
        grown = [f"{size} copies epsilon {_shown(eps)}" for size, eps in self.copies]
        if grown:
            lines.append(f"  groups           {', '.join(grown)} (same delta)")
        if self.seeded_runs:
            lines.append(
                f"  also ran         {len(self.seeded_runs)} seeded run(s) on some of this text, not private: if "
                "anything they produced was released, no epsilon holds"
            )
        if self.revealed:
            lines.append(
                f"  also revealed    {', '.join(self.revealed)}: hosts of those runs could read some of this "
                "text; no epsilon holds against them"
            )
        lines.append("  not covered")
        lines += [f"    - {line}" for line in self.not_covered]
        lines.append(f"  ledger           {self.ledger}, run {self.run}")
        return "\n".join(lines)

    def _documents(self) -> list[str]:
        """Where documents are cut: what a longer one is promised, by length, as how long they are is not public."""
        length = self.record.get("sequence_length")
        if self.unit != "record" or self.record.get("packing") != "chunks" or not isinstance(length, int):
            return []
        longer = [f"of up to {size * length} tokens epsilon {_shown(eps)}" for size, eps in self.copies]
        figures = f": {', '.join(longer)} (same delta); longer ones more" if longer else ""
        return [f"  a document       of more than {length} tokens is several records, and protected less{figures}"]

    def _pooled(self) -> list[str]:
        """What the noise of several parties changes; nothing where others see this party's alone."""
        pooled = self.pooled
        if pooled is None:
            return []
        if pooled.colluding is None:
            ((_, spent),) = self.against
            return [
                f"  one other party  {spent}, against any one of the others alone, and outsiders: pushes are masked, "
                f"and each sum holds the noise of {pooled.parties - 1} parties that it does not know. Against all "
                "others together, or parties whose noise is known to others, the line above holds",
                *self._fewer("that line counts these with the noise that they had"),
            ]
        lines = [
            f"  holds against    any {pooled.colluding} of the {pooled.parties - 1} other parties together, and "
            "outsiders: pushes are masked, and the noise is the sum of all parties' shares. Parties whose noise is "
            "missing or known to others count among them; the lifetime counts this run so, too",
        ]
        for others, spent in self.against:
            who = "all others" if others == pooled.parties - 1 else f"any {others} of them"
            lines.append(f"  if more collude  {spent}, if {who} pool what they know")
        return lines + self._fewer("each added a larger share, so that the promise is the same")

    def _fewer(self, what_holds: str) -> list[str]:
        """Rounds to which some parties did not contribute, because their budgets were spent."""
        if self.pooled is None or not self.fewer:
            return []
        rounds = ", ".join(f"{parties} in {count} round{'s' * (count > 1)}" for parties, count in self.fewer)
        return [
            f"  fewer parties    of {self.pooled.parties} contributed {rounds}, as the others' budgets were spent; "
            f"{what_holds}"
        ]

    def _bands(self) -> list[str]:
        """How noise hangs together, where it does."""
        if self.bands == 1:
            return []
        return [
            f"  noise in bands   each round's noise takes back part of the noise of up to {self.bands - 1} rounds "
            f"before it (BandMF, columns of norm 1). {self.unit.capitalize()}s are in {self.bands} blocks, by their "
            "numbers alone, and each block has its turn; groups may be in several, so their figures are looser"
        ]

    def _record(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in sorted(self.record.items()))
        return f"; one record: {facts}" if facts else "; one record is one item of the dataset"

    def _clipping(self) -> str:
        policy = f" ({self.clipping})" if self.clipping else ""
        return policy + (f", exceeded by rounding by at most {self.eta:.2g} of it" if self.eta is not None else "")

    def _beside(self) -> str:
        if self.renyi_epsilon is None:
            return "; no Renyi bound is known for truncated sampling"
        return f"; by Renyi divergences {_shown(self.renyi_epsilon)}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _spent(values: Mapping[str, Any]) -> Spent:
    return Spent(_or_infinite(values["epsilon"]), values["delta"])


def _shown(value: float) -> str:
    return epsilon_digits(value) if math.isfinite(value) else "unbounded"


def make_statement(
    ledger: Ledger,
    run: str,
    budget: Budget,
    clip_norm: float,
    not_covered: Sequence[str],
    groups: Sequence[int] = (2, 4),
) -> Statement:
    """The statement of a run, from what the ledger holds.

    Args:
        ledger: of the dataset.
        run: its identifier.
        budget: what the run was planned for; its delta is used throughout.
        clip_norm: C.
        not_covered: lines about this run's own gaps (provenance, what was left out).
        groups: group sizes to give an epsilon for.
    """
    facts = ledger.run(run)
    mechanism = Mechanism.from_json(facts["mechanism"])
    releases = ledger.releases(run)
    rounds = len(releases)
    private = not facts.get("seeded")
    events = [(mechanism, rounds)]
    pooled = PooledNoise.from_json(facts.get("pooled"))
    laws = Counter(released.pooled or pooled for released in releases)
    unit = facts.get("unit", "record")
    unchecked = () if facts.get("self_check") else (UNCHECKED,)
    overall = lifetime(ledger, run, budget.delta)
    renyi = None if mechanism.sampler == "truncated_poisson" else epsilon(events, budget.delta, "rdp")
    return Statement(
        unit=unit,
        relation=_relation(unit, mechanism.bands),
        units=int(facts["units"]),
        sampler=mechanism.sampler,
        sampling_rate=mechanism.sampling_rate,
        limit=mechanism.limit,
        noise_multiplier=mechanism.noise_multiplier,
        clip_norm=clip_norm,
        record=dict(facts.get("record") or {}),
        clipping=facts.get("clipping"),
        eta=facts.get("eta"),
        isolation=facts.get("isolation", "fast"),
        rounds=rounds,
        planned=int(facts["rounds"]),
        budget=budget,
        spent=Spent(epsilon(events, budget.delta), budget.delta),
        renyi_epsilon=renyi,
        lifetime=overall.spent,
        counted=overall.lines,
        seeded_runs=overall.seeded,
        revealed=overall.revealed,
        copies=tuple((size, group_epsilon(events, budget.delta, size)) for size in groups) if rounds else (),
        not_covered=tuple(
            dict.fromkeys((*_always_outside(unit), *_between_records(facts), *not_covered, *unchecked))
        ),
        private=private,
        pooled=pooled,
        against=tuple(_against(mechanism, pooled, laws, budget.delta)),
        fewer=tuple((law.parties, count) for law, count in laws.items() if law is not None and law != pooled),
        bands=mechanism.bands,
        trained=facts.get("trained"),
        ledger=ledger.public_name(),
        run=run,
    )


def _against(
    mechanism: Mechanism, pooled: PooledNoise | None, laws: Mapping[PooledNoise | None, int], delta: float
) -> list[tuple[int, Spent]]:
    """What others learn who add up all parties' noise and know some of it: (how many pool it, spent).

    Args:
        mechanism: of a round.
        pooled: whose noise was agreed on.
        laws: in how many rounds whose noise it was.
        delta: of the budget.
    """
    if pooled is None:
        return []

    def unknown(law: PooledNoise, others: int) -> Mechanism:
        return replace(mechanism, noise_multiplier=mechanism.noise_multiplier * law.unknown(others))

    found = []
    for others in pooled.worth_saying:
        events = [(unknown(law, others), count) for law, count in laws.items() if law is not None]
        found.append((others, Spent(epsilon(events, delta), delta)))
    return found


def _relation(unit: str, bands: int) -> str:
    """Which data sets are neighbours."""
    what = f"adding or removing one {unit}" + (" with all its records" if unit == "user" else "")
    return what if bands == 1 else f"{what}, whose number stays empty: all others keep theirs"


def _always_outside(unit: str) -> tuple[str, ...]:
    same = (
        "the same text under several users"
        if unit == "user"
        else "copies of a record, and several records of one person"
    )
    return (
        f"{same}: see groups above; the promise weakens with their number",
        "persons whose records are at several parties: their parties' promises add up",
        "text that was changed, or cut into other documents, between two runs: it is not known again as the same",
        "how long rounds take, which depends on the lots",
        "evaluations, losses and other figures computed on private records without noise, if you show them",
    )


def _between_records(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What `isolation: fast` leaves open; nothing for ``exact``."""
    if facts.get("isolation") == "exact":
        return ()
    if facts.get("half_precision"):
        return (
            "rounding in shared batches (isolation: fast, in half precision): one record moves what others "
            "contribute by 0.05 to 0.25 C at 8 records a batch (measured, without any attack), which the noise "
            "does not pay for; isolation: exact has none of it",
        )
    return (
        "rounding in shared batches (isolation: fast): one record moves what others contribute by last bits "
        "(measured: 5e-6 C in float32), and by several C under weights that somebody made for that (2.7 to 3.9 C "
        "constructed); isolation: exact has none of it",
    )
