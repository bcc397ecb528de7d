"""Owners of parameters: everybody has some, each parameter one, and a checkpoint of all is that of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from coterie.dp import checkpoint
from coterie.dp.ownership import Ownership
from coterie.dp.stepping import check_optimizer, stepping_without
from coterie.errors import PrivacyError
from coterie.models.spread.holdings import Holdings
from coterie.models.spread.spread import spread_experts
from coterie.ranks.ranks import Alone, Ranks
from helpers.spread_tasks import small


class Rank(Alone):
    """One of several ranks, which exchanges nothing."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def split(self, size: int) -> tuple[Ranks, Ranks]:
        return Rank(self.rank % size, size), Rank(self.rank // size, self.world // size)


def owners_of(model: nn.Module, ranks: Ranks) -> Ownership:
    return Ownership(ranks, Holdings(model), dict(model.named_parameters()))


@pytest.mark.parametrize(("world", "over"), [(1, None), (2, None), (4, 2), (6, 3), (4, 1)])
def test_every_value_has_one_owner_and_shares_are_about_even(world: int, over: int | None) -> None:
    whole = sum(p.numel() for p in small().parameters())
    values = []
    for rank in range(world):
        model, ranks = small(), Rank(rank, world)
        if over is not None:
            spread_experts(model, ranks, over)
        parameters = dict(model.named_parameters())
        values.append(sum(parameters[name].numel() for name in owners_of(model, ranks).own(parameters)))
    assert sum(values) == whole
    assert max(values) <= 1.5 * whole / world + max(p.numel() for p in small().parameters()) / 2


class ClipsAll(torch.optim.SGD):
    """Divides by the norm of all gradients together."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(params, 1.0)
        super().step(closure)


def test_an_optimizer_that_couples_parameters_cannot_be_shared_out() -> None:
    model = small()
    check_optimizer(model, ClipsAll(model.parameters(), 0.1))
    with pytest.raises(PrivacyError, match="by the gradients of other parameters") as caught:
        check_optimizer(model, ClipsAll(model.parameters(), 0.1), shared=True)
    assert caught.value.code == "dp-optimizer-apart"


class NeedsOne(torch.optim.SGD):
    """Looks at a parameter of every group, as some that pad their groups do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert all(group["params"][-1].ndim >= 0 for group in self.param_groups)
        super().step(closure)


def test_an_optimizer_that_cannot_step_without_parameters_cannot_be_shared_out() -> None:
    """More ranks than parameters, or a group of which a rank owns nothing: it would fail once a round was counted."""
    model = small()
    check_optimizer(model, NeedsOne(model.parameters(), 0.1))
    with pytest.raises(PrivacyError) as caught:
        check_optimizer(model, NeedsOne(model.parameters(), 0.1), shared=True)
    assert caught.value.code == "dp-optimizer-step"


MAKE: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adafactor, whose steps are no tensors": lambda p: Adafactor(
        p, lr=0.01, relative_step=False, scale_parameter=False
    ),
}


@pytest.mark.parametrize(("kind", "over"), [*((kind, None) for kind in MAKE), ("adamw", 2)])
def test_what_owners_save_together_is_what_one_process_goes_on_from(
    kind: str, over: int | None, tmp_path: Path
) -> None:
    world = 4
    whole = small()
    optimizer = MAKE[kind](whole.parameters())
    check_optimizer(whole, optimizer, shared=True)
    stepped(whole, optimizer, set())
    digests = []
    for rank in [*range(1, world), 0]:
        model, ranks = small(), Rank(rank, world)
        if over is not None:
            spread_experts(model, ranks, over)
        own, owners = MAKE[kind](model.parameters()), owners_of(model, ranks)
        stepped(model, own, {id(p) for name, p in model.named_parameters() if not owners.is_own(name)})
        if rank:
            digests.append(checkpoint.save_part(tmp_path / "saved", rank, model, own, owners, "run", 3))
        else:
            content, state = checkpoint.pack(model, own, owners, {}, {"run": "run", "round": 3})
            checkpoint.save(tmp_path / "saved", content, json.loads(json.dumps(state)), digests)
    found = checkpoint.read_checkpoint(tmp_path / "saved")
    saved = checkpoint.SavedSession(tmp_path / "saved", {}, found.state["optimizer"], found)
    again = small()
    theirs = MAKE[kind](again.parameters())
    saved.load(again, theirs, owners_of(again, Alone()))
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert optimizer.state[one].keys() == theirs.state[other].keys()
        for part, value in optimizer.state[one].items():
            assert torch.equal(torch.as_tensor(theirs.state[other][part]), torch.as_tensor(value)), part


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, others: set[int]) -> None:
    """One step by gradients that follow from the weights."""
    for parameter in model.parameters():
        value: Tensor = parameter.detach()
        parameter.grad = 0.1 * value + 0.01 * value.sign()
    with stepping_without(optimizer, others):
        optimizer.step()
