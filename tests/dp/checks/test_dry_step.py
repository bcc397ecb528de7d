"""Every release is applied once: optimizers and hooks under which it would not be are refused at set-up."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from coterie import dp
from coterie.config import OptimSpec
from coterie.dp.checks.dry_step import check_optimizer_step
from coterie.dp.session import put_gradient
from coterie.errors import PrivacyError
from coterie.training.optim import AdamW


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4, dtype=dtype)
        self.out = nn.Linear(4, 9, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(9, dtype=dtype))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.table(input_ids)) * self.scale


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(
        model(batch["input_ids"]).transpose(1, 2), batch["input_ids"], reduction="none"
    ).mean(1)


def start(tmp_path: Path, model: nn.Module, optimizer: Any, **more: Any) -> Any:
    data = [{"input_ids": torch.arange(4) + i % 5} for i in range(20)]
    return dp.make_private(
        model,
        optimizer,
        data,
        loss_fn=loss,
        budget=dp.Budget(8.0, 1e-3),
        lot_size=4,
        rounds=4,
        ledger=tmp_path,
        **more,
    )


class Accumulating(torch.optim.AdamW):
    """Adds up ``every`` gradients and steps with their mean, the first time at once or not."""

    def __init__(self, params: Any, every: int = 4, first: bool = False) -> None:
        super().__init__(params, lr=0.1)
        self.every, self.calls = every, -int(first)

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure) if self.calls % self.every == 0 else None


class Sharp(torch.optim.SGD):
    """Wants a second forward and backward, as SAM does."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        closure()
        return super().step()


