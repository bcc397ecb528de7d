"""The `tokens` exchange computes what one process computes, and sends no more than it must."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.errors import CoterieError, DeadlineError, PlacementError, RoundError, TransportError
from coterie.federation.tokens.owner import TokensOwner
from coterie.federation.wire.base_transport import BaseTransport
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.transport import Lane, Message
from coterie.models.seam import expert_layers, select
from coterie.models.split.placement import Placement
from coterie.models.split.shards import expert_key
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.training.loop import loss_sum, train_round
from coterie.training.optim import make_optimizer
from helpers import recorded
from helpers.tokens_world import (
    PARTIES,
    SPEC,
    Batch,
    Recording,
    TokensWorld,
    assert_equal,
    batches_of,
    expert_weights,
    trunk_of,
    world,
)

FAMILIES = ["olmoe", "gpt_oss", "nemotron_h", "qwen2_moe", "granitemoehybrid"]


def alone(world: TokensWorld, trunk_seed: int) -> nn.Module:
    """One process with a party's trunk and all experts."""
    model = world.model(trunk_seed)
    select(model)
    return model


def expert_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        expert_key(layer.index, expert, name): value.grad[expert]
        for layer in expert_layers(model)
        for name, value in layer.parameters().items()
        for expert in range(layer.num_experts)
    }


def gradients_alone(
    world: TokensWorld, trunk_seed: int, batches: Sequence[Batch], seed: int = 17, training: bool = True
) -> nn.Module:
    """The model after plain backward of all micro-batches, each with the random state that the scheduler gives it."""
    model = alone(world, trunk_seed).train(training)
    for number, batch in enumerate(batches):
        torch.manual_seed((seed * 1_000_003 + number) % 2**63)
        loss_sum(model, batch)[0].backward()
    return model


# ---- equal to one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "combine"), [*((family, "host") for family in FAMILIES), ("olmoe", "owner")])
def test_one_active_party_equals_training_alone_for_20_rounds(family: str, combine: str) -> None:
    rounds = [batches_of(seed) for seed in range(20)]
    with world(family, combine=combine, checkpointing=combine == "owner") as three:
        start = three.hosted()
        for number, batches in enumerate(rounds):
            three.only("birch", number, batches)
        model = alone(three, 1)
        optimizer = make_optimizer(model.parameters(), SPEC)
        for batches in rounds:
            train_round(model, optimizer, batches, lr=SPEC.lr)
        assert_equal(trunk_of(three.parties["birch"].model), trunk_of(model))
        assert_equal(three.hosted(), expert_weights(model))
        assert all(not torch.equal(start[key], value) for key, value in three.hosted().items() if "proj" in key)


def test_an_expert_without_a_token_steps_as_in_one_process() -> None:
    rounds = [[{name: value[:1, :2] for name, value in batches_of(seed, 1)[0].items()}] for seed in range(3)]
    with world("olmoe") as three:
        model = alone(three, 1)
        optimizer = make_optimizer(model.parameters(), SPEC)
        unused = set(three.experts)
        for number, batches in enumerate(rounds):
            three.only("birch", number, batches)
            model.zero_grad()
            loss_sum(model, batches[0])[0].backward()
            unused -= {key for key, grad in expert_gradients(model).items() if grad.any()}
            model.zero_grad()
            train_round(model, optimizer, batches, lr=SPEC.lr)
        assert unused, "too many tokens for this test"
        assert_equal(three.hosted(), expert_weights(model))
        assert all(not torch.equal(three.hosted()[key], three.experts[key]) for key in unused)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize(
    ("combine", "checkpointing", "recompute"), [("host", False, False), ("host", True, True), ("owner", True, False)]
)
def test_expert_gradients_of_three_active_parties_are_the_sum_over_their_trunks(
    family: str, combine: str, checkpointing: bool, recompute: bool
) -> None:
    batches = {name: batches_of(seed) for seed, name in enumerate(PARTIES)}
    settings = {"combine": combine, "checkpointing": checkpointing, "recompute": recompute}
    assert_gradients_are_those_of_plain_backward(family, batches, **settings)


