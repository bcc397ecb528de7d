"""Noised sums on their way up, the host's side: every owner's push is staged once, and summed over parties.

A push is identified by (party, release, part) and its digest. The same bytes may come any number of times, after a
broken connection, a restart or a retry of the attempt, and count once; other bytes under the same name are refused.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.errors import RoundError
from coterie.federation.experts.masking.grid import MaskGrid
from coterie.federation.experts.masking.streams import unmasked_sum
from coterie.federation.experts.parts import Part, chunks_in, digest_of, span
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.messages import unfit
from coterie.federation.wire.transport import Lane, Message
from coterie.federation.wire.values import check_received

BEGIN, CHUNK, END = "push-begin", "push-chunk", "push-end"
LANE = Lane.BACKWARD

Limit = Callable[[str, str], float]
"""``limit(party, name)``: largest size of a value in a party's sum of the tensor of that name."""


@dataclass
class _Incoming:
    digest: str
    blob: Tensor
    received: set[int] = field(default_factory=set)

    @property
    def chunks(self) -> int:
        return chunks_in(self.blob.numel())


class PushService:
    """Pushes of the present attempt, staged until the commit.

    Args:
        parts: the parts this party stores.
        dtype: what crosses, float32 or bfloat16.
        parties: who may push, in the order in which sums are added up.
        limit: see `Limit`; asked when a push is whole.
        masked: pushes are integers under masks: one party's cannot be looked at, only the sum of all.

    Attributes:
        grid: of masked pushes; None until the open attempt knows it, and where nothing is masked.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        dtype: torch.dtype,
        parties: tuple[str, ...],
        limit: Limit = lambda party, name: math.inf,
        *,
        masked: bool = False,
    ) -> None:
        self._limit = limit
        self._masked = masked
        self.grid: MaskGrid | None = None
        self._sums: dict[int, dict[str, Tensor]] = {}
        self._parts = {part.number: part for part in parts}
        self._dtype = dtype
        self._parties = parties
        self._open: Attempt | None = None
        self._release: object = None
        self._weights: Mapping[int, str] = {}
        self._incoming: dict[tuple[str, int], _Incoming] = {}
        self._staged: dict[tuple[str, int], tuple[str, Tensor]] = {}
        self._lock = threading.Lock()

    def begin(self, attempt: Attempt | None, weights: Mapping[int, str], release: object = None) -> None:
        """Take pushes of this attempt, computed on weights with these digests by part number; of none with None.

        Args:
            attempt: the one that pushes have to name.
            weights: hex SHA-256 by part number.
            release: equal for attempts in which every party brings the same bytes; default: no two do. What was
                staged for the same release and weights stays: a retry of the attempt need not send it again.
        """
        release = attempt if release is None else release
        with self._lock:
            if (release, weights) != (self._release, self._weights):
                self._incoming.clear()
                self._staged.clear()
                self._sums.clear()
                self.grid = None  # its width follows from who contributes
            self._open, self._release, self._weights = attempt, release, dict(weights)

    def handle(self, peer: str, message: Message) -> Message:
        """Answer one step of a push; the reply of ``push-begin`` names the chunks that are missing.

        Raises:
            RoundError: another attempt, another version of the weights, a party outside the roster, or other bytes
                than before (code push-changed).
            MessageError: wrong size or span, or values that no honest sum has.
        """
        with self._lock:
            part = self._check(peer, message)
            key = (peer, part.number)
            if message.kind == BEGIN:
                return message.reply(BEGIN, {"missing": self._begin(key, part, message)})
            if message.kind == CHUNK:
                self._chunk(key, message)
            elif key not in self._staged:
                self._finish(key, part)
            return message.reply(message.kind)

    def stage(self, party: str, number: int, attempt: Attempt, blob: Tensor, weights: str) -> None:
        """Stage a whole part at once, as the party itself does for what it hosts; the same checks as `handle`."""
        address = attempt.address(part=number)
        body = {"digest": digest_of(blob), "size": blob.numel(), "weights": weights}
        missing = self.handle(party, Message(BEGIN, address, body)).body["missing"]
        with self._lock:
            incoming = self._incoming.get((party, number))
            if incoming is not None:
                incoming.blob.copy_(blob)
                incoming.received.update(missing)
        self.handle(party, Message(END, address))

    def sums(self, number: int, contributing: tuple[str, ...]) -> dict[str, Tensor]:
        """The staged sums of one part added up in roster order, float32.

        Raises:
            RoundError: a contributing party's push is not complete; or masked ones add up to nothing that honest
                parties push (``sum-wild``).
        """
        with self._lock:
            part, total = self._parts[number], None
            in_order = self._all_staged(number, contributing)
            if self._masked and in_order:
                return {name: values.clone() for name, values in self._unmasked(part, in_order).items()}
            for party in in_order:
                values = self._staged[party, number][1].view(self._dtype).to(torch.float32)
                total = values.clone() if total is None else total.add_(values)
            if total is None:
                total = torch.zeros(part.num_values)
            return part.decode(total.view(torch.uint8), torch.float32)

    def look(self, number: int, contributing: tuple[str, ...]) -> None:
        """Add the masked pushes of one part up and look at what comes out, which `sums` then gives.

        Raises:
            RoundError: see `sums`.
        """
        with self._lock:
            self._unmasked(self._parts[number], self._all_staged(number, contributing))

    def digests(self, party: str) -> list[str]:
        """Of the staged pushes of a party, in the order of the parts."""
        with self._lock:
            return [self._staged[party, number][0] for number, part in self._parts.items() if part.trained]

    def complete(self, party: str) -> bool:
        """Whether every part of this party's push is staged."""
        with self._lock:
            return all((party, number) in self._staged for number, part in self._parts.items() if part.trained)

    def _all_staged(self, number: int, contributing: tuple[str, ...]) -> list[str]:
        """Those who contribute, in roster order, each with a complete push."""
        in_order = [party for party in self._parties if party in contributing]
        for party in in_order:
            if (party, number) not in self._staged:
                raise RoundError(f"the push of {party} for part {number} is not complete.", code="push-missing")
        return in_order

    def _unmasked(self, part: Part, parties: list[str]) -> dict[str, Tensor]:
        if part.number not in self._sums:
            grid, where = self._agreed_grid(), f"{part}, {self._open}"
            total = unmasked_sum({party: self._staged[party, part.number][1] for party in parties}, grid.width)
            self._sums[part.number] = {
                name: grid.values(name, values, where) for name, values in part.split(total).items()
            }
        return self._sums[part.number]

    def _agreed_grid(self) -> MaskGrid:
        if self.grid is None:
            raise RoundError("no masked push was agreed on here.", code="push-round")
        return self.grid

    def _num_bytes(self, part: Part) -> int:
        if not self._masked:
            return part.num_bytes(self._dtype)
        return part.num_values * self._agreed_grid().width

    def _check(self, peer: str, message: Message) -> Part:
        if peer not in self._parties:
            raise RoundError(
                f"{peer} is not a party of this federation.",
                code="push-stranger",
                fix="have everybody install the same roster",
            )
        wanted, number = Attempt.of(message), message.address.part
        if wanted != self._open:
            raise RoundError(f"{peer} pushed for {wanted}; {self._open or 'none'} is open.", code="push-round")
        part = self._parts.get(number)
        if part is None:
            raise RoundError(f"part {number} is not stored here.", code="push-not-here")
        return part

    def _begin(self, key: tuple[str, int], part: Part, message: Message) -> list[int]:
        digest, size, due = message.body["digest"], message.body["size"], self._num_bytes(part)
        if size != due:
            raise unfit(key[0], BEGIN, "size", f"of part {part.number} is {size} bytes, not {due}")
        if message.body["weights"] != self._weights.get(part.number):
            raise RoundError(
                f"{key[0]} computed part {part.number} on other weights than this round's.",
                code="push-stale-weights",
                why="a sum for one version of the weights must not be applied to another",
                fix="the round is burned at that party and drawn anew",
            )
        known = self._staged[key][0] if key in self._staged else None
        if key in self._incoming:
            known = self._incoming[key].digest
        if known is not None and known != digest:
            raise RoundError(
                f"{key[0]} pushed part {part.number} of round {message.address.round} twice with different bytes.",
                code="push-changed",
                why="two noised results for one lot would reveal more than the ledger says",
                fix="the second one is refused; the party's spool should hold the first",
            )
        if key in self._staged:
            return []
        incoming = self._incoming.setdefault(key, _Incoming(digest, torch.empty(due, dtype=torch.uint8)))
        return [number for number in range(incoming.chunks) if number not in incoming.received]

    def _chunk(self, key: tuple[str, int], message: Message) -> None:
        if key in self._staged:
            return
        incoming, number = self._incoming.get(key), message.address.chunk
        if incoming is None:
            raise RoundError(f"{key[0]} sends a chunk of a push that it did not begin.", code="push-not-begun")
        if number >= incoming.chunks:
            raise unfit(key[0], CHUNK, "chunk", f"is {number} of {incoming.chunks} chunks")
        place = incoming.blob[span(incoming.blob.numel(), number)]
        (chunk,) = message.tensors
        if chunk.numel() != place.numel():
            raise unfit(key[0], CHUNK, "bytes", f"of chunk {number} are {chunk.numel()}, not {place.numel()}")
        place.copy_(chunk)
        incoming.received.add(number)

    def _finish(self, key: tuple[str, int], part: Part) -> None:
        incoming = self._incoming.get(key)
        if incoming is None:
            raise RoundError(f"{key[0]} ends a push that it did not begin.", code="push-not-begun")
        if len(incoming.received) != incoming.chunks:
            raise unfit(key[0], END, "chunks", f"came {len(incoming.received)} of {incoming.chunks}")
        del self._incoming[key]
        if digest_of(incoming.blob) != incoming.digest:
            raise unfit(key[0], END, "digest", f"of part {part.number} is another than was announced")
        if not self._masked:
            for name, values in part.decode(incoming.blob, self._dtype).items():
                where = f"part {part.number}, {self._open}"
                check_received(key[0], END, f"sum of {name}", values, self._limit(key[0], name), where=where)
        self._staged[key] = (incoming.digest, incoming.blob)
