"""How much noise the sums of a lot get: one Gaussian over gradient groups, loads and clip indicators."""

from __future__ import annotations

import math
from collections.abc import Mapping

from coterie.dp.balance import Balancer
from coterie.dp.noise.joint_noise import LOAD, WITHIN, ReleasePart, RoundNoise
from coterie.dp.plan import PrivacyPlan
from coterie.dp.sum_engine import SumEngine


class LotNoise:
    """The noise of a run's rounds, as thresholds move.

    Args:
        plan: says what is released beside the gradients.
        engine: its groups, thresholds and sensitivity.
        balancer: None without balance.
    """

    def __init__(self, plan: PrivacyPlan, engine: SumEngine, balancer: Balancer | None) -> None:
        self._plan = plan
        self._engine = engine
        self._balancer = balancer

    def of(self, noise_multiplier: float, rounded: Mapping[str, int]) -> RoundNoise:
        """This round's noise.

        Args:
            noise_multiplier: of what this party adds.
            rounded: how many values of each sum are rounded to the grid after they were added up.
        """
        engine, group_of = self._engine, self._engine.group_of
        if self._plan.bands is not None:  # a unit's part is rounded in every round that it stands in
            rounded = {name: count * self._plan.bands.count for name, count in rounded.items()}
        extra = self._extra(rounded)
        rest = 1 - sum(part.share for part in extra.values())
        gradients = {name: count for name, count in rounded.items() if name not in extra}
        if self._plan.adaptive_quantile is None:
            parts = {"gradients": ReleasePart(engine.sensitivity, rest, sum(gradients.values()))}
            return RoundNoise.of(noise_multiplier, parts | extra, lambda name: name if name in extra else "gradients")
        # Adaptive thresholds differ between groups and rounds: each group's noise follows its own threshold.
        values = dict.fromkeys(engine.groups, 0)
        for name, count in gradients.items():
            values[group_of(name)] += count
        bounds = dict(zip(engine.groups, engine.thresholds.tolist(), strict=True))
        parts = {
            group: ReleasePart(bounds[group] * (1 + engine.eta), rest / len(values), count)
            for group, count in values.items()
        }
        return RoundNoise.of(noise_multiplier, parts | extra, lambda name: name if name in extra else group_of(name))

    def _extra(self, rounded: Mapping[str, int]) -> dict[str, ReleasePart]:
        """What is released beside the gradients."""
        extra: dict[str, ReleasePart] = {}
        if self._balancer is not None and self._balancer.balance.releases_loads:
            share = self._balancer.balance.load_share**2
            extra[LOAD] = ReleasePart(self._balancer.load_bound * (1 + 1e-6), share, rounded.get(LOAD, 0))
        if self._plan.adaptive_quantile is not None:
            bound = 0.5 * math.sqrt(len(self._engine.groups))
            extra[WITHIN] = ReleasePart(bound, self._plan.adaptive_share**2, rounded.get(WITHIN, 0))
        return extra
