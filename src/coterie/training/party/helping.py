"""A rank of a party other than its gateway: it does its part of every lot, and speaks to its own party alone."""

from __future__ import annotations

import logging
from typing import Any

import torch

from coterie.errors import CoterieError, RankError
from coterie.federation.cancel import CancelToken
from coterie.models import seam
from coterie.models.spread.beside import follow
from coterie.training.experts.contribution import Contribution
from coterie.training.experts.exchange import make_contribution
from coterie.training.experts.gateway import (
    CLOSE,
    END,
    FORGET,
    HELD,
    LEDGER,
    NEXT,
    OPEN,
    PART,
    SUMS,
    SharedLayers,
    hand_out,
    moved_tensors,
)  # fmt: skip
from coterie.training.experts.held_sums import DTYPES, Asked, HeldSums, bring
from coterie.training.experts.shared_trunk import shared_names
from coterie.training.party.inputs import PartyInputs, Weights, trunk_tensors
from coterie.training.party.own_trunk import OwnTrunk

_log = logging.getLogger("coterie")


class HelpingRank:
    """One rank of a party, from what it read to the end of the run.

    Args:
        inputs: what the party brings; this rank hosts nothing, and keeps neither checkpoints nor ledger.
    """

    def __init__(self, inputs: PartyInputs) -> None:
        self._inputs, self._ranks = inputs, inputs.ranks
        model = inputs.model
        trunk = Weights(trunk_tensors(model), {})
        self._trunk = OwnTrunk(inputs, trunk, shared_names(inputs.federation, model), on_host=True)
        self._layers = SharedLayers(inputs)
        self._streamer = self._layers.streamer
        self._run_name = ""
        self._held = HeldSums({})
        self._contribution = self._make_contribution()

    def _make_contribution(self) -> Contribution:
        return make_contribution(self._trunk, lambda: self._run_name)

    def run(self) -> None:
        """Do what the gateway says, until it says that this is the end.

        Raises:
            RankError: another rank is gone, or failed for good.
        """
        try:
            while (step := self._ranks.tell(NEXT, dict, patient=True))["what"] != END:
                try:
                    self._do(step)
                except RankError:
                    raise
                except CoterieError as error:
                    if not error.known_to_all:
                        raise  # leaving says it to the others, who wait for this one
                    # All ranks raise it, and the gateway says what is to be done about it.
                    _log.warning("rank %s: %s: %s", self._ranks.rank, error.code, error)
        finally:
            self._layers.close()
            self._contribution.close()

    def _do(self, step: dict[str, Any]) -> None:
        what, own = step["what"], self._contribution
        if what == PART:
            bring(self._held, self._ranks, [Asked(*each) for each in step["asked"]], DTYPES[step["dtype"]])
            return
        if what == HELD:
            self._ranks.together(HELD, self._held.listed)
            return
        self._held = HeldSums({})  # the round that they were of is over
        if what in (OPEN, LEDGER):
            self._take_up(step)
        if what == OPEN:
            self._layers.pin(step["layers"])
            own.open(self._streamer)
        elif what == LEDGER:
            own.open_ledger(self._streamer)
        elif what == SUMS:
            try:
                held = own.share(step["round"], step["pins"], self._streamer, CancelToken(self._given_up))
                self._held = held or self._held
            finally:
                self._streamer.drop_all()
        elif what == FORGET:
            own.applied(step["round"], step["newest"])
        elif what == CLOSE:
            own.close()
            self._contribution = self._make_contribution()

    def _given_up(self) -> bool:
        """Raises what another rank gave up with; the gateway, where the other parties decided so."""
        self._ranks.check_others()
        return False

    def _take_up(self, step: dict[str, Any]) -> None:
        """Be where the gateway is: trunk, loads, experts that are left out."""
        self._streamer.drop_all()
        self._run_name = step["run"]
        hand_out(self._ranks, moved_tensors(self._inputs.model, everything=step["all"]))
        seam.mask(self._inputs.model, dict(enumerate(step["masked"])))
        follow(self._inputs.lots_model, self._inputs.model)
        balancer = self._contribution.balancer
        if step["loads"] is not None and balancer is not None:
            balancer.follow(torch.tensor(step["loads"], dtype=torch.float64))
