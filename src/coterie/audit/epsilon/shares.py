"""How much of every canary is in a released sum: least squares over all canaries at once.

A canary's inner product with the sum also holds what all others share with it, and where clipping is broken that
drowns the signal: large contributions hide each other. Solving for all shares together takes it out.

Shape letters: M canaries, N values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.dp.losses import Batch, LossFunction

MOST_VALUES = 400_000_000
"""Of all canaries' directions together, bfloat16; of larger models the tensors with most of the gradient are kept."""

_CHUNK = 1 << 18


@dataclass(frozen=True)
class Directions:
    """Where each canary's gradient points, by plain autograd, one record at a time.

    Attributes:
        rows: [M, N of the tensor] bfloat16 by parameter name, each canary of length 1 over all tensors.
        norms_M: lengths of the whole gradients, float64.
    """

    rows: Mapping[str, Tensor]
    norms_M: Tensor

    @classmethod
    def of(cls, model: nn.Module, loss_fn: LossFunction, batches: Sequence[Batch]) -> Directions:
        """Take one gradient a record, in evaluation mode.

        Args:
            model: left as it was.
            loss_fn: as the run has it.
            batches: of one record each.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before, mode = {name: p.grad for name, p in trained.items()}, model.training
        model.eval()
        try:
            first = _gradient(model, loss_fn, batches[0], trained)
            names = _kept(first, len(batches))
            rows = {name: torch.empty(len(batches), trained[name].numel(), dtype=torch.bfloat16) for name in names}
            norms = []
            for number, batch in enumerate(batches):
                found = _gradient(model, loss_fn, batch, trained) if number else first
                norms.append(sum(float(g.double().square().sum()) for g in found.values()) ** 0.5)
                for name in names:
                    rows[name][number] = found[name].reshape(-1) / norms[-1]
        finally:
            model.train(mode)
            for name, parameter in trained.items():
                parameter.grad = before[name]
        return cls(rows, torch.tensor(norms, dtype=torch.float64))

    def shares(self, sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """How long each canary's part of a sum is, and how noise of standard deviation 1 spreads it.

        Args:
            sums: by parameter name.

        Returns:
            [M] and [M], float64.
        """
        count = len(self.norms_M)
        gram, products = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for name, rows in self.rows.items():
            value = sums[name].reshape(-1).float()
            for start in range(0, rows.shape[1], _CHUNK):
                part = rows[:, start : start + _CHUNK].float()
                gram += (part @ part.T).double()
                products += (part @ value[start : start + _CHUNK]).double()
        # Two canaries with one direction cannot be told apart: their share is split, and no number blows up.
        inverse = torch.linalg.inv(gram + _SAME * torch.eye(count, dtype=torch.float64))
        return inverse @ products, inverse.diagonal().sqrt()


_SAME = 1e-4


def _gradient(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    losses = loss_fn(model, batch)
    found = torch.autograd.grad(losses.float().sum(), list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros(p.shape) if gradient is None else gradient.detach().cpu().float()
        for (name, p), gradient in zip(trained.items(), found, strict=True)
    }


def _kept(gradient: Mapping[str, Tensor], canaries: int) -> list[str]:
    """Tensors to solve over: those with most of the gradient for their size, as many as fit."""
    room = MOST_VALUES // canaries
    kept = []
    for name in sorted(gradient, key=lambda n: -float(gradient[n].square().mean())):
        if gradient[name].numel() <= room:
            kept.append(name)
            room -= gradient[name].numel()
    return kept
