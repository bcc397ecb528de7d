"""The definition, slowly: every record alone in a batch, by plain autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from coterie.dp.losses import LossFunction, default_loss

Gradients = list[dict[str, Tensor]]


def token_batch(records: int, tokens: int, vocabulary: int = 96, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids with their own labels and a full mask."""
    ids = torch.randint(3, vocabulary, (records, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def only(batch: Mapping[str, Tensor], record: int) -> dict[str, Tensor]:
    """A batch of one."""
    return {name: value[record : record + 1] for name, value in batch.items()}


def gradients(model: nn.Module, batch: Mapping[str, Tensor], loss_fn: LossFunction = default_loss) -> Gradients:
    """Each record's gradient of every trainable parameter, float64, zero where there is none."""
    found: Gradients = []
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for record in range(next(iter(batch.values())).shape[0]):
        loss = loss_fn(model, only(batch, record)).sum()
        parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found.append(
            {
                name: torch.zeros_like(p, dtype=torch.float64) if g is None else g.to_dense().double()
                for (name, p), g in zip(parameters.items(), parts, strict=True)
            }
        )
    return found


def gradients_in_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Gradients:
    """Each record's own loss differentiated by plain autograd, all records in one forward pass: the same rounding of
    the forward pass as the engine's."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = default_loss(model, batch)
    found: Gradients = []
    for loss in losses:
        parts = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        found.append(
            {
                name: torch.zeros_like(p, dtype=torch.float64) if g is None else g.double()
                for (name, p), g in zip(parameters.items(), parts, strict=True)
            }
        )
    return found


def norms(gradients: Gradients) -> Tensor:
    """[B] float64."""
    return torch.stack([torch.stack([g.square().sum() for g in one.values()]).sum().sqrt() for one in gradients])


def clipped(gradients: Gradients, clip_norm: float) -> dict[str, Tensor]:
    """``sum_b min(1, C / ||g_b||) g_b``."""
    factors = (clip_norm / norms(gradients)).clamp_max(1.0)
    return {
        name: torch.stack([f * one[name] for f, one in zip(factors, gradients, strict=True)]).sum(0)
        for name in gradients[0]
    }


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm, all parameters together."""
    assert set(ours) == set(theirs)
    difference = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in theirs)
    return (difference / sum(float(theirs[n].double().square().sum()) for n in theirs)) ** 0.5


def size(sums: Mapping[str, Tensor]) -> float:
    """L2 norm of all tensors together."""
    return sum(float(value.double().square().sum()) for value in sums.values()) ** 0.5
