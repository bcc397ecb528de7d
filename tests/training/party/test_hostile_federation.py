"""Whole federations with one member who means harm: it is named and dropped, the others go on or wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coterie.errors import CoterieError, RoundError
from coterie.federation.experts.parts import digest_of
from coterie.federation.wire.transport import Message
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import trunk_tensors
from coterie.training.party.run import PartyResult
from helpers.federations import PARTIES, full_models, make_parts, settings
from helpers.hostile import Sabotage, Spoil, only, poisoned

HOSTILE = "cedar"


def spoil_tensor(index: int, value: float) -> Spoil:
    def spoil(message: Message) -> Message:
        if len(message.tensors) <= index or not message.tensors[index].numel():
            return message
        changed = list(message.tensors)
        changed[index] = poisoned(changed[index], value)
        return replace(message, tensors=tuple(changed))

    return spoil


class SpoiltPush:
    """Pushes whose values are all replaced, with digests that fit them: what a member's own code could send."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __call__(self, message: Message) -> Message:
        if message.kind == "push-begin":
            blob = self._bytes(message.body["size"])
            return replace(message, body={**message.body, "digest": digest_of(blob)})
        if message.kind == "push-chunk":
            return replace(message, tensors=(self._bytes(message.tensors[0].numel()),))
        return message

    def _bytes(self, size: int) -> Tensor:
        return torch.full((size // 4,), self._value).view(torch.uint8)


class SpoiltWeights:
    """Weights that are all replaced, offered with the digest that fits them."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __call__(self, message: Message) -> Message:
        if message.kind == "weights-offer" and message.body:
            blob = torch.full((message.body["size"] // 4,), self._value).view(torch.uint8)
            return replace(message, body={**message.body, "digest": digest_of(blob)})
        if message.kind == "weights-chunk" and message.tensors:
            spoilt = torch.full((message.tensors[0].numel() // 4,), self._value)
            return replace(message, tensors=(spoilt.view(torch.uint8),))
        return message


def keep(message: Message) -> Message:
    return message


NAN, HUGE = float("nan"), 1e30
TOKENS: dict[str, tuple[Spoil, Spoil]] = {
    "hidden vectors that are NaN": (only(["dispatch"], spoil_tensor(0, NAN)), keep),
    "huge gradients": (only(["gradient"], spoil_tensor(0, HUGE)), keep),
    "outputs that are NaN": (keep, only(["outputs"], spoil_tensor(0, NAN))),
    "huge gradients back": (keep, only(["gradients"], spoil_tensor(0, HUGE))),
    "a reply without tensors": (keep, only(["outputs"], lambda m: replace(m, tensors=()))),
    "a count that is text": (only(["tokens"], lambda m: replace(m, body={"count": "x"})), keep),
}
EXPERTS: dict[str, tuple[Spoil, Spoil]] = {
    "pushes that are NaN": (SpoiltPush(NAN), keep),
    "huge pushes": (SpoiltPush(HUGE), keep),
    "weights that are NaN": (keep, SpoiltWeights(NAN)),
    "huge weights": (keep, SpoiltWeights(HUGE)),
    "chunks without a tensor": (keep, only(["weights-chunk"], lambda m: replace(m, tensors=()))),
    "chunks with two tensors": (keep, only(["weights-chunk"], lambda m: replace(m, tensors=m.tensors * 2))),
    "an offer without its text": (keep, only(["weights-offer"], lambda m: replace(m, body={}))),
    "a begin answered with text": (keep, only(["push-begin"], lambda m: replace(m, body={"missing": ["x"]}))),
    "a weight that no float holds": (
        only(["declare"], lambda m: replace(m, body={**m.body, "weight": 10**400})),
        keep,
    ),
}
CASES = [("tokens", name) for name in TOKENS] + [("experts", name) for name in EXPERTS]


def federation_with(
    folder: Path, exchange: str, request: Spoil, reply: Spoil, **changes: object
) -> InProcessFederation:
    """A started federation in which one member's messages are spoilt."""
    own = {"exchange": exchange, "deadline_s": 4.0, "train__rounds": 2, "train__checkpoint_every": 1}
    if exchange == "experts":
        own |= {"privacy": "none", "weights_dtype": "float32", "trunk": "shared"}
    config = settings(**{**own, **changes})
    models = full_models()
    if exchange == "experts":
        models = dict.fromkeys(PARTIES, models[PARTIES[0]])
    parts = make_parts(config, models, folder)
    federation = InProcessFederation(config, folder / "coordinator")
    make: Callable = federation.hub.transport

    def transport(name: str):  # type: ignore[no-untyped-def]
        return Sabotage(make(name), request, reply) if name == HOSTILE else make(name)

    federation.hub.transport = transport  # type: ignore[method-assign]
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    return federation


def assert_sound(federation: InProcessFederation, name: str) -> None:
    actor = federation.runs[name].actor
    for key, value in {**trunk_tensors(actor.inputs.model), **actor.exchange.hosted_state()}.items():
        assert bool(torch.isfinite(value.float()).all()), (name, key)


@pytest.mark.parametrize(("exchange", "harm"), CASES)
def test_others_go_on_without_a_member_whose_messages_do_not_fit(tmp_path: Path, exchange: str, harm: str) -> None:
    federation = federation_with(tmp_path, exchange, *(TOKENS | EXPERTS)[harm], lost_party="continue")
    federation.join(90.0)
    for name in PARTIES:
        if name != HOSTILE:
            end = federation.ends[name]
            assert isinstance(end, PartyResult), (name, end)
            assert end.finished
            assert_sound(federation, name)
    gone = federation.ends[HOSTILE]
    assert isinstance(gone, CoterieError), gone
    assert gone.code == "member-dropped"
    notes = [status.state.note for status in federation.statuses]
    assert any(HOSTILE in note and "refuses what it sent" in note for note in notes)


@pytest.mark.parametrize(("exchange", "harm"), [("tokens", "outputs that are NaN"), ("experts", "huge pushes")])
def test_under_pause_the_others_wait_and_the_run_ends_with_the_members_name(
    tmp_path: Path, exchange: str, harm: str
) -> None:
    federation = federation_with(tmp_path, exchange, *(TOKENS | EXPERTS)[harm], join_deadline_s=6.0)
    federation.join(90.0)
    for name in PARTIES:
        end = federation.ends[name]
        assert isinstance(end, CoterieError), (name, end)
        if name != HOSTILE:
            assert isinstance(end, RoundError)
            assert end.code == "round-party-missing"
            assert HOSTILE in end.message
            assert_sound(federation, name)
    assert any("refuses what it sent" in status.state.note for status in federation.statuses)