@pytest.mark.parametrize("family", list(causal_lm_types()))
def test_every_family_computes_the_same_gradients_through_its_hosts(family: str) -> None:
    """Dispatch, forward and backward at the hosts, staged sums, combine: against plain backward of whole models."""
    batches = {name: batches_of(seed, 1) for seed, name in enumerate(PARTIES)}
    # PhiMoE routes at random in training, and the three parties of this one process share one random state.
    assert_gradients_are_those_of_plain_backward(family, batches, training=family != "phimoe")


def assert_gradients_are_those_of_plain_backward(
    family: str, batches: Mapping[str, Sequence[Batch]], training: bool = True, **settings: Any
) -> None:
    with world(family, host_optimizer=Recording, **settings) as three:
        for party in three.parties.values():
            party.model.train(training)
        sums = three.everybody(0, batches)
        three.commit(0)
        tokens = sum(one.tokens for one in sums.values())
        expected: dict[str, Tensor] = {}
        for trunk_seed, name in enumerate(PARTIES):
            model = gradients_alone(three, trunk_seed, batches[name], training=training)
            party = three.parties[name]
            references = {key: model.get_parameter(key).grad for key in trunk_of(party.model)}
            whole = torch.stack([one.norm() for one in references.values() if one is not None]).norm()
            for key, parameter in trunk_of(party.model).items():
                reference, found = references[key], sums[name].gradients.get(parameter)
                if reference is None or found is None:
                    assert reference is found, key
                    continue
                # Terms cancel where a gradient is a ten-thousandth of the whole (a decay's bias) or nought (a key's).
                assert (found - reference).norm() <= 1e-5 * reference.norm() + 1e-8 * whole, key
            for key, grad in expert_gradients(model).items():
                expected[key] = expected[key] + grad if key in expected else grad.clone()
        assert_equal(three.summed_gradients(), {key: value / tokens for key, value in expected.items()})


def test_a_norm_behind_each_expert_stays_with_the_owner() -> None:
    def add_norm(model: nn.Module) -> None:
        for layer in expert_layers(model):
            layer.module.has_post_expert_norm = True
            layer.module.post_expert_norm = nn.RMSNorm(32)
            with torch.no_grad():
                layer.module.post_expert_norm.weight.copy_(torch.linspace(0.5, 1.5, 32))

    batches = batches_of(3)
    with world("olmoe", prepare=add_norm, host_optimizer=Recording) as three:
        assert not any("norm" in key for key in three.hosted())
        sums = three.only("cedar", 0, batches)
        model = gradients_alone(three, 2, batches)
        for key, parameter in trunk_of(three.parties["cedar"].model).items():
            reference = model.get_parameter(key).grad
            assert (sums.gradients[parameter] - reference).norm() <= 1e-5 * reference.norm(), key
        expected = {key: grad / sums.tokens for key, grad in expert_gradients(model).items()}
        assert_equal(three.summed_gradients(), expected)


def test_a_micro_batch_that_needs_nothing_of_a_host_does_not_hold_up_the_next() -> None:
    one_token = [{name: value[:1, :2] for name, value in batches_of(seed, 1)[0].items()} for seed in range(3)]
    batches = [*one_token, *batches_of(4)]
    with world("olmoe", host_optimizer=Recording) as three:
        seen = watch(three)
        sums = three.only("birch", 0, batches)
        assert any(len(m.tensors[0]) == 0 for _, _, m in seen if m.kind == "dispatch"), (
            "too many tokens for this test"
        )
        expected = expert_gradients(gradients_alone(three, 1, batches))
        assert_equal(three.summed_gradients(), {key: grad / sums.tokens for key, grad in expected.items()})


