"""The slow twin of the engine: one record at a time by plain autograd, clipped as the definition says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.clipping import Clipping
from coterie.dp.losses import LossFunction, batch_size
from coterie.dp.per_sample.gradient_groups import Diagnostics


class SlowEngine:
    """Same interface and results as `coterie.dp.per_sample.engine.Engine`, without any of its ideas."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, clipping: Clipping, eta: float = 1e-5) -> None:
        self.model, self.loss_fn, self.clipping = model, loss_fn, clipping
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.groups = list(dict.fromkeys(clipping.group_of(name) for name in self.parameters))
        self.thresholds = clipping.thresholds(self.groups)
        self.eta = eta
        self.sums: dict[str, Tensor] = {}
        self.on_grid = None

    def group_of(self, name: str) -> str:
        return self.clipping.group_of(name)

    @property
    def sensitivity(self) -> float:
        return float(self.thresholds.square().sum().sqrt()) * (1 + self.eta)

    def accumulate(self, batch: Mapping[str, Any]) -> Diagnostics:
        singles = [
            {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}
            for i in range(batch_size(batch))
        ]
        figures = [self._add([single]) for single in singles]
        return Diagnostics(
            torch.cat([f.losses for f in figures]),
            torch.cat([f.norms for f in figures]),
            torch.cat([f.group_norms for f in figures], 1),
            torch.cat([f.within for f in figures], 1),
            torch.cat([f.masked for f in figures]),
        )

    def accumulate_user(self, batches: Iterable[Mapping[str, Any]]) -> Diagnostics:
        return self._add(batches)

    def _add(self, batches: Iterable[Mapping[str, Any]]) -> Diagnostics:
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.parameters.items()}
        loss = torch.zeros(1)
        for batch in batches:
            value = self.loss_fn(self.model, batch).sum()
            found = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
            loss += value.detach()
            for (_, kept), gradient in zip(total.items(), found, strict=True):
                kept += 0 if gradient is None else gradient
        norms = torch.tensor(
            [
                sum(float((g**2).sum()) for n, g in total.items() if self.clipping.group_of(n) == group) ** 0.5
                for group in self.groups
            ],
            dtype=torch.float64,
        )[:, None]
        finite = bool(torch.isfinite(norms).all() and torch.isfinite(loss).all())
        factors = self.clipping.factors(norms, self.thresholds) if finite else torch.zeros_like(norms)
        for name, gradient in total.items():
            kept = self.sums.setdefault(name, torch.zeros_like(gradient))
            if finite:
                kept += gradient * factors[self.groups.index(self.clipping.group_of(name)), 0]
        within = (norms <= self.thresholds[:, None]) & finite
        return Diagnostics(loss, norms.square().sum(0).sqrt(), norms, within, torch.tensor([not finite]))

    def begin(self, lot: str) -> None:
        self.sums = {}

    def take(self) -> dict[str, Tensor]:
        sums = {n: self.sums.get(n, torch.zeros_like(p)).float() for n, p in self.parameters.items()}
        self.sums = {}
        return sums
