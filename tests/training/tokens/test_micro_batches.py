"""Micro-batches in flight: as many as asked, one computing, sums in their order, and an end that does not hang."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from coterie.errors import RoundError
from coterie.models.cut.cut_model import Cut
from coterie.models.seam import ExpertLayer, ExpertsCall, LocalExperts, select
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.training.tokens.micro_batches import Scheduler
from coterie.training.tokens.ordered_sums import OrderedSums


class SlowLocal:
    """Local experts behind a wait of random length. Gradients by autograd: there is no host here to compute them."""

    def __init__(self, wait_s: Callable[[], float] = lambda: 0.0) -> None:
        self._wait_s = wait_s

    def answers_rows(self, layer: ExpertLayer) -> bool:
        return False

    def forward(self, call: ExpertsCall, keep: bool) -> tuple[Tensor, Any]:
        time.sleep(self._wait_s())
        with torch.enable_grad():
            hidden, weights = (
                call.hidden_ND.detach().requires_grad_(),
                call.routing_weights_NK.detach().requires_grad_(),
            )
            out = LocalExperts()(ExpertsCall(call.layer, hidden, call.expert_ids_NK, weights))
        return out.detach().clone(), (hidden, weights, out)

    def backward(self, ticket: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        time.sleep(self._wait_s())
        hidden, weights, out = ticket
        found = torch.autograd.grad(out, [hidden, weights], grad)
        return found[0], found[1]


def batches(count: int) -> list[Tensor]:
    return list(torch.randint(3, VOCAB, (count, 2, 10), generator=torch.Generator().manual_seed(2)))


def loss_of(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, int]]:
    def loss(ids: Tensor) -> tuple[Tensor, int]:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"), 18

    return loss


def frozen_experts(**settings: Any) -> nn.Module:
    model = tiny_model("olmoe", **settings).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    return model


@pytest.mark.parametrize("in_flight", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_sums_are_those_of_plain_backward(in_flight: int, tied: bool) -> None:
    model = frozen_experts(tie_word_embeddings=tied)
    select(model)
    for ids in batches(5):
        loss_of(model)(ids)[0].backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    sums = Scheduler(Cut(model), loss_of(model), in_flight).run(batches(5), lambda number, stopped: SlowLocal())
    assert sums.tokens == 5 * 18
    assert len(sums.losses) == 5
    for name, reference in expected.items():
        parameter = model.get_parameter(name)
        assert parameter.grad is None
        assert (sums.gradients[parameter] - reference).norm() <= 1e-5 * reference.norm(), name


@pytest.mark.parametrize("tied", [False, True])
def test_timing_changes_no_bit_of_losses_and_sums(tied: bool) -> None:
    model = frozen_experts(tie_word_embeddings=tied, attention_dropout=0.2)
    cut = Cut(model)
    found = []
    for in_flight, seed in ((1, 0), (2, 1), (3, 2), (3, 3)):
        chance = random.Random(seed)
        exchange = SlowLocal(lambda chance=chance: chance.random() / 100)
        found.append(Scheduler(cut, loss_of(model), in_flight).run(batches(5), lambda n, s, e=exchange: e, seed=4))
    for other in found[1:]:
        assert other.losses == found[0].losses
        assert all(torch.equal(value, other.gradients[key]) for key, value in found[0].gradients.items())


def test_narrow_parameters_are_summed_in_float32() -> None:
    model = frozen_experts(dtype=torch.bfloat16)
    sums = Scheduler(Cut(model), loss_of(model)).run(batches(2), lambda number, stopped: SlowLocal())
    assert {value.dtype for value in sums.gradients.values()} == {torch.float32}


def test_one_computes_while_another_waits_and_no_more_are_in_flight_than_asked() -> None:
    model = frozen_experts()
    both = threading.Barrier(2)
    lock, inside, most = threading.Lock(), 0, 0

    class Meet(SlowLocal):
        def forward(self, call: ExpertsCall, keep: bool) -> tuple[Tensor, Any]:
            both.wait(20)  # passes only if two micro-batches are on the wire at once
            return super().forward(call, keep)

    plain = loss_of(model)

    def loss(ids: Tensor) -> tuple[Tensor, int]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        out = plain(ids)
        with lock:
            inside -= 1
        return out

    Scheduler(Cut(model), loss, 2).run(batches(4), lambda number, stopped: Meet())
    assert most == 2


def test_only_the_holder_of_the_turn_computes() -> None:
    model = frozen_experts()
    computing: list[int] = []

    def enter(*_: Any) -> None:
        computing.append(threading.get_ident())
        time.sleep(0.001)
        assert computing[-1] == threading.get_ident()

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(enter)
    Scheduler(Cut(model), loss_of(model), 3).run(batches(6), lambda n, s: SlowLocal(lambda: 0.001))
    assert len(set(computing)) > 1


class Fails(SlowLocal):
    def __init__(self, error: BaseException, at: str) -> None:
        super().__init__()
        self._error, self._at = error, at

    def forward(self, call: ExpertsCall, keep: bool) -> tuple[Tensor, Any]:
        if self._at == "forward":
            raise self._error
        return super().forward(call, keep)

    def backward(self, ticket: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        raise self._error


class WaitsForEver(SlowLocal):
    """As a host that never answers: only `stopped` ends the wait."""

    def __init__(self, stopped: Future[None]) -> None:
        super().__init__()
        self._stopped = stopped

    def forward(self, call: ExpertsCall, keep: bool) -> tuple[Tensor, Any]:
        wait([self._stopped], timeout=30)
        assert self._stopped.done()
        raise RoundError("stopped", code="round-stopped")


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_an_error_ends_a_micro_batch_that_waits_and_is_the_one_that_is_raised(at: str) -> None:
    model = frozen_experts()
    error = ConnectionError("the wire broke")
    scheduler = Scheduler(Cut(model), loss_of(model), 2)
    with pytest.raises(ConnectionError) as caught:
        scheduler.run(batches(4), lambda n, stopped: Fails(error, at) if n == 1 else WaitsForEver(stopped))
    assert caught.value is error
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(thread.name.startswith("micro-batches") for thread in threading.enumerate())
    # The next attempt is not affected.
    assert scheduler.run(batches(2), lambda number, stopped: SlowLocal()).tokens == 36


def test_an_interrupt_ends_everything() -> None:
    model = frozen_experts()
    scheduler = Scheduler(Cut(model), loss_of(model), 2)
    waiting = threading.Event()

    def exchange(number: int, stopped: Future[None]) -> WaitsForEver:
        waiting.set()
        return WaitsForEver(stopped)

    threading.Thread(target=lambda: waiting.wait(20) and scheduler.cancel()).start()
    with pytest.raises(RoundError) as caught:
        scheduler.run(batches(3), exchange)
    assert caught.value.code == "round-interrupted"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 3))
def test_ordered_sums_have_the_same_bits_in_any_order(seed: int, micro_batches: int, parameters: int) -> None:
    chance = random.Random(seed)
    names = [nn.Parameter(torch.zeros(4)) for _ in range(parameters)]
    shares: dict[int, list[tuple[Tensor, Tensor | None]]] = {
        m: [(p, chance.choice([torch.randn(4), None])) for p in chance.choices(names, k=chance.randrange(4))]
        for m in range(micro_batches)
    }
    expected: dict[Tensor, Tensor] = {}
    for m in range(micro_batches):
        for parameter, grad in shares[m]:
            if grad is not None:
                expected[parameter] = expected[parameter] + grad if parameter in expected else grad.clone()
    sums = OrderedSums()
    left: dict[int, list[Any]] = {m: [None, *share] for m, share in shares.items()}
    while left:
        m = chance.choice(list(left))
        step = left[m].pop(0)
        sink = sums.sink(m)
        if step is None:
            sink.expect(Counter(parameter for parameter, _ in shares[m]))
        else:
            sink.add(*step)
        if not left[m]:
            del left[m]
    found = sums.result()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[parameter], value) for parameter, value in expected.items())


def test_a_gradient_that_two_parameters_share_is_not_written_into() -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    sums, shared = OrderedSums(), torch.ones(3)
    for number in (0, 1):
        sums.expect(number, {first: 1, second: 1})
    sums.add(0, first, shared)
    sums.add(0, second, shared)
    sums.add(1, first, torch.ones(3))
    sums.add(1, second, None)
    assert torch.equal(sums.result()[first], torch.full((3,), 2.0))
    assert torch.equal(sums.result()[second], torch.ones(3))