@pytest.mark.parametrize("combine", ["host", "owner"])
def test_the_experts_of_an_absent_party_add_nothing(combine: str) -> None:
    batches = batches_of(6)
    with world("olmoe", combine=combine, host_optimizer=Recording) as three:
        three.parties["cedar"].transport.close()
        alder, birch = three.parties["alder"], three.parties["birch"]
        for party in (alder, birch):
            party.exchange.absent = frozenset({"cedar"})
            party.host.begin(0, 0, ("alder", "birch"))
        birch.exchange.declare(0, 0, 0)
        sums = alder.compute(0, 0, batches)
        alder.host.commit(0, 0)

        model = three.model(0)
        gone = three.placement.hosted("cedar")
        for layer in expert_layers(model):  # experts that answer zero to everything
            layer.module.down_proj.data[gone[layer.index]] = 0.0
        select(model)
        for batch in batches:
            loss_sum(model, batch)[0].backward()
        for key, parameter in trunk_of(alder.model).items():
            reference = model.get_parameter(key).grad
            assert (sums.gradients[parameter] - reference).norm() <= 1e-5 * reference.norm(), key


def test_dropout_is_that_of_the_seed_and_not_of_the_timing() -> None:
    def drop(model: nn.Module) -> None:
        model.config.attention_dropout = 0.3
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3

    batches = batches_of(4, micro_batches=3)
    with world("olmoe", prepare=drop, host_optimizer=Recording) as three:
        three.begin(0)
        sums = three.parties["birch"].compute(0, 0, batches, seed=17)
        model = gradients_alone(three, 1, batches)
        for key, parameter in trunk_of(three.parties["birch"].model).items():
            reference = model.get_parameter(key).grad
            assert (sums.gradients[parameter] - reference).norm() <= 1e-5 * reference.norm(), key


@pytest.mark.parametrize("combine", ["host", "owner"])
def test_inference_is_the_whole_models_and_hosts_remember_nothing(combine: str) -> None:
    batch = batches_of(9)[0]
    with world("olmoe", combine=combine) as three:
        party = three.parties["alder"]
        party.model.eval()
        with party.cut.inference(party.exchange.inference()):
            logits = party.model(input_ids=batch["input_ids"]).logits
        whole = alone(three, 0).eval()
        with torch.no_grad():
            torch.testing.assert_close(logits, whole(input_ids=batch["input_ids"]).logits)
        assert not any(p.host._kept or p.host._stages for p in three.parties.values())


# ---- a round is a transaction -------------------------------------------------------------------------------------


def test_abort_and_retry_gives_the_result_of_no_abort() -> None:
    batches = {name: batches_of(seed) for seed, name in enumerate(PARTIES)}
    found = []
    for aborted in (False, True):
        with world("olmoe", random_bytes=by_length) as three:
            attempt = 0
            if aborted:
                three.everybody(0, {name: batches_of(40 + seed) for seed, name in enumerate(PARTIES)})
                three.abort(0)
                three.begin(0, 1)
                three.parties["alder"].scheduler.run(
                    batches_of(50), lambda n, stopped: three.parties["alder"].exchange.training(0, 1, n, stopped)
                )
                three.abort(0, 1)
                attempt = 2
            three.everybody(0, batches, attempt)
            three.commit(0, attempt)
            found.append(three.hosted())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def by_length(length: int) -> bytes:
    """A row order that depends on the number of rows only, so that two runs can be compared bit by bit."""
    return random.Random(length).randbytes(length)


def test_the_order_of_arrival_changes_no_bit() -> None:
    batches = {name: batches_of(seed, micro_batches=4) for seed, name in enumerate(PARTIES)}
    trunks, experts = [], []
    for in_flight in (1, 3):
        with world(in_flight=in_flight, random_bytes=by_length, host_optimizer=Recording) as three:
            jitter = random.Random(in_flight)
            for party in three.parties.values():
                party.scheduler._loss = delayed(party.scheduler._loss, jitter)
            sums = three.everybody(0, batches)
            three.commit(0)
            experts.append(three.summed_gradients())
            trunks.append(
                {
                    (name, key): sums[name].gradients[parameter]
                    for name, party in three.parties.items()
                    for key, parameter in trunk_of(party.model).items()
                    if parameter in sums[name].gradients
                }
            )
    assert all(torch.equal(experts[0][key], experts[1][key]) for key in experts[0])
    assert all(torch.equal(trunks[0][key], trunks[1][key]) for key in trunks[0])


