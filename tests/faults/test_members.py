"""A member with a valid key that means harm, over mutual TLS: messages changed in what they say, in a whole run."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from record import RECORD

from coterie.errors import CoterieError
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.identity.provision import local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.rounds.settings import transport_settings
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.transport import Lane, Message, Transport
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import trunk_tensors
from coterie.training.party.run import PartyResult
from helpers.federations import PARTIES, full_models, make_parts, settings
from helpers.hostile import Sabotage, mutations

PART = "Messages"
HOSTILE = "cedar"
EXCHANGES: dict[str, dict[str, object]] = {
    "tokens": {"exchange": "tokens"},
    "experts": {"exchange": "experts", "privacy": "none", "weights_dtype": "float32", "trunk": "shared"},
}
WRONG_S = 0.3
"""Time to answer what is wrong: some of it is well-formed and waits for a round that never comes."""
BROKEN = ("remote-failure", "connection-lost", "internal")
"""Answers that a handler of the honest side gives to no message, however wrong."""


class Pelting(Sabotage):
    """Says everything honestly, and beside it the same in many wrong ways.

    Attributes:
        answers: how often each code came back; "" for an answer.
    """

    def __init__(
        self, transport: Transport, draw: random.Random, *, reports: bool, beside: int, replies: float
    ) -> None:
        super().__init__(transport, reply=lambda message: self._sometimes(message, replies))
        self._draw, self._reports, self._beside = draw, reports, beside
        self.answers: Counter[str] = Counter()
        self.replies = 0

    def request_async(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Future[Message]:
        wrong = self._changed(message, self._beside) if self._reports == (message.kind == "report") else []
        for answer in [self._try(peer, lane, changed) for changed in wrong]:
            try:
                answer.result()
                self.answers[""] += 1
            except CoterieError as error:
                self.answers[error.code] += 1
        return super().request_async(peer, lane, message, deadline_s)

    def _try(self, peer: str, lane: Lane, message: Message) -> Future[Message]:
        try:
            return self._transport.request_async(peer, lane, message, WRONG_S)
        except CoterieError as error:  # no frame can hold it
            refused: Future[Message] = Future()
            refused.set_exception(error)
            return refused

    def _sometimes(self, message: Message, share: float) -> Message:
        if self._draw.random() >= share:
            return message
        (changed,) = self._changed(message, 1)
        self.replies += 1
        return changed

    def _changed(self, message: Message, times: int) -> list[Message]:
        """Not the one change that every member may ask for: the end of the run."""
        found = [changed for _, changed in mutations(message) if changed.body.get("stop") is not True]
        return self._draw.choices(found, k=times)


def pelted(
    folder: Path, exchange: str, seed: int, *, reports: bool = False, beside: int = 0, replies: float = 0.0
) -> Pelting:
    """A run over real channels in which one member sends wrong messages: the others finish it, with or without it."""
    config = settings(
        **EXCHANGES[exchange], lost_party="continue", train__rounds=3, train__checkpoint_every=1, deadline_s=10.0
    )
    kits = local_kits(folder / "kits", PARTIES, coordinator=True, federation="grove")
    made: dict[str, Transport] = {}

    def transport(name: str) -> Transport:
        end = GrpcTransport(name, load_roster(kits[name]), kits[name], settings=transport_settings(config))
        made[name] = (
            Pelting(end, random.Random(seed), reports=reports, beside=beside, replies=replies)
            if name == HOSTILE
            else end
        )
        return made[name]

    models = full_models()
    if exchange == "experts":
        models = dict.fromkeys(PARTIES, models[PARTIES[0]])
    federation = InProcessFederation(config, folder / COORDINATOR)
    federation.hub.transport = transport  # type: ignore[method-assign, assignment]
    federation.coordinate()
    for each in make_parts(config, models, folder).values():
        federation.up(each)
    federation.join(120.0)
    for name in (COORDINATOR, *PARTIES):
        end = federation.ends[name]
        if name == HOSTILE:
            assert isinstance(end, (CoterieError, PartyResult)), end
            continue
        assert not isinstance(end, BaseException), (name, end)
        if isinstance(end, PartyResult):
            assert end.finished
            actor = federation.runs[name].actor
            for key, value in {**trunk_tensors(actor.inputs.model), **actor.exchange.hosted_state()}.items():
                assert bool(torch.isfinite(value.float()).all()), (name, key)
    hostile = made[HOSTILE]
    assert isinstance(hostile, Pelting)
    assert not [code for code in BROKEN if hostile.answers[code]], hostile.answers
    return hostile


@pytest.mark.faults
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_member_whose_messages_say_what_was_not_agreed_ends_nobody(tmp_path: Path, exchange: str) -> None:
    sent = pelted(tmp_path / "requests", exchange, 0, beside=40).answers.total()
    sent += pelted(tmp_path / "reports", exchange, 0, reports=True, beside=40).answers.total()
    answered = pelted(tmp_path / "replies", exchange, 0, replies=0.1).replies
    assert sent > 200
    assert answered > 0
    happened = "refused by code; the others finish without that member"
    words = f"of a member in a run that says what was not agreed (`{exchange}`)"
    RECORD.tried(PART, f"a request {words}", happened, sent)
    RECORD.tried(PART, f"a reply {words}", happened, answered)
