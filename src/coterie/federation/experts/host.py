"""What one party stores of the shared model in the `experts` exchange: it serves weights and takes sums.

Master weights and optimiser state of a part exist here alone. An attempt at a round is: freeze the weights, serve
them to every owner, stage every owner's sum, and at the commit add the sums up in roster order, divide and step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import MessageError, RoundError
from coterie.federation.experts import serve_weights, take_sums
from coterie.federation.experts.frozen_shard import FrozenShard
from coterie.federation.experts.masking import board
from coterie.federation.experts.masking.board import MaskBoard, parts_digest
from coterie.federation.experts.masking.grid import MaskGrid
from coterie.federation.experts.parts import Part
from coterie.federation.experts.serve_weights import WeightService
from coterie.federation.experts.shared_trunk import TrunkHost
from coterie.federation.experts.take_sums import PushService
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.shard import Shard
from coterie.federation.wire.messages import LARGEST, check_request, kinds, unfit
from coterie.federation.wire.transport import Lane, Message

DECLARE = "declare"


@dataclass(frozen=True)
class Declared:
    """What a party says of its part in a round; both are public or, without privacy, harmless.

    Attributes:
        contributes: whether sums come from it. False when its budget is spent.
        weight: what its sums are divided by, added up over the contributing parties: its expected lot size, or
            without privacy its number of tokens.
    """

    contributes: bool
    weight: float


@dataclass(frozen=True)
class ExpertsHostLimits:
    """What a party can make a host take, from the signed settings.

    Attributes:
        rounds: the last round of the federation.
        weight: most that a party's sums can be divided by.
        value: largest size of a weight, and of a sum for each unit of its party's weight.
        noised: largest size of a sum that was clipped and noised, by tensor name; None where sums are not.
    """

    rounds: int = LARGEST
    weight: float = LARGEST
    value: float = math.inf
    noised: Callable[[str], float] | None = None


class ExpertsHost:
    """Serves and steps the parts of one party.

    Args:
        me: this party.
        parties: everybody, in roster order.
        parts: every part of the model; those with ``host == me`` are stored here.
        shard: the hosted experts.
        trunk: the stored share of a shared trunk.
        lend: this party's copy of a trunk share whose host is absent.
        weights_dtype: of what goes down.
        push_dtype: of what comes up.
        ahead: a message for this many rounds ahead, or more, is refused at once.
        limits: bounds on what a party can send.
        masked: pushes are masked; see `coterie.federation.experts.masking`.
        frozen: the hosted experts where they are not trained; ``shard`` has none then.

    Attributes:
        version: commits applied since this object was made.
        received: by party, the newest round of which all its sums are here; part of a checkpoint.
        board: what parties tell each other before a masked push; None where none is masked.
    """

    KINDS = kinds("experts")

    def __init__(  # noqa: PLR0913 - what was agreed, each by its name
        self,
        me: str,
        parties: Sequence[str],
        parts: Sequence[Part],
        shard: Shard,
        trunk: TrunkHost,
        *,
        lend: Callable[[Part], Mapping[str, Tensor]],
        weights_dtype: torch.dtype = torch.bfloat16,
        push_dtype: torch.dtype = torch.float32,
        ahead: int | None = None,
        limits: ExpertsHostLimits = ExpertsHostLimits(),
        masked: bool = False,
        frozen: FrozenShard | None = None,
    ) -> None:
        self.me, self.shard, self.trunk = me, shard, trunk
        self.version = 0
        self.received: dict[str, int] = {}
        self._parties = tuple(parties)
        self._mine = tuple(part for part in parts if part.host == me)
        self._limits = limits
        self._most = {"round": limits.rounds, "part": max((part.number for part in parts), default=0)}
        still = None if frozen is None else frozen.values
        self._weights = WeightService(self._mine, self._read, weights_dtype, limits.value, still)
        self.board = MaskBoard(me) if masked else None
        self._pushes = PushService(self._mine, push_dtype, self._parties, self.push_limit, masked=masked)
        self._lend = lend
        self._open: Attempt | None = None
        self._after, self._ahead = 0, ahead
        self._active: tuple[str, ...] = self._parties
        self._declared: dict[str, Declared] = {}
        self._contributors: tuple[str, ...] = ()
        self._committed: Attempt | None = None
        self._changed = threading.Condition()
        self._closed = False

    def begin(
        self,
        attempt: Attempt,
        active: Sequence[str] | None = None,
        lent: Sequence[Part] = (),
        release: object = None,
    ) -> None:
        """Freeze the weights for this attempt and take pushes for it.

        Args:
            attempt: the one that requests have to name from now on.
            active: parties that take part; default: all.
            lent: trunk shares of absent hosts that this party serves, as they are at this moment.
            release: see `PushService.begin`.
        """
        self._weights.begin(attempt, lent)
        for part in lent:
            self._weights.digest(part.number, attempt)
        digests = {part.number: self._weights.digest(part.number, attempt) for part in self._mine}
        self._pushes.begin(attempt, digests, release)
        if self.board is not None:
            self.board.begin(attempt, self._parties if active is None else active)
        with self._changed:
            if attempt != self._open:
                self._declared.clear()
                self._contributors = ()
            self._open, self._after = attempt, attempt.round
            self._active = tuple(active) if active is not None else self._parties
            self._changed.notify_all()

    def forget(self) -> None:
        """Serve no round any more: the stored weights are about to be replaced (a checkpoint is loaded)."""
        with self._changed:
            self._open = self._committed = None
            self._declared.clear()
        self._weights.begin(None)
        self._pushes.begin(None, {})
        if self.board is not None:
            self.board.begin(None, ())

    def go_on_after(self, round_no: int) -> None:
        """Say where the run stands after a checkpoint was loaded: what was asked for a state that was given up fails
        now, also what still waits, and holds up nothing that follows on its lane."""
        with self._changed:
            self._after = round_no
            self._changed.notify_all()

    def close(self) -> None:
        """Serve nobody any more: what waits for a round to begin fails at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def handle(self, peer: str, lane: Lane, message: Message, *, wait_s: float = 60.0) -> Message:
        """The reply to a message of one of `KINDS`.

        A message for the attempt that is about to begin here waits up to ``wait_s`` for it: parties hear of a new one
        at slightly different times.

        Raises:
            MessageError: it is no such message, or holds what cannot be computed with; nothing was touched.
        """
        check_request("experts", self.me, peer, lane, message, most=self._most)
        wanted = Attempt.of(message)
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._has_begun(wanted) or self._too_far_ahead(wanted.round), timeout=wait_s
            )
            if self._closed:
                raise RoundError(
                    f"{self.me} is leaving.",
                    code="host-closed",
                    fix="start everybody again with `coterie resume`: all go on from the newest common checkpoint",
                )
            if self._too_far_ahead(wanted.round):
                raise RoundError(f"{self.me} went back to before round {wanted.round}.", code="round-given-up")
        if message.kind == DECLARE:
            self._declare(peer, message)
            return message.reply(DECLARE)
        if message.kind in board.KINDS:
            if self.board is None:
                raise unfit(peer, message.kind, "kind", "is for masked pushes, which were not agreed on")
            return self.board.take(peer, message)
        if message.kind in (serve_weights.OFFER, serve_weights.CHUNK):
            return self._weights.handle(peer, message, self.received.get(peer, 0))
        reply = self._pushes.handle(peer, message)
        if message.kind == take_sums.END and self._pushes.complete(peer):
            self.received[peer] = max(self.received.get(peer, 0), wanted.round)
        return reply

    def _has_begun(self, attempt: Attempt) -> bool:
        return self._open is not None and not self._open.is_before(attempt)

    def _too_far_ahead(self, round_no: int) -> bool:
        """Parties move together, so nobody who follows the same history can be more than one round ahead."""
        return self._ahead is not None and round_no >= self._after + self._ahead

    def own_bytes(self, number: int, attempt: Attempt) -> Tensor:
        """Bytes of an own part, uint8, as every owner sees it in this attempt."""
        return self._weights.read(number, attempt)

    def own_digest(self, number: int, attempt: Attempt) -> str:
        """Digest of the same."""
        return self._weights.digest(number, attempt)

    def stage_own(self, part: Part, attempt: Attempt, blob: Tensor, weights: str) -> None:
        """Take this party's own sum of a part, by the same checks as everybody's."""
        self._pushes.stage(self.me, part.number, attempt, blob, weights)

    def expect_masked(self, grid: MaskGrid, contributors: Sequence[str]) -> None:
        """What the masked pushes of an attempt lie on, and whose add up; called before any of them can arrive."""
        self._pushes.grid = grid
        with self._changed:
            self._contributors = tuple(party for party in self._parties if party in contributors)

    def check_masked(self, said: Mapping[str, str]) -> None:
        """Look at the sums of an attempt's masked pushes, all of which are here.

        Args:
            said: by party, the digest that it gave this host before anybody's values left.

        Raises:
            MessageError: ``mask-digest``: a party pushed something else; ``mask-contributor``: it pushed though it
                had said that it would not.
            RoundError: ``sum-wild``: nothing that honest parties' pushes add up to.
        """
        if not self._mine:
            return
        for party in self._contributing():
            if party not in self._contributors:
                raise MessageError(
                    f"{party} brings a masked push to {self.me} though it said that it cannot draw.",
                    code="mask-contributor",
                    why="how much noise each party adds follows from how many contribute",
                    fix="nothing was applied; the attempt is given up and tried again",
                    field="contributes",
                    peer=party,
                )
        for party in self._contributors:
            digest = said[party]
            if not self._pushes.complete(party) or parts_digest(self._pushes.digests(party)) != digest:
                raise MessageError(
                    f"{party} pushed other masked values to {self.me} than it had announced.",
                    code="mask-digest",
                    why="a push that is chosen after the others' could be aimed at them",
                    fix="nothing was applied; the attempt is given up and tried again",
                    field="digest",
                    peer=party,
                )
        for part in self._mine:
            if part.trained:
                self._pushes.look(part.number, self._contributors)

    def _contributing(self) -> tuple[str, ...]:
        """Active parties that declared sums, in roster order."""
        return tuple(party for party in self._active if party in self._declared and self._declared[party].contributes)

    def missing(self) -> tuple[str, ...]:
        """Active parties that have not declared their part, or declared sums that did not all arrive.

        Nobody where nothing is stored: owners send sums and declarations only to where a part is.
        """
        if not self._mine:
            return ()
        with self._changed:
            return tuple(party for party in self._active if not self._complete(party))

    def commit(self, attempt: Attempt, learning_rate: float) -> None:
        """Step every stored part by the divided sum of the contributing parties. Repeating it does nothing.

        Raises:
            RoundError: another attempt is open, or something is missing. Nothing was changed then.
        """
        if self._committed == attempt:
            return
        missing = self.missing()
        if self._open != attempt or missing:
            raise RoundError(
                f"{attempt} cannot commit at {self.me}: "
                + (f"no complete sum from {', '.join(missing)}." if missing else f"{self._open or 'none'} is open."),
                code="round-incomplete",
            )
        contributing = self._contributing() if self._mine else ()
        if self.board is not None and self._mine and contributing != self._contributors:
            raise RoundError(
                f"{attempt} cannot commit at {self.me}: masked sums of other parties than agreed on theirs.",
                code="round-incomplete",
            )
        divisor = math.fsum(self._declared[party].weight for party in contributing)
        if contributing and divisor > 0:
            trained = [part for part in self._mine if part.trained]
            for part in trained:
                self._fill(part, self._pushes.sums(part.number, contributing), divisor)
            if any(part.layer >= 0 for part in trained):
                self.shard.step(learning_rate)
            self.trunk.step(learning_rate)
        self._committed = attempt
        self.version += 1

    @torch.no_grad()
    def _fill(self, part: Part, sums: Mapping[str, Tensor], divisor: float) -> None:
        for name, total in sums.items():
            gradient = self.trunk.gradient(name) if part.layer < 0 else self.shard.gradient(part.layer, name)
            gradient.copy_(total.div_(divisor))

    def _read(self, part: Part) -> Mapping[str, Tensor]:
        if part not in self._mine:
            return self._lend(part)
        return self.trunk.weights() if part.layer < 0 else self.shard.weights(part.layer)

    def _complete(self, party: str) -> bool:
        declared = self._declared.get(party)
        return declared is not None and (not declared.contributes or self._pushes.complete(party))

    def push_limit(self, party: str, name: str) -> float:
        """Largest size of a value in a party's sum of a tensor: what was agreed, for the weight it declared."""
        declared = self._declared.get(party)  # no lock: it is asked for under the lock of the pushes
        if declared is None or not declared.contributes:
            raise RoundError(f"{party} pushes sums that it did not declare.", code="push-undeclared")
        plain = self._limits.value * max(declared.weight, 1.0)
        return plain if self._limits.noised is None else self._limits.noised(name)

    def _declare(self, peer: str, message: Message) -> None:
        contributes, weight = message.body["contributes"], float(message.body["weight"])
        wanted = Attempt.of(message)
        if not (weight == 0 or 1 <= weight <= self._limits.weight):
            raise unfit(peer, DECLARE, "weight", f"is neither 0 nor from 1 to {self._limits.weight:g}")
        with self._changed:
            if wanted != self._open or peer not in self._active:
                raise RoundError(f"{peer} declares {wanted}; {self._open or 'none'} is open.", code="push-round")
            declared = Declared(contributes, weight)
            if self._declared.setdefault(peer, declared) != declared:
                raise RoundError(f"{peer} declares its part in {wanted} twice.", code="declare-changed")