def delayed(loss: Any, jitter: random.Random) -> Any:
    def later(batch: Batch) -> tuple[Tensor, int]:
        time.sleep(jitter.random() / 50)
        return loss(batch)

    return later


# ---- who holds and sees what --------------------------------------------------------------------------------------


def test_a_party_holds_no_weight_of_an_expert_hosted_elsewhere() -> None:
    with world("olmoe") as three:
        three.only("alder", 0, batches_of(1))
        now = three.hosted()
        for name, party in three.parties.items():
            own = {key for key in party.host.state_dict() if "/" not in key}
            mine = three.placement.hosted(name)
            assert {tuple(map(int, key.split(".")[1:4:2])) for key in own} == {
                (layer, expert) for layer, experts in mine.items() for expert in experts
            }
            held = tensors_behind(party.model, party.cut, party.host, party.exchange, party.optimizer)
            foreign = {key: value for key, value in now.items() if key not in own}
            for value in held:
                for key, weight in foreign.items():
                    if value.shape[-2:] == weight.shape and value.is_floating_point():
                        rows = value.reshape(-1, *weight.shape)
                        assert not any(torch.equal(row, weight) for row in rows), f"{name} holds {key}"


def tensors_behind(*roots: Any) -> list[Tensor]:
    """Every tensor with memory that some objects lead to, closures included, other parties' ends of the hub not."""
    seen: set[int] = set()
    waiting, found = list(roots), []
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | CodeType | InProcessHub | BaseTransport):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            if not one.is_meta:
                found.append(one.detach())
            if one.is_leaf and one.grad is not None:
                waiting.append(one.grad)
        elif isinstance(one, FunctionType):
            waiting += one.__closure__ or ()
        else:
            waiting += gc.get_referents(one)
    return found


def watch(three: TokensWorld) -> list[tuple[str, str, Message]]:
    """Everything that hosts receive from now on, as (host, sender, message)."""
    seen: list[tuple[str, str, Message]] = []
    for name, party in three.parties.items():

        def record(peer: str, lane: Lane, message: Message, name: str = name) -> None:
            seen.append((name, peer, message))

        recorded.watch(party.host, record)
    return seen


def test_a_token_crosses_once_to_each_host_even_for_several_of_its_experts() -> None:
    with world("olmoe") as three:
        seen = watch(three)
        three.only("birch", 0, batches_of(2, micro_batches=1))
        dispatched = [message for _, peer, message in seen if message.kind == "dispatch" and peer == "birch"]
        assert len(dispatched) == 3 * 2  # layers times other hosts: each is asked once
        for message in dispatched:
            hidden, counts, ids, weights = message.tensors
            assert len(hidden.unique(dim=0)) == len(hidden)
            assert len(ids) == len(weights) == int(counts.sum())
        assert any(int(message.tensors[1].max()) > 1 for message in dispatched)


def test_rows_leave_in_a_random_order_that_changes_nothing() -> None:
    batches = batches_of(2, micro_batches=1)
    orders, results = [], []
    for seed in (1, 2):
        with world("olmoe", seed=seed, host_optimizer=Recording) as three:
            seen = watch(three)
            three.only("birch", 0, batches)
            orders.append(next(m.tensors[0] for n, _, m in seen if m.kind == "dispatch" and n == "alder"))
            results.append(three.summed_gradients())
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0].sort(dim=0).values, orders[1].sort(dim=0).values)
    assert_equal(results[0], results[1])


def test_the_order_of_rows_comes_from_the_operating_system_and_is_fresh_each_time() -> None:
    with world("olmoe") as three:
        alder = three.parties["alder"]
        exchange = TokensOwner(alder.transport, alder.host, alder.cut.layers, three.placement)
        assert exchange.random_bytes is os.urandom
        batch = exchange.training(0, 0, 0)
        first, second = batch._random_order(64), batch._random_order(64)
        assert not torch.equal(first, second)
        assert torch.equal(first.sort().values, torch.arange(64))