class Wrapped:
    """An optimizer around another one that is no torch optimizer itself."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self) -> None:
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad()


class LeavesOut(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["params"][-1].grad = None
        return super().step(closure)


class IgnoresGradients(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.9)


class DecaysAll(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.9)


REFUSED = {
    "accumulates": lambda m: Accumulating(m.parameters()),
    "accumulates after the first": lambda m: Accumulating(m.parameters(), first=True),
    "accumulates inside": lambda m: Wrapped(Accumulating(m.parameters(), 2, first=True)),
    "closure": lambda m: Sharp(m.parameters(), 0.1),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters()),
    "sparse": lambda m: torch.optim.SparseAdam(list(m.parameters())),
    "leaves one out": lambda m: LeavesOut(m.parameters(), 0.1),
    "ignores gradients": lambda m: IgnoresGradients(m.parameters(), 0.1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_do_not_apply_each_release_are_refused(tmp_path: Path, name: str) -> None:
    model = Net()
    before, optimizer = copy.deepcopy(model.state_dict()), REFUSED[name](model)
    with pytest.raises(PrivacyError) as caught:
        start(tmp_path, model, optimizer)
    assert caught.value.code == "dp-optimizer-step"
    assert type(optimizer).__name__ in caught.value.message
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def scheduled(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    return optimizer


TAKEN = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1),
    "rate zero at first": scheduled,
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters()),
    "radam": lambda m: torch.optim.RAdam(m.parameters()),
    "rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "adafactor": lambda m: Adafactor(m.parameters()),
    "averaged": lambda m: torch.optim.ASGD(m.parameters()),
    "wrapped": lambda m: Wrapped(torch.optim.Adagrad(m.parameters())),
    "two groups": lambda m: torch.optim.Adam(
        [{"params": [m.scale], "lr": 1e-9}, {"params": [*m.table.parameters(), *m.out.parameters()]}]
    ),
    "coterie's own": lambda m: AdamW(m.parameters(), OptimSpec()),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_that_step_are_taken_and_left_as_they_were(name: str, dtype: torch.dtype) -> None:
    model = Net(dtype)
    optimizer = TAKEN[name](model)
    weights = copy.deepcopy(model.state_dict())
    check_optimizer_step(model, optimizer, put_gradient)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not getattr(optimizer, "state", None)


def test_the_trial_holds_one_copy_of_the_model_at_a_time() -> None:
    model, alive = Net(), set[int]()
    most = 0

    def put(optimizer: Any, parameter: Tensor, gradient: Tensor) -> None:
        nonlocal most
        if id(optimizer) not in alive:
            alive.add(id(optimizer))
            weakref.finalize(optimizer, alive.discard, id(optimizer))
        most = max(most, len(alive))
        put_gradient(optimizer, parameter, gradient)

    check_optimizer_step(model, AdamW(model.parameters(), OptimSpec()), put)
    assert most == 1


class Mine(torch.optim.SGD):
    """May do whatever it likes with the size of a parameter."""


@pytest.mark.parametrize(("kind", "few"), [(torch.optim.AdamW, True), (torch.optim.SGD, True), (Mine, False)])
def test_the_trial_of_an_optimizer_that_is_known_needs_a_few_rows(kind: Any, few: bool) -> None:
    model, sizes = nn.Linear(300, 200), set[int]()

    def put(optimizer: Any, parameter: Tensor, gradient: Tensor) -> None:
        sizes.add(parameter.numel())
        put_gradient(optimizer, parameter, gradient)

    optimizer = kind(model.parameters(), lr=0.1)
    check_optimizer_step(model, optimizer, put)
    assert sizes == ({300, 200} if few else {300 * 200, 200})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_released_gradient_is_handed_over_not_copied(dtype: torch.dtype) -> None:
    model = Net(dtype)
    optimizer = AdamW(model.parameters(), OptimSpec(lr=0.1))
    mean = torch.randn(model.out.weight.shape)
    put_gradient(optimizer, model.out.weight, mean)
    assert optimizer.gradient(model.out.weight).data_ptr() == mean.data_ptr()
    before = model.out.weight.detach().clone()
    optimizer.step()
    moved = (model.out.weight - before).float()
    assert bool(((moved * mean) < 0).all())


def test_a_frozen_parameter_that_an_optimizer_moves_is_refused() -> None:
    model = Net()
    model.table.requires_grad_(False)
    check_optimizer_step(model, torch.optim.AdamW(model.parameters(), weight_decay=0.5), put_gradient)
    with pytest.raises(PrivacyError, match=r"DecaysAll moves `table\.weight`, which is frozen"):
        check_optimizer_step(model, DecaysAll(model.parameters(), 0.1), put_gradient)


def test_accelerate_s_wrapper_may_leave_no_step_out(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    for every in (1, 4):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        model = Net()
        optimizer = Accelerator(gradient_accumulation_steps=every, cpu=True).prepare(
            torch.optim.SGD(model.parameters(), 0.1)
        )
        if every == 1:
            start(tmp_path, model, optimizer).close()
            continue
        with pytest.raises(PrivacyError, match="every 4 batches"):
            start(tmp_path, model, optimizer)
    AcceleratorState._reset_state()
    GradientState._reset_state()


HOOKS = {
    "gradient": lambda m: m.out.weight.register_hook(lambda g: g * 0),
    "accumulated": lambda m: m.out.weight.register_post_accumulate_grad_hook(lambda p: p.grad.zero_()),
    "module": lambda m: m.out.register_full_backward_hook(lambda *_: None),
    "module before": lambda m: m.table.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_gradients_are_refused_at_set_up_and_when_they_come_late(tmp_path: Path, kind: str) -> None:
    model = Net()
    handle = HOOKS[kind](model)
    with pytest.raises(PrivacyError, match="has a hook on its gradient") as caught:
        start(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1))
    assert caught.value.code == "dp-gradient-hook"
    handle.remove()
    with start(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1)) as session:
        session.step(session.next_lot())
        HOOKS[kind](model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(PrivacyError, match="has a hook on its gradient"):
            session.step(session.next_lot())
        assert session.releases.used == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_way_out_holds_rows_still(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    keep = torch.zeros(9, 1)
    keep[7:] = 1

    def hold(stepped: Any, *_: Any) -> None:
        for group in stepped.param_groups:
            for parameter in group["params"]:
                if parameter.shape == (9, 4) and parameter.grad is not None:
                    parameter.grad.mul_(keep)

    optimizer.register_step_pre_hook(hold)
    start_weights = model.out.weight.detach().clone()
    with start(tmp_path, model, optimizer) as session:
        for lot in session:
            session.step(lot)
    moved = (model.out.weight.detach() != start_weights).any(1)
    assert moved.tolist() == [False] * 7 + [True] * 2
