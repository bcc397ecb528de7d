"""An expert host answers what it was asked, keeps what a backward needs within bounds, and refuses the rest."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.errors import CheckpointError, CoterieError, MessageError, ModelError, RoundError
from coterie.federation.shard import Shard
from coterie.federation.tokens.host import DISPATCH, GRADIENT, TOKENS, CallId, TokensHost, TokensHostLimits
from coterie.federation.tokens.host_math import Rows
from coterie.federation.tokens.staging import PartyStage
from coterie.federation.wire.transport import Address, Lane, Message
from coterie.models.seam import ExpertsCall, LocalExperts, expert_layers
from coterie.models.zoo.tiny import tiny_model
from coterie.training.optim import make_optimizer
from helpers.tokens_host import HOSTED, dispatch, make_host, rows, shard_weights
from helpers.tokens_world import PARTIES, SPEC, Recording


def exchange(micro_batch: int = 0, layer: int = 0, party: str = "birch", attempt: int = 0, number: int = 0) -> CallId:
    return CallId(party, Address(attempt=attempt, micro_batch=micro_batch, layer=layer, call=number))


def code_of(action: Callable[[], Any]) -> str:
    with pytest.raises(CoterieError) as caught:
        action()
    return caught.value.code


# ---- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_forward_and_backward_are_those_of_autograd(family: str, weighted: bool, recompute: bool) -> None:
    host = make_host(family, Recording, recompute=recompute)
    host.begin(0, 0)
    part = rows(weighted=weighted)
    layer = expert_layers(tiny_model(family))[0]
    # The reference sees every pair as a token of its own with one expert.
    token_P = torch.repeat_interleave(torch.arange(7), part.counts_M)
    x_MD = part.x_MD.clone().requires_grad_()
    routing_weights_P = (part.routing_weights_P if weighted else torch.ones(len(token_P))).clone().requires_grad_()
    call = ExpertsCall(layer, x_MD[token_P], part.ids_P.view(-1, 1), routing_weights_P.view(-1, 1))
    out_PD = LocalExperts()(call)
    expected = torch.zeros_like(x_MD).index_add(0, token_P, out_PD) if weighted else out_PD
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(grad)

    got = host.forward(exchange(), part, keep=True)
    grad_x_MD, grad_weights_P = host.backward(exchange(), grad)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_x_MD, x_MD.grad, rtol=1e-5, atol=1e-6)
    if weighted:
        torch.testing.assert_close(grad_weights_P, routing_weights_P.grad, rtol=1e-5, atol=1e-6)
    else:
        assert grad_weights_P is None
    for party in PARTIES:
        host.tokens(party, 0, 0, 10 if party == "birch" else 0)
    host.commit(0, 0)
    found = dict(zip(layer.layout.parameter_names, host.shard._optimizer.steps[-1], strict=False))
    for name, stacked in layer.parameters().items():
        torch.testing.assert_close(found[name] * 10, stacked.grad[list(HOSTED)], rtol=1e-5, atol=1e-6)


def test_bfloat16_experts_answer_in_bfloat16_and_stage_in_float32() -> None:
    layers = expert_layers(tiny_model("olmoe"))
    weights = {key: value.bfloat16() for key, value in shard_weights().items()}
    host = TokensHost("alder", PARTIES, layers, Shard(layers, weights, Recording))
    host.begin(0, 0)
    part = rows(dtype=torch.bfloat16)
    exact = make_host().forward(exchange(), rows(), keep=False)
    got = host.forward(exchange(), part, keep=True)
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() < 2e-2 * exact.norm()
    host.backward(exchange(), torch.ones_like(got))
    assert all(value.dtype == torch.float32 for value in host._stages["birch"].sums(0).values())


def test_a_micro_batch_without_a_token_for_this_host_only_counts() -> None:
    host = make_host()
    host.begin(0, 0)
    nothing = Rows(
        torch.empty(0, 32), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
    )
    assert host.forward(exchange(), nothing, keep=True).shape == (0, 32)
    grad_x_MD, grad_weights_P = host.backward(exchange(), torch.empty(0, 32))
    assert grad_x_MD.shape == (0, 32)
    assert grad_weights_P is not None
    assert grad_weights_P.shape == (0,)
    host.tokens("birch", 0, 0, 0)


# ---- rounds -------------------------------------------------------------------------------------------------------


def contribute(host: TokensHost, party: str = "birch", attempt: int = 0, seed: int = 0) -> None:
    for layer in (0, 1):
        out = host.forward(exchange(layer=layer, party=party, attempt=attempt), rows(seed), keep=True)
        host.backward(exchange(layer=layer, party=party, attempt=attempt), torch.ones_like(out))


def declare(host: TokensHost, attempt: int = 0, count: int = 5) -> None:
    for party in PARTIES:
        host.tokens(party, 0, attempt, count)


def test_commit_can_be_repeated_and_steps_once() -> None:
    host = make_host(optimizer=Recording)
    host.begin(0, 0)
    contribute(host)
    declare(host)
    host.commit(0, 0)
    host.commit(0, 0)
    assert len(host.shard._optimizer.steps) == 1


def test_a_round_cannot_commit_before_all_parties_have_declared() -> None:
    host = make_host(optimizer=Recording)
    host.begin(0, 0)
    contribute(host)
    host.tokens("birch", 0, 0, 5)
    assert host.missing() == ("alder", "cedar")
    with pytest.raises(RoundError, match="alder, cedar") as caught:
        host.commit(0, 0)
    assert caught.value.code == "round-incomplete"
    assert not host.shard._optimizer.steps


def test_closed_host_lets_nobody_wait_for_a_round_that_will_not_begin() -> None:
    host = make_host(limits=TokensHostLimits(begin_s=600.0))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(host.tokens, "birch", 3, 1, 5)
        host.close()
        assert code_of(waiting.result) == "host-closed"


def test_a_party_that_is_absent_by_agreement_is_not_waited_for() -> None:
    host = make_host(optimizer=Recording)
    host.begin(0, 0, parties=("alder", "birch"))
    contribute(host)
    host.tokens("alder", 0, 0, 0)
    host.tokens("birch", 0, 0, 5)
    assert code_of(lambda: host.forward(exchange(party="cedar"), rows(), keep=True)) == "party-not-in-round"
    host.commit(0, 0)


def test_a_party_with_an_open_exchange_cannot_declare_its_round_finished() -> None:
    host = make_host()
    host.begin(0, 0)
    host.forward(exchange(), rows(), keep=True)
    assert code_of(lambda: host.tokens("birch", 0, 0, 5)) == "round-incomplete"


def test_tokens_cannot_be_declared_twice_differently_or_below_zero() -> None:
    host = make_host()
    host.begin(0, 0)
    host.tokens("birch", 0, 0, 5)
    host.tokens("birch", 0, 0, 5)
    assert code_of(lambda: host.tokens("birch", 0, 0, 6)) == "tokens-changed"
    assert code_of(lambda: host.tokens("cedar", 0, 0, -1)) == "message-unfit"
    assert code_of(lambda: host.forward(exchange(), rows(), keep=True)) == "micro-batch-over"


def test_an_abort_drops_what_was_staged_and_kept_and_refuses_what_comes_late() -> None:
    host = make_host(optimizer=Recording)
    host.begin(0, 0)
    contribute(host, seed=3)
    out = host.forward(exchange(micro_batch=1), rows(), keep=True)
    host.drop(0, 0)
    assert not host._kept
    assert not host._stages
    assert code_of(lambda: host.backward(exchange(micro_batch=1), torch.ones_like(out))) == "round-over"
    assert code_of(lambda: host.forward(exchange(), rows(), keep=True)) == "round-over"
    assert code_of(lambda: host.begin(0, 0)) == "round-over"
    assert code_of(lambda: host.commit(0, 0)) == "round-over"
    host.begin(0, 1)
    contribute(host, attempt=1)
    declare(host, attempt=1)
    host.commit(0, 1)
    other = make_host(optimizer=Recording)
    other.begin(0, 0)
    contribute(other)
    declare(other)
    other.commit(0, 0)
    for one, two in zip(host.shard._optimizer.steps[0], other.shard._optimizer.steps[0], strict=True):
        assert torch.equal(one, two)


def test_a_message_of_a_round_that_begins_late_here_waits_for_it() -> None:
    host = make_host()
    answers: list[Tensor] = []
    thread = threading.Thread(target=lambda: answers.append(host.forward(exchange(), rows(), keep=True)))
    thread.start()
    host.begin(0, 0)
    thread.join(60)
    assert len(answers) == 1


def test_a_message_of_a_round_that_never_begins_here_is_refused() -> None:
    host = make_host(limits=TokensHostLimits(begin_s=0.05))
    assert code_of(lambda: host.forward(exchange(), rows(), keep=True)) == "round-not-begun"


def test_a_backward_without_a_forward_or_a_second_one_is_refused() -> None:
    host = make_host()
    host.begin(0, 0)
    assert code_of(lambda: host.backward(exchange(), torch.ones(7, 32))) == "exchange-unknown"
    out = host.forward(exchange(), rows(), keep=True)
    assert code_of(lambda: host.backward(exchange(), torch.ones(3, 32))) == "exchange-unfit"
    host.backward(exchange(), torch.ones_like(out))
    assert code_of(lambda: host.backward(exchange(), torch.ones_like(out))) == "exchange-unknown"


def test_the_same_exchange_twice_is_refused() -> None:
    host = make_host()
    host.begin(0, 0)
    host.forward(exchange(), rows(), keep=True)
    assert code_of(lambda: host.forward(exchange(), rows(), keep=True)) == "exchange-twice"


def test_a_peer_cannot_make_a_host_keep_more_than_its_share() -> None:
    one, width = rows(), shard_weights()["layer.0.expert.3.gate_up_proj"].shape[0]
    host = make_host(limits=TokensHostLimits(kept_bytes=3 * (one.num_bytes + len(one.ids_P) * width * 4)))
    host.begin(0, 0)
    for number in range(3):
        host.forward(exchange(number), rows(), keep=True)
    assert code_of(lambda: host.forward(exchange(3), rows(), keep=True)) == "exchange-too-large"
    host.forward(exchange(party="cedar"), rows(), keep=True)  # the others have their own share
    host.backward(exchange(0), torch.ones(7, 32))
    host.forward(exchange(3), rows(), keep=True)
    assert code_of(lambda: host.forward(exchange(4), rows(tokens=10_000), keep=False)) == "exchange-too-large"


def test_a_peer_cannot_begin_micro_batches_without_end() -> None:
    host = make_host(limits=TokensHostLimits(ahead=2))
    host.begin(0, 0)
    host.forward(exchange(0), rows(), keep=True)
    host.forward(exchange(1), rows(), keep=True)
    assert code_of(lambda: host.forward(exchange(2), rows(), keep=True)) == "micro-batch-ahead"


# ---- sums ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 2))
def test_staged_sums_have_the_same_bits_in_any_order_of_arrival(
    seed: int, micro_batches: int, exchanges: int
) -> None:
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    keys = [(m, x) for m in range(micro_batches) for x in range(exchanges)]
    share = {key: {"w": torch.randn(5, generator=generator)} for key in keys}
    expected = torch.zeros(5)
    for key in keys:
        expected = expected + share[key]["w"]

    stage = PartyStage("birch", max_ahead=micro_batches)
    # Any interleaving of micro-batches in which each makes all its forwards, then its backwards in order.
    left = {
        m: [("begin", x) for x in range(exchanges)] + [("finish", x) for x in range(exchanges)]
        for m in range(micro_batches)
    }
    while left:
        m = chance.choice(list(left))
        action, x = left[m].pop(0)
        if action == "begin":
            stage.begin(0, m)
        else:
            stage.finish(0, m, share[m, x])
        if not left[m]:
            del left[m]
    stage.declare(1)
    assert torch.equal(stage.sums(0)["w"], expected)


# ---- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"x_MD": torch.zeros(7, 31)}, "exchange-unfit"),
        ({"x_MD": torch.zeros(7, 32, dtype=torch.int64)}, "exchange-unfit"),
        ({"x_MD": torch.zeros(6, 32)}, "exchange-unfit"),
        ({"counts_M": torch.zeros(7, dtype=torch.int64)}, "exchange-unfit"),
        ({"counts_M": torch.full((7,), 9)}, "exchange-unfit"),
        ({"ids_P": torch.zeros(2, dtype=torch.int64)}, "exchange-unfit"),
        ({"routing_weights_P": torch.zeros(2)}, "exchange-unfit"),
        ({"ids_P": torch.full((int(rows().counts_M.sum()),), 8)}, "exchange-unfit"),
        ({"ids_P": torch.full((int(rows().counts_M.sum()),), -1)}, "exchange-unfit"),
        ({"ids_P": torch.full((int(rows().counts_M.sum()),), 1)}, "expert-not-hosted"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_leave_nothing(change: dict[str, Tensor], code: str) -> None:
    host = make_host()
    host.begin(0, 0)
    part = replace(rows(), **change)
    assert code_of(lambda: host.forward(exchange(), part, keep=True)) == code
    assert not host._kept
    assert not host._reserved["birch"]
    host.tokens("birch", 0, 0, 1)


@pytest.mark.parametrize(
    "message",
    [
        dispatch(rows(), layer=2),
        dispatch(rows(), layer=99),
        Message(DISPATCH, body={"keep": True}, tensors=(torch.zeros(1, 32),)),
        Message(DISPATCH, body={}, tensors=dispatch(rows()).tensors),
        Message(DISPATCH, body={"keep": True}, tensors=(rows().x_MD, rows().counts_M, rows().ids_P)),
        Message(GRADIENT),
        Message(TOKENS, body={"count": "many"}),
        Message(TOKENS, body={"count": True}),
        Message("surprise"),
    ],
)
def test_messages_that_do_not_fit_are_refused(message: Message) -> None:
    host = make_host()
    host.begin(0, 0)
    lane = Lane.BACKWARD if message.kind in (GRADIENT, TOKENS) else Lane.FORWARD
    with pytest.raises(MessageError) as caught:
        host.handle("birch", lane, message)
    assert caught.value.peer == "birch"
    assert caught.value.code == ("exchange-unfit" if message.address.layer == 2 else "message-unfit")


# ---- shard and checkpoints ----------------------------------------------------------------------------------------


def trained() -> TokensHost:
    host = make_host()
    host.begin(0, 0)
    contribute(host)
    declare(host)
    host.commit(0, 0, 1e-3)
    return host


def test_a_checkpoint_holds_hosted_experts_and_their_optimiser_state_by_global_key() -> None:
    state = trained().state_dict()
    assert {key for key in state if "/" not in key} == set(shard_weights())
    assert {key.split("/")[1] for key in state if "/" in key} == {"exp_avg", "exp_avg_sq", "step"}
    assert all(state[f"{key}/exp_avg"].shape == state[key].shape for key in shard_weights())


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped() -> None:
    host = trained()
    state = {key: value.clone() for key, value in host.state_dict().items()}
    resumed = make_host()
    resumed.load_state_dict(state)
    for one in (host, resumed):
        one.begin(1, 0)
        for layer in (0, 1):
            where = CallId("birch", Address(round=1, layer=layer))
            one.backward(where, torch.ones_like(one.forward(where, rows(8), keep=True)))
        for party in PARTIES:
            one.tokens(party, 1, 0, 3)
        one.commit(1, 0, 1e-3)
    after = host.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in resumed.state_dict().items())
    assert after.keys() == resumed.state_dict().keys()


def test_after_a_checkpoint_was_loaded_its_rounds_can_be_repeated() -> None:
    host = trained()
    host.load_state_dict({key: value.clone() for key, value in host.state_dict().items()})
    host.begin(0, 0)


@pytest.mark.parametrize("problem", ["missing", "foreign", "shape"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(problem: str) -> None:
    host = trained()
    state = {key: value.clone() for key, value in host.state_dict().items()}
    before = {key: value.clone() for key, value in state.items()}
    if problem == "missing":
        del state["layer.0.expert.3.down_proj"]
    elif problem == "foreign":
        state["layer.0.expert.1.down_proj"] = state["layer.0.expert.3.down_proj"]
    else:
        state["layer.0.expert.3.down_proj"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError) as caught:
        host.load_state_dict(state)
    assert caught.value.code == "checkpoint-experts"
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer.0.expert.3.down_proj", None),
        ("layer.0.expert.3.down_proj", torch.zeros(3, 3)),
        ("layer.0.expert.9.down_proj", torch.zeros(32, 16)),
        ("layer.7.expert.0.down_proj", torch.zeros(32, 16)),
        ("layer.0.expert.3.sideways", torch.zeros(32, 16)),
        ("model.embed_tokens.weight", torch.zeros(3, 3)),
    ],
)
def test_a_shard_that_does_not_fit_the_model_is_refused_by_key(key: str, value: Tensor | None) -> None:
    weights: dict[str, Tensor] = shard_weights()
    if value is None:
        del weights[key]
    else:
        weights[key] = value
    with pytest.raises(ModelError, match=key.replace(".", r"\.")) as caught:
        Shard(expert_layers(tiny_model("olmoe")), weights, Recording)
    assert caught.value.code == ("host-shard" if key.startswith("layer.") else "model-bad-shard")


def test_a_second_copy_for_computing_follows_the_stored_weights() -> None:
    layers = expert_layers(tiny_model("olmoe"))
    shard = Shard(layers, shard_weights(), lambda params: make_optimizer(params, SPEC))
    shard._computing = {0: {n: v.clone() for n, v in shard.weights(0).items()}, 1: shard.weights(1)}
    before = shard.weights(0)["down_proj"].clone()
    shard.gradient(0, "down_proj").fill_(1.0)
    shard.step(1e-3)
    assert not torch.equal(shard.weights(0)["down_proj"], before)
    assert torch.equal(shard.weights(0)["down_proj"], shard._stored[0]["down_proj"])
