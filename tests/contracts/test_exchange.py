"""What computes experts for a cut model keeps the rules of `RowsExchange`: compared with the family's own code."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from coterie.config import OptimSpec
from coterie.federation.shard import Shard
from coterie.federation.tokens.host import TokensHost
from coterie.federation.tokens.owner import TokensOwner
from coterie.federation.wire.in_process import InProcessHub
from coterie.models.cut.cut_model import RowsExchange
from coterie.models.seam import ExpertLayer, ExpertsCall, RoutedRows, expert_layers
from coterie.models.split.placement import Placement
from coterie.models.split.shards import expert_key
from coterie.models.zoo.tiny import tiny_model
from coterie.training.optim import make_optimizer

PARTIES = ("alder", "birch", "cedar")
TOKENS = 11


class Case(NamedTuple):
    """An exchange for one micro-batch after another, and the whole model whose experts it reaches."""

    exchange: Callable[[int], RowsExchange]
    model: nn.Module


def tokens(model: nn.Module, stack: ExitStack, combine: Any, parties: tuple[str, ...] = PARTIES) -> Case:
    """The `tokens` exchange of the first of several parties that host the model's experts in turn."""
    layers = expert_layers(model)
    placement = Placement.round_robin(parties, [layer.num_experts for layer in layers])
    hub = InProcessHub(parties)
    made = []
    for name in parties:
        hosted = {
            expert_key(layer, expert, parameter): value.detach()[expert].clone()
            for layer, experts in placement.hosted(name).items()
            for parameter, value in layers[layer].parameters().items()
            for expert in experts
        }
        shard = Shard(layers, hosted, lambda params: make_optimizer(params, OptimSpec(lr=1e-3)))
        host = TokensHost(name, parties, layers, shard)
        transport = hub.transport(name)
        order = random.Random(name).randbytes
        made.append(TokensOwner(transport, host, layers, placement, combine=combine, random_bytes=order))
    for each in made:
        stack.callback(each.transport.close)
        each.transport.start(each.host.handle)
    for each in made:
        each.transport.connect(10.0)
        each.host.begin(1, 0)
    return Case(lambda number: made[0].training(1, 0, number), model)


KINDS: dict[str, Callable[[nn.Module, ExitStack], Case]] = {
    "tokens, hosts combine": lambda model, stack: tokens(model, stack, "host"),
    "tokens, owner combines": lambda model, stack: tokens(model, stack, "owner"),
    "tokens, one party": lambda model, stack: tokens(model, stack, "host", PARTIES[:1]),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> Callable[[nn.Module, ExitStack], Case]:
    found: Callable[[nn.Module, ExitStack], Case] = request.param
    return found


@pytest.fixture(params=["olmoe", "gpt_oss"])
def case(request: pytest.FixtureRequest, kind: Callable[[nn.Module, ExitStack], Case]) -> Iterator[Case]:
    with ExitStack() as stack:
        yield kind(tiny_model(request.param), stack)


def call_of(layer: ExpertLayer, seed: int = 0) -> ExpertsCall:
    generator = torch.Generator().manual_seed(seed)
    first = layer.parameters()[layer.layout.parameter_names[0]]
    width = first.shape[1 if layer.layout.is_transposed else 2]
    hidden = torch.randn(TOKENS, width, generator=generator)
    ids = torch.stack([torch.randperm(layer.num_experts, generator=generator)[:2] for _ in range(TOKENS)])
    return ExpertsCall(layer, hidden, ids, torch.rand(TOKENS, 2, generator=generator))


def by_the_family(case: Case, call: ExpertsCall) -> tuple[Tensor, Tensor, Tensor]:
    """The family's own eager code: hidden states and routing weights that require gradients, and the output."""
    case.model.set_experts_implementation("eager")  # type: ignore[operator]
    hidden, weights = call.hidden_ND.clone().requires_grad_(), call.routing_weights_NK.clone().requires_grad_()
    return hidden, weights, call.layer.module(hidden, call.expert_ids_NK, weights)


def combined(exchange: RowsExchange, call: ExpertsCall, answer: Tensor, weights: Tensor) -> Tensor:
    """What the layer returns, whoever weights and sums."""
    if not exchange.answers_rows(call.layer):
        return answer
    rows = RoutedRows.of(call.expert_ids_NK, call.layer.num_experts)
    return rows.combine(answer, weights, call.hidden_ND.dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("keep", [True, False])
def test_forward_is_what_the_family_computes_without_history(case: Case, keep: bool) -> None:
    exchange = case.exchange(0)
    for layer in expert_layers(case.model):
        call = call_of(layer)
        answer, _ = exchange.forward(call, keep)
        assert not answer.requires_grad
        _, _, expected = by_the_family(case, call)
        assert_close(combined(exchange, call, answer, call.routing_weights_NK), expected.detach())


def test_backward_gives_the_gradients_of_autograd_also_in_another_order(case: Case) -> None:
    exchange = case.exchange(0)
    asked = []
    for number, layer in enumerate(expert_layers(case.model)):
        call = call_of(layer, seed=number)
        asked.append((call, *exchange.forward(call, True)))
    for call, answer, ticket in reversed(asked):
        hidden, weights, expected = by_the_family(case, call)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
        expected.backward(grad)
        leaf, own_weights = answer.clone().requires_grad_(), call.routing_weights_NK.clone().requires_grad_()
        combined(exchange, call, leaf, own_weights).backward(grad)
        at_answer = leaf.grad if leaf.grad is not None else grad
        grad_hidden, grad_weights = exchange.backward(ticket, at_answer)
        assert hidden.grad is not None
        assert weights.grad is not None
        assert_close(grad_hidden, hidden.grad)
        found = own_weights.grad if grad_weights is None else grad_weights
        assert found is not None
        assert_close(found, weights.grad)


def test_what_is_asked_without_keep_leaves_nothing_behind_for_a_backward(case: Case) -> None:
    exchange, layer = case.exchange(0), expert_layers(case.model)[0]
    first, _ = exchange.forward(call_of(layer), False)
    again, ticket = exchange.forward(call_of(layer), True)
    assert_close(first, again)
    exchange.backward(ticket, torch.zeros_like(again))


def test_a_choice_outside_the_layer_means_no_expert(case: Case) -> None:
    exchange, layer = case.exchange(0), expert_layers(case.model)[0]
    whole = call_of(layer)
    ids = whole.expert_ids_NK.clone()
    ids[3] = layer.num_experts
    call = ExpertsCall(layer, whole.hidden_ND, ids, whole.routing_weights_NK)
    answer, _ = exchange.forward(call, True)
    out = combined(exchange, call, answer, call.routing_weights_NK)
    _, _, expected = by_the_family(case, whole)
    others = torch.arange(TOKENS) != 3
    assert not bool(out[3].any())
    assert_close(out[others], expected.detach()[others])
