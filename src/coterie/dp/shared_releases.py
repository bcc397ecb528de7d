"""A run's releases as all its ranks see them: rank 0 asks the ledger and the spool, and everybody does what it says.

Every rank puts its part of a result on disk, synced; then rank 0's file, which holds its own part and names the
digests of the others; then the ledger counts the digest of that file; only then the parts are handed out and used. So
a release exists if and only if rank 0's file does, and then all its parts are on disk. Parts without that file never
left, and are dropped. A release whose parts are not all to be found is burned: it stays counted, and its round is
drawn anew. Where a result does not leave these ranks, all of this holds but the syncing, which follows the ledger's
entry; see `coterie.dp.accounting.releases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.dp.accounting.lots import Lot
from coterie.dp.accounting.releases import Pending, Releases
from coterie.dp.accounting.spool import Durable, Release, Spool, adopt, drop_files, holds, shard_path
from coterie.errors import RankError
from coterie.ranks.ranks import Ranks


class SharedReleases:
    """What `Releases` does for one process, for all ranks of a run; every method is called by all of them.

    Args:
        ranks: of the run.
        own: rank 0's; None at the others.
        spool: of this rank's parts, at the others.

    Attributes:
        remaining: releases that the plan still allows, as rank 0 said last.
        slot: releases there were before this one, burned ones included, as rank 0 said last.
    """

    def __init__(self, ranks: Ranks, own: Releases | None, spool: Spool | None = None) -> None:
        self.remaining = self.slot = 0
        self._ranks, self._own, self._spool = ranks, own, spool
        if own is not None:
            self._folder = own.spool.folder
        else:
            assert spool is not None
            self._folder = spool.folder.parent
        self._drop_parts_without_a_release()

    @property
    def own(self) -> Releases:
        """Rank 0's releases and, with them, the ledger.

        Raises:
            RankError: this is another rank.
        """
        if self._own is None:
            raise RankError(
                f"rank {self._ranks.rank} keeps no ledger.",
                code="ranks-ledger",
                why="what a run spent is counted once, by rank 0",
                fix="ask where ranks.rank is 0",
            )
        return self._own

    def begin(self, round_no: int, pins: Mapping[str, str], draw: Callable[[int], Lot]) -> Pending | Release:
        """What to do for a round; see `Releases.begin`. Rank 0 draws the lot, and the others hear which it is.

        A release of which a part is not to be found is burned first.
        """
        while True:
            values = self._tell(f"round {round_no}", lambda: _values(self.own.begin(round_no, pins, draw)))
            if "lot" in values:
                return Pending(**{**values, "lot": Lot.from_json(values["lot"])})
            release = self._whole(values)
            if release is not None:
                return release

    def is_here(self, release: Release) -> bool:
        """Whether all parts of a release are on this rank's disk, as they were counted."""
        return len(self._found(release)) == len(release.shards)

    def spooled(self, pending: Pending) -> Release | None:
        """The result that an earlier try made of a pending lot; see `Releases.spooled`."""
        return self._whole(self._tell(f"spooled {pending.name}", lambda: _values(self.own.spooled(pending))))

    def published(self, round_no: int) -> Release | None:
        """The result of a round, if the spools still have all of it; see `Releases.published`."""
        return self._whole(self._tell(f"published {round_no}", lambda: _values(self.own.published(round_no))))

    def publish(self, pending: Pending, part: Mapping[str, Tensor], durable: Durable = "first") -> Release:
        """Spool this rank's part of a noised result; when all are on disk, rank 0's file names them and is counted.

        Args:
            pending: whose result it is.
            part: by parameter name.
            durable: see `coterie.dp.accounting.spool.Durable`.

        Raises:
            LedgerError: it could not be counted; it may not be used then.
        """
        written: list[Release] = []

        def put_down() -> str | None:
            if self._spool is None:
                return None  # rank 0's file comes last
            written.append(self._spool.write_release(pending.round, pending.draw, part, pending.pins))
            if durable == "first":
                self._spool.keep(written[0], durable)
            return written[0].digest

        shards = self._ranks.together(f"spool {pending.name}", put_down)[1:]
        try:
            return _release(
                self._tell(
                    f"count {pending.name}",
                    lambda: _values(self.own.publish(pending, part, shards, durable)),
                )
            )
        finally:
            if self._spool is not None and durable != "first":
                self._spool.keep(written[0], durable)

    def burn(self, release: Release, reason: str) -> None:
        """Give up a result; see `Releases.burn`."""
        self._tell(f"burn {release.round}", lambda: self.own.burn(release, reason))
        if self._spool is not None:
            self._spool.drop(release)

    def pieces(self, release: Release) -> Iterator[tuple[str, Tensor]]:
        """The noised sums of a release at every rank, part by part: the names they have on disk, and values.

        Raises:
            LedgerError: a file is not what was counted.
        """
        holders = self._holders(release)
        if None in holders:
            raise _incomplete(release)
        for number, holder in enumerate(holders):
            assert holder is not None
            yield from self._handed_out(release, number, holder).items()

    def own_parts(self, release: Release) -> dict[str, Tensor]:
        """The noised sums of those parts of a release that this rank reads; every part is read by one.

        Raises:
            LedgerError: a file is not what was counted.
        """
        holders = self._holders(release)
        if None in holders:
            raise _incomplete(release)
        found: dict[str, Tensor] = {}
        with self._ranks.all_well(f"own parts of {release.round}"):
            for number in (number for number, holder in enumerate(holders) if holder == self._ranks.rank):
                found |= self._read(release, number)
        return found

    def drop(self, up_to_round: int) -> None:
        """Remove results that every checkpoint to go back to includes; for each rank its own."""
        self._files.drop_releases(up_to_round, self._ranks.world)

    def nbytes(self) -> int:
        """About how many bytes of results lie in the spools of all ranks."""
        return self._files.nbytes() * self._ranks.world

    def remove(self) -> None:
        """Remove lot and results: nobody will continue this run."""
        self._files.remove()

    def close(self) -> None:
        """Let another process go on with this run."""
        self._files.close()

    # -- between ranks -----------------------------------------------------------------------------------------------

    @property
    def _files(self) -> Spool:
        return self.own.spool if self._spool is None else self._spool

    def _tell(self, step: str, make: Callable[[], Any]) -> Any:
        values, self.remaining, planned = self._ranks.tell(
            step, lambda: [make(), self.own.remaining, self.own.planned]
        )
        self.slot = planned - self.remaining
        return values

    def _whole(self, values: Mapping[str, Any] | None) -> Release | None:
        """A release that all parts are there of; another one is burned."""
        if values is None:
            return None
        release = _release(values)
        if None in self._holders(release):
            self.burn(release, "a part of it is not to be found")
            return None
        return release

    def _holders(self, release: Release) -> Sequence[int | None]:
        """For each part a rank that has it on disk, as it was counted; where several have, not the same for all."""
        if not release.shards:
            return [0]

        have = self._ranks.together(f"parts of {release.round}", lambda: self._found(release))
        holders: list[int | None] = [0]
        for number in range(1, len(release.shards) + 1):
            having = [rank for rank, own in enumerate(have) if number in own]
            holders.append(having[number % len(having)] if having else None)
        return holders

    def _found(self, release: Release) -> list[int]:
        """The numbers of the other ranks' parts that are on this rank's disk, as they were counted."""
        self._files.settle()
        paths = [(number, self._path(release, number)) for number in range(1, len(release.shards) + 1)]
        return [number for number, path in paths if path.is_file() and holds(path, release.shards[number - 1])]

    def _handed_out(self, release: Release, number: int, holder: int) -> dict[str, Tensor]:
        """One part of a release, from the rank that has it to all."""
        part: dict[str, Tensor] = {}

        def read() -> dict[str, Any] | None:
            if self._ranks.rank != holder:
                return None
            part.update(self._read(release, number))
            return {name: [tensor.is_floating_point(), *tensor.shape] for name, tensor in part.items()}

        shapes = self._ranks.together(f"part {number} of {release.round}", read)[holder]
        if self._ranks.rank != holder:
            kinds = {True: torch.float32, False: torch.int64}
            part = {name: torch.empty(shape, dtype=kinds[real]) for name, (real, *shape) in shapes.items()}
        if part:
            self._ranks.hand_out(list(part.values()), holder)
        return part

    def _read(self, release: Release, number: int) -> dict[str, Tensor]:
        """One part of a release from this rank's disk, by the names that it has there."""
        digest = (release.digest, *release.shards)[number]
        path = release.path if number == 0 else self._path(release, number)
        return Release(release.round, release.draw, digest, release.pins, path).tensors()

    def _path(self, release: Release, number: int) -> Path:
        return shard_path(self._folder, number, release.round, release.draw)

    def _drop_parts_without_a_release(self) -> None:
        def named() -> list[list[Any]]:
            return [[each.round, each.draw, list(each.shards)] for each in self.own.spool.releases()]

        known = {(round_no, draw): shards for round_no, draw, shards in self._tell("parts in the spool", named)}
        own, world = self._ranks.rank, self._ranks.world

        def named_digest(number: int, round_no: int, draw: int) -> str | None:
            return dict(enumerate(known.get((round_no, draw), []), start=1)).get(number)

        # What ranks left that are none now is taken up, too: a release may be read by any number of ranks.
        for folder in self._folder.glob("rank-*"):
            number = int(folder.name.removeprefix("rank-"))
            if number == own or (number >= world and number % world == own):
                adopt(folder, partial(named_digest, number))
        if self._spool is not None:
            drop_files(
                self._spool.folder,
                lambda *place: not holds(shard_path(self._folder, own, *place), named_digest(own, *place)),
            )


def _values(begun: Pending | Release | None) -> dict[str, Any] | None:
    """A pending lot or a release as JSON values."""
    if isinstance(begun, Pending):
        return {"round": begun.round, "draw": begun.draw, "pins": begun.pins, "lot": begun.lot.to_json()}
    return None if begun is None else {**asdict(begun), "path": str(begun.path)}


def _release(values: Mapping[str, Any]) -> Release:
    return Release(**{**values, "path": Path(values["path"]), "shards": tuple(values["shards"])})


def _incomplete(release: Release) -> RankError:
    return RankError(
        f"a part of the release of round {release.round} is not to be found.",
        code="ranks-part-gone",
        why="only the bytes that the ledger counted may be used",
        fix="resume the run: it burns that round, which stays counted, and draws it anew",
    )