@pytest.mark.parametrize("combine", ["host", "owner"])
def test_little_more_crosses_than_the_rows_that_must(combine: str) -> None:
    with world("olmoe", combine=combine, sizes={"hidden_size": 128}) as three:
        seen = watch(three)
        three.only("birch", 0, batches_of(2, micro_batches=1, sequences=8, length=48))
        rows = 0
        for _, _, message in seen:
            if message.kind == "dispatch":
                hidden, _, ids = message.tensors[:3]
                # Out and back in the forward, and out and back in the backward: 2 are per token, 2 as combined.
                rows += 2 * len(hidden) + 2 * (len(hidden) if combine == "host" else len(ids))
        lanes = [
            party.transport.counters().total(lane=lane)
            for party in three.parties.values()
            for lane in (Lane.FORWARD, Lane.BACKWARD)
        ]
        payload = sum(counters.payload_bytes_sent for counters in lanes)
        assert payload <= 1.03 * rows * 128 * 4


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_host_that_does_not_answer_is_named_with_round_and_layer() -> None:
    with world("olmoe") as three:
        three.begin(7)
        alder = three.parties["alder"]
        alder.exchange.deadline_s = 0.3
        release = threading.Event()
        recorded.watch(three.parties["cedar"].host, lambda *_: release.wait(10))
        with pytest.raises(DeadlineError) as caught:
            alder.compute(7, 0, batches_of(1))
        release.set()
        assert caught.value.code == "exchange-deadline"
        assert "cedar" in str(caught.value)
        assert "round 7" in str(caught.value)
        assert "layer 0" in str(caught.value)


def test_an_error_in_one_micro_batch_ends_the_others() -> None:
    with world("olmoe", in_flight=3) as three:
        three.begin(0)
        alder = three.parties["alder"]
        calls = iter(range(100))

        def loss(batch: Batch) -> tuple[Tensor, int]:
            if next(calls) == 2:
                raise ValueError("the third one breaks")
            return loss_sum(alder.model, batch)

        alder.scheduler._loss = loss
        with pytest.raises(ValueError, match="third"):
            alder.compute(0, 0, batches_of(1, micro_batches=6))
        assert next(calls) < 6
        three.abort(0)
        three.begin(0, 1)
        alder.compute(0, 1, batches_of(1, micro_batches=6))


def test_a_round_can_be_interrupted_while_it_waits_for_a_host() -> None:
    with world("olmoe") as three:
        for name in ("alder", "birch"):
            three.parties[name].host.begin(0, 0)  # cedar never begins, and lets messages wait
        alder = three.parties["alder"]
        caught: list[BaseException] = []

        def compute() -> None:
            try:
                alder.compute(0, 0, batches_of(1))
            except CoterieError as error:
                caught.append(error)

        thread = threading.Thread(target=compute)
        thread.start()
        while not three.parties["birch"].host._kept:
            time.sleep(0.01)
        alder.scheduler.cancel()
        thread.join(60)
        assert not thread.is_alive()
        assert isinstance(caught[0], RoundError)
        three.abort(0)


def test_a_host_that_is_gone_is_an_error_and_no_hang() -> None:
    with world("olmoe") as three:
        three.begin(0)
        three.parties["cedar"].transport.close()
        with pytest.raises(TransportError):
            three.parties["alder"].compute(0, 0, batches_of(1))


def test_a_placement_that_does_not_fit_is_refused() -> None:
    with world("olmoe") as three:
        alder = three.parties["alder"]
        other_model = Placement.round_robin(PARTIES, [4, 4, 4])
        other_shard = Placement.round_robin(PARTIES[::-1], [8, 8, 8])
        for placement, code in ((other_model, "placement-unfit"), (other_shard, "placement-unfit")):
            with pytest.raises(PlacementError) as caught:
                TokensOwner(alder.transport, alder.host, alder.cut.layers, placement)
            assert caught.value.code == code
        swapped = Placement.of_hosted(
            {
                "alder": three.placement.hosted("birch"),
                "birch": three.placement.hosted("alder"),
                "cedar": three.placement.hosted("cedar"),
            },
            PARTIES,
            [8, 8, 8],
        )
        with pytest.raises(PlacementError) as caught:
            TokensOwner(alder.transport, alder.host, alder.cut.layers, swapped)
        assert caught.value.code == "placement-shard"
