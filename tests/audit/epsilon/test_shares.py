"""Shares of canaries in a sum, where they are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coterie.audit.epsilon.shares import Directions


def linear(seed: int = 0) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Gradients of a record: its weights times a part that all share, and one of its own."""
    torch.manual_seed(seed)
    model = nn.Linear(40, 1, bias=False)
    batches = [{"x": 3 * torch.ones(1, 40) + torch.randn(1, 40)} for _ in range(12)]
    return model, batches


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"])[:, 0] * 2


def test_a_share_is_the_length_of_a_canarys_part_whatever_the_others_add() -> None:
    model, batches = linear()
    directions = Directions.of(model, loss, batches)
    gradients = torch.cat([2 * batch["x"] for batch in batches]).double()
    assert torch.allclose(directions.norms_M, gradients.norm(dim=1), rtol=1e-6)
    lengths = torch.tensor([0.0, 50.0, 0.0, 1.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    total = (gradients / gradients.norm(dim=1, keepdim=True) * lengths[:, None]).sum(0)
    shares, _ = directions.shares({"weight": total[None]})
    assert torch.allclose(shares, lengths, atol=1.5)  # bfloat16 directions
    products = gradients / gradients.norm(dim=1, keepdim=True) @ total
    assert products.min() > 45, "plain inner products cannot tell who is in"


def test_the_spread_of_shares_is_that_of_noise() -> None:
    model, batches = linear()
    directions = Directions.of(model, loss, batches)
    noise = torch.randn(400, 1, 40)
    drawn = torch.stack([directions.shares({"weight": each})[0] for each in noise])
    assert torch.allclose(drawn.std(0), directions.shares({"weight": noise[0]})[1], rtol=0.2)


def test_the_model_is_left_as_it_was() -> None:
    model, batches = linear()
    model.weight.grad = torch.full((1, 40), 5.0)
    before = model.weight.detach().clone()
    Directions.of(model, loss, batches)
    assert model.training
    assert torch.equal(model.weight, before)
    assert torch.equal(model.weight.grad, torch.full((1, 40), 5.0))
