"""What later rounds know from earlier releases beside the weights: clip thresholds and expert loads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from coterie.dp.balance import Balancer
from coterie.dp.clipping import quantile_update
from coterie.dp.noise.joint_noise import LOAD, WITHIN
from coterie.dp.sum_engine import SumEngine
from coterie.errors import CheckpointError


class ReleasedState:
    """Moves the engine's thresholds and the balancer's loads by what was released, and by nothing else.

    Args:
        engine: holds the thresholds.
        balancer: holds the loads; None without balance.
        quantile: share of units that adaptive clipping aims at; None: thresholds are fixed.
    """

    def __init__(self, engine: SumEngine, balancer: Balancer | None, quantile: float | None) -> None:
        self._engine, self._balancer, self._quantile = engine, balancer, quantile

    def take(self, means: Mapping[str, Tensor]) -> None:
        """Post-processing of the extra parts of a release: routing loads and clip thresholds of later rounds.

        Args:
            means: a release's tensors, over the expected units in a lot.
        """
        if self._balancer is not None and LOAD in means:
            self._balancer.take_released(means[LOAD])
        if WITHIN in means and self._quantile is not None:
            fraction = (means[WITHIN].double() + 0.5).clamp(0, 1)
            self._engine.thresholds = quantile_update(self._engine.thresholds, fraction, self._quantile)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: made from releases alone."""
        return {"thresholds": self._engine.thresholds} | (self._balancer.state() if self._balancer else {})

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`.

        Raises:
            CheckpointError: its thresholds are of other gradient groups, or moved although they are fixed.
        """
        saved, own = state["thresholds"], self._engine.thresholds
        fits = saved.shape == own.shape and bool((torch.isfinite(saved) & (saved > 0)).all())
        if not fits or (self._quantile is None and not torch.allclose(saved, own, 1e-12, 0.0)):
            raise CheckpointError(
                f"the checkpoint has clip norms for {saved.numel()} gradient groups that are not those of the "
                f"{own.numel()} groups here.",
                code="dp-resume-clipping",
                why="noise is calibrated to the clip norms, so a record would contribute more than it covers",
                fix="resume with the clipping policy that the run was started with",
            )
        self._engine.thresholds = saved
        if self._balancer is not None:
            self._balancer.restore(state)
