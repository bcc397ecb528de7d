"""The `experts` exchange without privacy, against the same training written out by hand."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from coterie.errors import RoundError
from coterie.federation.experts.host import ExpertsHost
from coterie.federation.experts.serve_weights import OFFER
from coterie.models import seam
from coterie.models.streaming.streamer import HostGradients
from coterie.training.data.packing import RoundOrder
from coterie.training.experts.contribution import PlainSums
from coterie.training.experts.exchange import received_rounds
from coterie.training.party import own_trunk
from coterie.training.party.actor import PartyActor
from coterie.training.party.in_process import InProcessFederation, run_in_process
from helpers.by_hand import train_by_hand
from helpers.comparing import relative
from helpers.federations import PARTIES, assert_same, experts_of, experts_settings, full_models, make_parts, text
from helpers.recorded import recorded_of
from helpers.waiting import until


def test_party_that_hosts_no_expert_trains_like_the_others(tmp_path: Path):
    hosts = {layer: {expert: PARTIES[expert % 2] for expert in range(8)} for layer in (0, 2)}
    hosts[1] = dict.fromkeys(range(8), "birch")
    config = experts_settings(placement=hosts)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation, _ = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    train_by_hand(config, models, parts)
    assert_same(federation, models)


@pytest.mark.parametrize(("cache", "apart"), [("memory", False), ("disk", False), ("memory", True)])
def test_a_private_trunk_trains_as_the_same_loop_by_hand(tmp_path: Path, cache, apart, monkeypatch):
    """Also with the trunk's master weights apart from what computes, as they are beside a GPU."""
    if apart:
        monkeypatch.setattr(own_trunk, "_on_host", lambda param: nn.Parameter(param.detach().clone()))
    config = experts_settings()
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    parts = {name: replace(each, cache=cache) for name, each in parts.items()}
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    train_by_hand(config, models, parts)
    assert_same(federation, models)
    assert all(result.finished and result.loss is not None for result in results.values())
    for name in PARTIES:
        exchange = experts_of(federation.runs[name])
        assert exchange.owner.streamer.peak_layers <= 2


def union_by_hand(config, model, parts) -> None:  # type: ignore[no-untyped-def]
    """One process, one model, each round the three parties' sequences together; torch's own AdamW."""
    optim = config.optim
    step = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    seam.select(model)
    model.train()
    for round_no in range(1, config.train.rounds + 1):
        step.zero_grad()
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        count = 0
        for name in PARTIES:
            for row in RoundOrder(len(parts[name].train), config.train.batch_size, config.train.seed).rows(round_no):
                ids = parts[name].train[row]["input_ids"].unsqueeze(0)
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
                count += ids.shape[1] - 1
        for param in model.parameters():
            param.grad /= count
        step.step()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_shared_trunk_equals_one_process_on_the_union_after_20_rounds(tmp_path: Path, family):
    config = experts_settings(trunk="shared", train__rounds=20)
    one = full_models(family=family)[PARTIES[0]]
    models = {name: copy.deepcopy(one) for name in PARTIES}
    parts = make_parts(config, models, tmp_path)
    federation, _ = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    union_by_hand(config, models[PARTIES[0]], parts)
    models = dict.fromkeys(PARTIES, models[PARTIES[0]])
    assert_same(federation, models)


def test_checkpoint_of_a_shared_trunk_is_the_model_after_its_round(tmp_path: Path):
    """Also without an evaluation before it: `coterie export` joins what lies there."""
    config = experts_settings(trunk="shared", train__rounds=3)
    models = {name: copy.deepcopy(full_models()[PARTIES[0]]) for name in PARTIES}
    parts = make_parts(config, models, tmp_path)
    run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    two = experts_settings(trunk="shared", train__rounds=2)
    union_by_hand(two, models[PARTIES[0]], parts)
    expected = dict(models[PARTIES[0]].named_parameters())
    for name in PARTIES:
        saved = load_file(tmp_path / name / "private" / "checkpoints" / "round-00000002" / "trunk.safetensors")
        for key, value in saved.items():
            if key in expected:
                assert relative(value, expected[key].detach()) < 1e-5, (name, key)


def test_survivors_fetch_a_shared_trunk_again_after_they_went_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A party dies in the first round after the checkpoint, when the others hold that checkpoint's trunk already."""
    config = experts_settings(trunk="shared", train__rounds=4, deadline_s=4.0)
    one = full_models()[PARTIES[0]]
    models = {name: copy.deepcopy(one) for name in PARTIES}
    parts = make_parts(config, models, tmp_path)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    begun, gone, compute = {name: threading.Event() for name in PARTIES}, threading.Event(), PlainSums.sums

    def waits(self, round_no, pins, streamer, cancel):  # type: ignore[no-untyped-def]
        me = threading.current_thread().name
        if round_no == 3:
            begun[me].set()
            if not gone.wait(60.0):
                raise AssertionError("nobody died")
        return compute(self, round_no, pins, streamer, cancel)

    monkeypatch.setattr(PlainSums, "sums", waits)
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    assert all(event.wait(60.0) for event in begun.values())
    federation.cut_off("birch")
    gone.set()
    until(lambda: "birch" in federation.ends)
    federation.up(make_parts(config, models, tmp_path)["birch"])
    federation.join()
    assert all(not isinstance(end, BaseException) for end in federation.ends.values()), federation.ends
    union_by_hand(config, models[PARTIES[0]], parts)
    assert_same(federation, models[PARTIES[0]])


