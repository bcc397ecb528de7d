"""Which records each round uses: Poisson lots, drawn in secret.

Every unit (a record, or a user with all its records) joins a lot independently with probability q, so a lot's size
varies and a lot can be empty. That is what the accountant assumes: cutting a shuffled dataset into equal batches
would not have the privacy it computes. Truncated Poisson sampling bounds the lot's size for hardware that needs it,
at the price of its own, slightly worse event.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coterie.dp.accounting.accountant import Mechanism, Sampler
from coterie.dp.accounting.users import user_ids
from coterie.dp.noise.bands import block_of
from coterie.dp.noise.randomness import RandomSource
from coterie.dp.numbers import checked_number
from coterie.errors import BudgetError, DataError, PrivacyError

_TRUNCATION_DEVIATIONS = 6.0


@dataclass(frozen=True)
class Lot:
    """The records of one round. Secret: which records are in a lot is part of the mechanism's randomness.

    Attributes:
        round: the round it was drawn for, from 1.
        records: [n] int64 indices into the dataset, records of one unit next to each other.
        units: [n] int64, for each record the unit it belongs to, numbered from 0 within the lot.
    """

    round: int
    records: np.ndarray
    units: np.ndarray

    def __len__(self) -> int:
        return int(self.records.shape[0])

    @property
    def num_units(self) -> int:
        return int(self.units[-1]) + 1 if len(self) else 0

    def physical_batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(records, units) of at most ``size`` records each; a unit may span several."""
        for start in range(0, len(self), size):
            yield self.records[start : start + size], self.units[start : start + size]

    def share(self, rank: int, world: int) -> Lot:
        """One rank's part: whole units, dealt in turn, so that the parts differ by one unit at most."""
        own = self.units % world == rank
        return Lot(self.round, self.records[own], self.units[own] // world)

    def to_json(self) -> dict[str, Any]:
        return {"round": self.round, "records": self.records.tolist(), "units": self.units.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Lot:
        """What `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: it is something else.
        """
        records, units = (_indices(data[name]) for name in ("records", "units"))
        if records.size != units.size:
            raise ValueError("records and units do not pair up")
        return cls(int(data["round"]), records, units)


def _indices(values: object) -> np.ndarray:
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError("no list of indices")
    return np.array(values, np.int64)


@dataclass(frozen=True)
class LotPlan:
    """How lots are drawn, in public numbers.

    Attributes:
        units: N, records or users.
        lot_size: N q, the lot size that noisy sums are divided by.
        sampler: poisson, or truncated_poisson with ``max_lot``.
        max_lot: largest lot in units.
        bands: blocks of units, which take turns (`coterie.dp.noise.bands`); 1: every lot is drawn from all units.
    """

    units: int
    lot_size: int
    sampler: Sampler = "poisson"
    max_lot: int | None = None
    bands: int = 1

    @classmethod
    def of(
        cls, units: int, lot_size: int, sampler: Sampler = "poisson", max_lot: int | None = None, bands: int = 1
    ) -> LotPlan:
        """Check the numbers, and choose the limit of truncated sampling where none is given.

        Raises:
            BudgetError: lots that are empty by plan, larger than the data, or truncated below their own size.
        """
        lot_size = checked_number("lot_size", lot_size)
        max_lot = None if max_lot is None else checked_number("max_lot", max_lot)
        if lot_size > units:
            raise BudgetError(
                f"a lot of {lot_size} is larger than the data ({units}).",
                code="dp-lot-size",
                why="each unit joins a lot with probability lot size / N, which cannot exceed 1",
                fix=f"choose a lot size of at most {units}",
            )
        if lot_size * bands > units:
            raise BudgetError(
                f"a lot of {lot_size} is larger than one of {bands} blocks of the data ({units} in all).",
                code="dp-lot-size",
                why="with noise in bands each lot comes from one block, whose units join with a chance of at most 1",
                fix=f"choose `noise_bands` of at most {units // lot_size}, or a lot of at most {units // bands}",
            )
        if sampler == "truncated_poisson":
            if max_lot is None:
                max_lot = min(units, math.ceil(lot_size + _TRUNCATION_DEVIATIONS * math.sqrt(lot_size)))
            if max_lot < lot_size:
                raise BudgetError(
                    f"the largest lot ({max_lot}) is below the expected one ({lot_size}).",
                    code="dp-lot-limit",
                    why="most lots would be cut, which costs far more privacy than it saves work",
                    fix=f"leave the limit to the default, or set it above {lot_size}",
                )
        elif max_lot is not None:
            raise BudgetError(
                f"a largest lot ({max_lot}) was set for plain Poisson sampling.",
                code="dp-lot-limit",
                why="a cut lot is another mechanism with another privacy cost",
                fix="set the sampler to truncated_poisson",
            )
        return cls(units, lot_size, sampler, max_lot, bands)

    @property
    def rate(self) -> float:
        """The chance with which a unit joins a lot; where there are blocks, one of its own block."""
        return self.lot_size / self.units if self.bands == 1 else self.lot_size * self.bands / self.units

    def mechanism(self, noise_multiplier: float) -> Mechanism:
        """What the accountant composes for one round. N enters it for truncated sampling only."""
        if self.sampler == "truncated_poisson":
            return Mechanism(noise_multiplier, self.rate, self.sampler, self.units, self.max_lot)
        return Mechanism(noise_multiplier, self.rate, bands=self.bands)


@dataclass(frozen=True)
class Units:
    """Which records belong to which unit.

    Attributes:
        starts: [N + 1] int64, bounds of each unit in ``order``; None when every record is its own unit.
        order: record indices grouped by unit; None when every record is its own unit.
        count: N.
        records: number of records.
        cap: largest number of a user's records in one lot.
        names: the user of each unit; None when every record is its own unit.
    """

    count: int
    records: int
    starts: np.ndarray | None = None
    order: np.ndarray | None = None
    cap: int | None = None
    names: tuple[str, ...] | None = None

    @classmethod
    def of_records(cls, records: int) -> Units:
        """Every record is its own unit.

        Raises:
            DataError: no records.
        """
        _need_records(records)
        return cls(records, records)

    @classmethod
    def of_users(cls, users: Sequence[Hashable], cap: int) -> Units:
        """All records with the same user (`users.user_ids`) form one unit; a lot takes at most ``cap`` of them.

        Raises:
            DataError: no records, or a record without a user.
            BudgetError: a cap below 1.
        """
        _need_records(len(users))
        cap = checked_number("records_per_user", cap)
        number: dict[str, int] = {}
        user_R = np.array([number.setdefault(user, len(number)) for user in user_ids(users)], np.int64)
        order = np.argsort(user_R, kind="stable")
        starts = np.concatenate([[0], np.bincount(user_R, minlength=len(number)).cumsum()])
        return cls(len(number), len(users), starts, order, cap, tuple(number))

    def owners(self) -> list[str] | None:
        """The user of each record; None when every record is its own unit."""
        if self.names is None or self.order is None or self.starts is None:
            return None
        of = np.empty(self.records, np.int64)
        of[self.order] = np.repeat(np.arange(self.count), np.diff(self.starts))
        return [self.names[unit] for unit in of.tolist()]


def _need_records(records: int) -> None:
    if records < 1:
        raise DataError(
            "the dataset has no records.",
            code="dp-no-data",
            why="there is nothing to train on",
            fix="check the files named under data",
        )


def draw_lot(round_no: int, lots: LotPlan, units: Units, source: RandomSource, draw: int = 0, slot: int = 0) -> Lot:
    """Draw the lot of one round.

    Each unit joins with probability floor(q 2^64) / 2^64, never above q. A truncated lot is a uniformly random subset
    of the drawn units.

    Args:
        round_no: from 1; with ``draw`` it names the streams of a seeded source.
        lots: public numbers; ``lots.units`` must be ``units.count``.
        units: which records belong together.
        source: secret for private runs.
        draw: how many lots were drawn for this round before (see `coterie.dp.accounting.releases`).
        slot: releases of the run before this one, burned ones included: it says which block's turn it is.

    Cost: 8 random bytes for each unit of the dataset, about 2 ns.
    """
    if lots.units != units.count:
        raise PrivacyError(
            f"the plan counts {lots.units} units, the data has {units.count}.",
            code="dp-units-changed",
            why="the sampling rate, and with it epsilon, would be wrong",
            fix="plan the run on the data it uses",
        )
    stream = source.stream(f"lot|{round_no}|{draw}")
    if lots.rate >= 1:
        chosen = np.arange(units.count)
    else:
        chosen = np.flatnonzero(stream.uint64(units.count) < np.uint64(math.floor(lots.rate * 2**64)))
    if lots.bands > 1:
        chosen = chosen[block_of(units.count, lots.bands)[chosen] == slot % lots.bands]
    if lots.max_lot is not None and chosen.shape[0] > lots.max_lot:
        keys = stream.uint64(chosen.shape[0])
        chosen = np.sort(chosen[np.argsort(keys)[: lots.max_lot]])
    if units.starts is None or units.order is None or units.cap is None:
        return Lot(round_no, chosen.astype(np.int64), np.arange(chosen.shape[0], dtype=np.int64))
    records: list[np.ndarray] = []
    for user in chosen.tolist():
        own = units.order[units.starts[user] : units.starts[user + 1]]
        if own.shape[0] > units.cap:
            own = np.sort(own[np.argsort(stream.uint64(own.shape[0]))[: units.cap]])
        records.append(own)
    counts = [own.shape[0] for own in records]
    flat = np.concatenate(records) if records else np.empty(0, np.int64)
    return Lot(round_no, flat.astype(np.int64), np.repeat(np.arange(len(counts), dtype=np.int64), counts))
