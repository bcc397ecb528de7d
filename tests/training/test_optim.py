"""The optimiser equals torch's AdamW in float32, keeps masters in bfloat16, and steps unused parameters too."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from coterie.config import OptimSpec
from coterie.errors import CheckpointError
from coterie.training.optim import CorrectedAdamW, lr_at, make_optimizer, set_lr

SPEC = OptimSpec(lr=0.01, weight_decay=0.1)


def param(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.clone())


def test_float32_steps_equal_torch_adamw() -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]
    ours, theirs = [param(x) for x in start], [param(x) for x in start]
    optimizer = make_optimizer(ours, SPEC)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=SPEC.betas, eps=SPEC.eps, weight_decay=0.1)
    for step in range(10):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for chosen in (optimizer, reference):
            set_lr(chosen, 0.01 / (step + 1))
            chosen.step()
            chosen.zero_grad()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_a_parameter_without_gradient_is_stepped_with_gradient_zero() -> None:
    used, unused, frozen = (param(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = make_optimizer([used, unused, frozen], SPEC)
    used.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(unused.detach(), torch.full((3,), 1 - 0.01 * 0.1))
    assert torch.equal(frozen, torch.ones(3))
    optimizer.zero_grad()
    unused.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    before = unused.detach().clone()
    optimizer.step()
    assert (unused.detach() < before * (1 - 0.01 * 0.1)).all(), "its momentum goes on"


def test_a_slice_of_a_stack_steps_like_the_stack() -> None:
    torch.manual_seed(0)
    stack, grad = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    whole, parts = param(stack), [param(piece) for piece in stack]
    for params, grads in (([whole], [grad]), (parts, list(grad))):
        optimizer = make_optimizer(params, SPEC)
        for _ in range(3):
            for one, its in zip(params, grads, strict=True):
                one.grad = its.clone()
            optimizer.step()
    torch.testing.assert_close(torch.stack([part.detach() for part in parts]), whole.detach(), rtol=1e-6, atol=1e-7)


def test_bfloat16_weights_follow_float32_masters() -> None:
    start = torch.linspace(-1, 1, 64).to(torch.bfloat16)
    low, full = param(start), param(start.float())
    small = OptimSpec(lr=1e-4)
    optimizers = [make_optimizer([one], small) for one in (low, full)]
    for _ in range(50):
        for one, optimizer in zip((low, full), optimizers, strict=True):
            one.grad = torch.ones_like(one)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(low.detach(), full.detach().to(torch.bfloat16), rtol=0, atol=0)
    assert not torch.equal(low, start), "steps of 1e-4 on weights near 1 would be lost in bfloat16 alone"


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    low = param(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = make_optimizer([low], SPEC)
    for _ in range(1000):
        low.grad = torch.ones_like(low)
        optimizer.gather()
    assert optimizer.gradient(low).item() == 1000.0
    assert low.grad is None
    optimizer.zero_grad()
    assert optimizer.gradient(low).item() == 0.0


@pytest.mark.parametrize("way", ["tensors", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_continues_identically(dtype: torch.dtype, way: str) -> None:
    torch.manual_seed(0)
    first = param(torch.randn(6, 2, dtype=dtype))
    optimizer = make_optimizer([first], SPEC)
    first.grad = torch.randn_like(first)
    optimizer.step()
    second = param(first.detach())
    resumed = make_optimizer([second], SPEC)
    if way == "tensors":
        resumed.load_tensors({"w": second}, {k: v.clone() for k, v in optimizer.tensors({"w": first}).items()})
    else:
        resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    grad = torch.randn_like(first)
    for one, chosen in ((first, optimizer), (second, resumed)):
        chosen.zero_grad()
        one.grad = grad.clone()
        chosen.step()
    assert torch.equal(first, second)
    assert ("w/master" in optimizer.tensors({"w": first})) == (dtype is torch.bfloat16)


def test_state_of_another_shape_is_refused() -> None:
    one, other = param(torch.ones(2)), param(torch.ones(3))
    saved = make_optimizer([one], SPEC)
    one.grad = torch.ones(2)
    saved.step()
    with pytest.raises(CheckpointError, match="no fitting `exp_avg` for `w`"):
        make_optimizer([other], SPEC).load_tensors({"w": other}, saved.tensors({"w": one}))


def test_the_rate_warms_up_and_follows_its_schedule() -> None:
    cosine = OptimSpec(lr=1.0, warmup_rounds=4, schedule="cosine", final_lr_ratio=0.2)
    rates = [lr_at(round_no, cosine, 24) for round_no in range(1, 25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.2)
    expected = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 10 / 19))
    assert rates[14] == pytest.approx(expected)
    constant = OptimSpec(lr=1.0, warmup_rounds=2, schedule="constant")
    assert [lr_at(round_no, constant, 5) for round_no in range(1, 6)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert lr_at(1, cosine.model_copy(update={"warmup_rounds": 0}), 1) == 1.0


def test_a_straight_line_to_zero_moves_in_every_round_and_would_reach_zero_in_the_next() -> None:
    linear = OptimSpec(lr=2.0, warmup_rounds=1, schedule="linear")
    assert [lr_at(round_no, linear, 5) for round_no in range(1, 7)] == [2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    alone = OptimSpec(lr=2.0, schedule="linear")
    assert [lr_at(round_no, alone, 4) for round_no in range(1, 5)] == [2.0, 1.5, 1.0, 0.5]
    assert [lr_at(round_no, linear, 1) for round_no in (1, 2)] == [2.0, 2.0]


def test_sgd_steps_equal_torch_sgd_with_decoupled_decay() -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]
    ours, theirs = [param(x) for x in start], [param(x) for x in start]
    optimizer = make_optimizer(ours, OptimSpec(kind="sgd", lr=0.1, momentum=0.8, weight_decay=0.2))
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.8)
    for step in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for chosen in (optimizer, reference):
            set_lr(chosen, 0.1 / (step + 1))
        optimizer.step()
        with torch.no_grad():
            for other in theirs:
                other.mul_(1 - 0.2 * 0.1 / (step + 1))
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sgd_goes_on_from_its_saved_state(dtype: torch.dtype) -> None:
    spec = OptimSpec(kind="sgd", lr=0.01)
    weights = {"a": param(torch.ones(3, dtype=dtype))}
    optimizer = make_optimizer(weights.values(), spec)
    optimizer.gradient(weights["a"]).add_(torch.tensor([1.0, 2.0, -1.0]))
    optimizer.step()
    optimizer.zero_grad()
    again = {"a": param(weights["a"].detach())}
    other = make_optimizer(again.values(), spec)
    other.load_tensors(again, optimizer.tensors(weights))
    for chosen, held in ((optimizer, weights), (other, again)):
        chosen.gradient(held["a"]).add_(1.0)
        chosen.step()
    assert torch.equal(weights["a"], again["a"])
    fresh = make_optimizer([param(weights["a"].detach())], spec)
    assert fresh.param_groups[0]["momentum"] == 0.9


def test_a_corrected_step_is_adam_without_the_noise_in_its_second_moment() -> None:
    torch.manual_seed(0)
    spec = OptimSpec(kind="adamw_corrected", lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, noise_floor=0.5)
    start, std = torch.randn(6, dtype=torch.float64), 0.3
    weights = param(start.float())
    optimizer = make_optimizer([weights], spec)
    assert isinstance(optimizer, CorrectedAdamW)
    optimizer.expect_noise({weights: std})
    expected, mean, square = start.numpy().copy(), np.zeros(6), np.zeros(6)
    for step in range(1, 6):
        gradient = std * torch.randn(6) + 0.5 * torch.arange(6)
        optimizer.gradient(weights).copy_(gradient)
        optimizer.step()
        optimizer.zero_grad()
        g = gradient.double().numpy()
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
        divisor = np.sqrt(np.maximum(square / (1 - 0.99**step) - std**2, 0.5 * std**2)) + spec.eps
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (mean / (1 - 0.9**step)) / divisor
    np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=2e-5, atol=1e-6)


def test_without_noise_a_corrected_step_is_adamws() -> None:
    torch.manual_seed(0)
    ours, theirs = param(torch.ones(4)), param(torch.ones(4))
    corrected, plain = (
        make_optimizer([p], OptimSpec(kind=k)) for p, k in ((ours, "adamw_corrected"), (theirs, "adamw"))
    )
    for _ in range(4):
        gradient = torch.randn(4)
        for optimizer, weights in ((corrected, ours), (plain, theirs)):
            optimizer.gradient(weights).copy_(gradient)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