def test_requests_of_a_round_that_was_given_up_do_not_hold_up_those_that_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """birch never begins round 6, for which alder asks it already; then everybody goes back to round 4."""
    config = experts_settings(trunk="shared", train__rounds=7, deadline_s=4.0)
    one = full_models()[PARTIES[0]]
    models = {name: copy.deepcopy(one) for name in PARTIES}
    parts = make_parts(config, models, tmp_path)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    asked, died = threading.Event(), threading.Event()
    handle, compute = ExpertsHost.handle, PartyActor.compute

    def seen(self, peer, lane, message, **options):  # type: ignore[no-untyped-def]
        if (self.me, peer, message.kind, message.address.round) == ("birch", "alder", OFFER, 6):
            asked.set()
        return handle(self, peer, lane, message, **options)

    def late(self, state, cancel):  # type: ignore[no-untyped-def]
        if self.inputs.party == "birch" and state.round == 6 and not died.is_set():
            assert asked.wait(60.0)
            died.set()
            federation.cut_off("cedar")
            until(lambda: cancel.cancelled)
            cancel.check()
        compute(self, state, cancel)

    monkeypatch.setattr(ExpertsHost, "handle", seen)
    monkeypatch.setattr(PartyActor, "compute", late)
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    until(lambda: "cedar" in federation.ends)
    federation.up(make_parts(config, models, tmp_path)["cedar"])
    federation.join()
    assert all(not isinstance(end, BaseException) for end in federation.ends.values()), federation.ends
    held_up = ("deadline", "round-given-up")
    assert not [s.state.note for s in federation.statuses if any(code in s.state.note for code in held_up)]
    union_by_hand(config, models[PARTIES[0]], parts)
    assert_same(federation, models[PARTIES[0]])


def recorded(config, folder: Path, data_seed: int) -> dict[str, list[tuple]]:  # type: ignore[no-untyped-def]
    """What each host received from each owner: kinds, parts, sizes, in order."""
    return recorded_of(config, folder, make_parts(config, full_models(), folder, data_seed=data_seed))


def test_messages_name_their_round_attempt_part_and_chunk(tmp_path: Path):
    """Sums and the weights behind them belong to an attempt, from 1; weights of a round's end to attempt 0."""
    config = experts_settings(train__rounds=2, train__eval_every=1)
    seen = {message[1:3] for messages in recorded(config, tmp_path, 10).values() for message in messages}
    assert {(at.round, at.attempt) for _, at in seen} == {(1, 1), (1, 0), (2, 1), (2, 0)}
    assert {kind for kind, at in seen if at.attempt == 0} == {OFFER, "weights-chunk"}
    assert not any(at.layer or at.micro_batch or at.call for _, at in seen)
    parts = {kind: {at.part for of, at in seen if of == kind} for kind in (OFFER, "push-begin", "push-end")}
    every = set(range(len(parts[OFFER])))
    assert parts == dict.fromkeys(parts, every)
    assert {at.chunk for kind, at in seen if kind.endswith("chunk")} == {0}, "no part here is larger than one"
    assert not any(at.chunk for kind, at in seen if not kind.endswith("chunk"))


def test_checkpoints_of_the_first_protocol_say_which_rounds_their_host_received():
    """There, attempt 3 of round 5 had the number 5 * 1024 + 3."""
    state = {"received:alder": torch.tensor(5 * 1024 + 3), "received-round:birch": torch.tensor(2048)}
    assert received_rounds(state) == {"alder": 5, "birch": 2048}


def test_what_leaves_an_owner_has_the_same_sizes_and_order_whatever_its_text(tmp_path: Path):
    config = experts_settings(train__rounds=3)
    assert recorded(config, tmp_path / "a", 10) == recorded(config, tmp_path / "b", 500)
    assert len(text(10)) != 0


def test_unchanged_parts_do_not_cross_again(tmp_path: Path):
    config = experts_settings(train__rounds=2, optim__lr=1e-30, optim__weight_decay=0.0, train__eval_every=1)
    seen = recorded(config, tmp_path, 10)
    for events in (events for lane, events in seen.items() if lane.endswith("FORWARD")):
        chunks = [event for event in events if event[1] == "weights-chunk"]
        assert {event[2].round for event in chunks} == {1}, "after the first round nothing had changed"


def test_attempt_that_fails_in_the_middle_of_a_backward_leaves_no_gradient_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = experts_settings(trunk="shared", train__rounds=3)
    one = full_models()[PARTIES[0]]
    models = {name: copy.deepcopy(one) for name in PARTIES}
    parts = make_parts(config, models, tmp_path)
    add, calls = HostGradients.add, [0]

    def fails_once(self, layer, gradients):  # type: ignore[no-untyped-def]
        calls[0] += layer == 0
        if layer == 0 and calls[0] == 12:  # three micro-batches at three parties are nine a round
            raise RoundError("a fault in the second round", code="test")
        add(self, layer, gradients)

    monkeypatch.setattr(HostGradients, "add", fails_once)
    federation, _ = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert any("test" in status.state.note for status in federation.statuses)
    union_by_hand(config, models[PARTIES[0]], parts)
    assert_same(federation, models[PARTIES[0]])


def test_killed_owner_comes_back_and_the_result_is_that_of_an_uninterrupted_run(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(own_trunk, "_on_host", lambda param: nn.Parameter(param.detach().clone()))
    config = experts_settings(train__rounds=6, deadline_s=4.0)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    until(lambda: any(s.state.phase == "compute" and s.state.round == 4 for s in federation.statuses))
    federation.kill("birch")
    federation.up(make_parts(config, models, tmp_path)["birch"])
    federation.join()
    assert all(not isinstance(end, BaseException) for end in federation.ends.values()), federation.ends
    train_by_hand(config, models, parts)
    assert_same(federation, models)
