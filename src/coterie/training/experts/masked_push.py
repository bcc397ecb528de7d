"""A party's push under masks: agree on keys before the lot is drawn, mask what was noised, look at the sum of all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

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
from coterie.federation.experts.masking.streams import masks_of
from coterie.federation.experts.owner import SumSender
from coterie.federation.experts.parts import Part, digest_of
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.rounds.state import State
from coterie.federation.wire.transport import Transport
from coterie.training.experts.contribution import Contribution, ExpertSums, Sums
from coterie.training.party.own_masks import OwnMasks

_LOOK_S = 0.05


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

    def agree(
        self, contribution: Contribution, state: State, pins: Mapping[str, str], cancel: CancelToken
    ) -> MaskSession | None:
        """Make keys for this attempt's push.

        Args:
            contribution: opened; says whether it can draw, and what is held of an earlier attempt.
            state: names the attempt.
            pins: digests of what is computed on.
            cancel: ends a wait.

        Returns:
            The session; None where too few parties' budgets last and what all drew is not there: nobody's sums come.

        Raises:
            RoundError: ``mask-parties``: the coordinator leaves a party out.
            CoterieError: see `MaskAgreement.agree`.
        """
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
        contributes, blobs = self._host.me in session.contributors, dict[int, Tensor]()
        if contributes:
            if sums.experts is None or self._grid is None:
                raise RoundError("this party's sums did not come after all.", code="push-withdrawn")
            blobs = self._masked(sums, sums.experts, self._grid, session, attempt)
        sender.declare(attempt, contributes=contributes, weight=sums.weight)
        said = self._agreement.commit(attempt, session, self._digests(blobs), cancel)
        if contributes:
            sender.push(attempt, blobs, versions)
        while self._host.missing():
            cancel.check()
            time.sleep(_LOOK_S)
        self._host.check_masked(said)

    def _masked(
        self, sums: Sums, experts: ExpertSums, grid: MaskGrid, session: MaskSession, attempt: Attempt
    ) -> dict[int, Tensor]:
        """uint8 bytes by part number; every part is checked before the first is masked."""
        integers: dict[int, Tensor] = {}
        for part in self._parts:
            tensors = dict(sums.trunk)
            if part.layer >= 0:
                stacked = experts[part.layer]
                tensors = {name: stacked[name][list(part.experts)] for name, _ in part.shapes}
            for name, _ in part.shapes:
                if tensors[name].dtype != torch.int64:  # without a budget; noised sums are on their grid already
                    tensors[name] = grid.round(name, tensors[name])
                grid.check_own(name, tensors[name], str(attempt))
            integers[part.number] = part.joined(tensors, torch.int64)
        try:
            blobs = {number: session.masks.mask(number, each, grid.width) for number, each in integers.items()}
        finally:
            session.masks.erase()
        if self._recorded is not None and self._recorded.wants(attempt):
            for number, each in integers.items():
                self._recorded.keep(attempt, number, grid, masks_of(blobs[number], each, grid.width))
        return blobs

    def _digests(self, blobs: Mapping[int, Tensor]) -> dict[str, str]:
        """By party, over what it will be pushed."""
        own: dict[str, list[str]] = defaultdict(list)
        for part in self._parts if blobs else ():
            own[part.host].append(digest_of(blobs[part.number]))
        return {party: parts_digest(own[party]) for party in self._parties}
