"""A party's push under masks: agree on keys before the lot is drawn, mask what was noised, look at the sum of all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from coterie.config import FederationConfig
from coterie.dp.noise.pooled import fewest_parties
from coterie.errors import RoundError
from coterie.federation.cancel import CancelToken
from coterie.federation.experts.host import ExpertsHost
from coterie.federation.experts.masking.board import MaskAgreement, MaskBoard, parts_digest
from coterie.federation.experts.masking.grid import MaskGrid, grids_digest
from coterie.federation.experts.masking.session import MaskSession, Scope, Signer
from coterie.federation.experts.masking.streams import Masks, masks_of
from coterie.federation.experts.owner import SumSender
from coterie.federation.experts.parts import Part
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.rounds.state import State
from coterie.federation.wire.transport import Transport
from coterie.training.experts.contribution import Contribution, Sums
from coterie.training.experts.held_sums import SumValues
from coterie.training.party.own_masks import OwnMasks

_LOOK_S = 0.05

_KEPT = 32 << 20
"""Bytes of masked parts that stay in memory from their announcement until they are sent. Parts beyond are masked
again: all of a large model's would be 5 bytes a value. Which ones stay follows from the parts' sizes alone."""


class MaskedPush:
    """One party's masked pushes.

    Args:
        federation: shared settings.
        parts: every part of the model.
        host: this party's host side.
        board: the host's.
        transport: to the others.
        signer: this party's identity.
        run: name of the run, once this party has joined.
        roster: hash of the signed roster.
        recorded: keeps the masks, where the agreement records transcripts.
    """

    def __init__(
        self,
        federation: FederationConfig,
        parts: Sequence[Part],
        host: ExpertsHost,
        board: MaskBoard,
        transport: Transport,
        signer: Signer,
        run: Callable[[], str],
        roster: str,
        recorded: OwnMasks | None = None,
    ) -> None:
        self._parties, self._host, self._run, self._roster = tuple(federation.parties), host, run, roster
        self._fewest = fewest_parties(federation.colluding)
        self._recorded = recorded
        self._grid: MaskGrid | None = None
        self._parts = tuple(part for part in parts if part.trained)
        self._agreement = MaskAgreement(board, host.me, transport, signer, deadline_s=federation.deadline_s)

    @contextmanager
    def agreed(
        self, contribution: Contribution, state: State, pins: Mapping[str, str], cancel: CancelToken
    ) -> Iterator[MaskSession | None]:
        """Make keys for this attempt's push; behind it they are erased, whichever way the attempt ends.

        Args:
            contribution: opened; says whether it can draw, and what is held of an earlier attempt.
            state: names the attempt.
            pins: digests of what is computed on.
            cancel: ends a wait.

        Yields:
            The session; None where too few parties' budgets last and what all drew is not there: nobody's sums come.

        Raises:
            RoundError: ``mask-parties``: the coordinator leaves a party out.
            CoterieError: see `MaskAgreement.agree`.
        """
        session = self._agree(contribution, state, pins, cancel)
        try:
            yield session
        finally:
            if session is not None:
                session.masks.erase()

    def _agree(
        self, contribution: Contribution, state: State, pins: Mapping[str, str], cancel: CancelToken
    ) -> MaskSession | None:
        self._check_all_take_part(state)
        grids = {count: contribution.grid(count) for count in range(self._fewest, len(self._parties) + 1)}
        held = contribution.outlook(state.round, pins)
        scope = Scope(self._run(), self._roster, state.epoch, Attempt(state.round, state.attempt))
        session = self._agreement.agree(scope, grids_digest(grids.values()), held, self._fewest, cancel)
        if session is not None:
            self._grid = grids[len(session.contributors)]
            self._host.expect_masked(self._grid, session.contributors)
        return session

    def _check_all_take_part(self, state: State) -> None:
        """A coordinator could otherwise leave out everybody but those that pool what they know."""
        if state.absent:
            raise RoundError(
                f"the coordinator leaves out {', '.join(state.absent)}; masked pushes need all parties.",
                code="mask-parties",
                why="a sum over fewer parties hides each of them less than was agreed",
                fix="nothing was pushed; see why the coordinator counts that party as gone",
            )

    def push(
        self,
        sums: Sums,
        session: MaskSession,
        sender: SumSender,
        attempt: Attempt,
        versions: Mapping[int, str],
        cancel: CancelToken,
    ) -> None:
        """Mask and bring what was noised, when everybody has said what it will bring; look at the sums stored here.

        A party that does not contribute says so, and looks at the sums as everybody does.

        Raises:
            RoundError: ``run-diverged`` for values beyond what was agreed, of which nothing leaves; ``sum-wild``.
            CoterieError: a party cannot be reached, refused, or pushed something else than it had announced.
        """
        contributes, grid = self._host.me in session.contributors, self._grid
        values = sums.values if contributes else None
        if contributes and (values is None or grid is None):
            raise RoundError("this party's sums did not come after all.", code="push-withdrawn")
        masked, announced = None, {}
        if values is not None and grid is not None:
            masked = _MaskedParts(session.masks, grid.width, partial(self._integers, values, grid))
            announced = self._announced(masked, grid, attempt)
        sender.declare(attempt, contributes=contributes, weight=sums.weight)
        said = self._agreement.commit(attempt, session, self._digests(announced), cancel)
        if masked is not None:
            sender.push(attempt, masked.to_send, versions)
        session.masks.erase()  # before others are waited for
        while self._host.missing():
            cancel.check()
            time.sleep(_LOOK_S)
        self._host.check_masked(said)

    def _announced(self, masked: _MaskedParts, grid: MaskGrid, attempt: Attempt) -> dict[int, str]:
        """Digests of masked parts, by number; nothing leaves before all were looked at."""
        recorded = self._recorded if self._recorded is not None and self._recorded.wants(attempt) else None
        announced = {}
        for part in self._parts:
            integers = masked.integers(part)
            for name, own in part.split(integers).items():
                grid.check_own(name, own, str(attempt))
            blob, announced[part.number] = masked.to_announce(part, integers)
            if recorded is not None:
                recorded.keep(attempt, part.number, grid, masks_of(blob, integers, grid.width))
        return announced

    def _integers(self, values: SumValues, grid: MaskGrid, part: Part) -> Tensor:
        """int64 [V]; without a budget sums are rounded here, noised ones are on their grid already."""
        tensors = values.of(part)
        for name, own in tensors.items():
            if own.dtype != torch.int64:
                tensors[name] = grid.round(name, own)
        return part.joined(tensors, torch.int64)

    def _digests(self, announced: Mapping[int, str]) -> dict[str, str]:
        """By party, over what it will be pushed."""
        own: dict[str, list[str]] = defaultdict(list)
        for part in self._parts if announced else ():
            own[part.host].append(announced[part.number])
        return {party: parts_digest(own[party]) for party in self._parties}


class _MaskedParts:
    """The masked bytes of a push's parts, for their announcement and to be sent.

    Args:
        masks: of this push.
        width: bytes of one integer.
        integers: makes those of a part, int64 [V]; the same at every call.
    """

    def __init__(self, masks: Masks, width: int, integers: Callable[[Part], Tensor]) -> None:
        self._masks, self._width, self.integers = masks, width, integers
        self._kept: dict[int, Tensor] = {}
        self._room = _KEPT

    def to_announce(self, part: Part, integers: Tensor) -> tuple[Tensor, str]:
        """A part's bytes and their digest."""
        blob = self._masks.mask(part.number, integers, self._width)
        if blob.nbytes <= self._room:
            self._kept[part.number] = blob
            self._room -= blob.nbytes
        return blob, self._masks.digest(part.number)

    def to_send(self, part: Part) -> Tensor:
        """The same bytes; asked a second time, since a connection broke, masked again. Any thread may ask."""
        kept = self._kept.pop(part.number, None)
        return self._masks.mask(part.number, self.integers(part), self._width) if kept is None else kept
