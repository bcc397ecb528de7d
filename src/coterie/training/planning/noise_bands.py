"""Whether noise in bands (`coterie.dp.noise.bands`) would leave less noise in the weights of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coterie.dp.noise.bands import NoiseBands, run_noise
from coterie.dp.plan import PrivacyPlan
from coterie.errors import BudgetError

BANDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class BandsChoice:
    """One number of bands.

    Attributes:
        bands: `noise_bands`; 1: independent noise.
        noise_multiplier: that the budget needs then.
        step_noise: noise in one round's sum, in clip norms.
        weights_noise: noise in the weights, root mean square over the run's rounds, over that of independent noise.
    """

    bands: int
    noise_multiplier: float
    step_noise: float
    weights_noise: float


def bands_choices(plan: PrivacyPlan, units: int, momentum: float) -> list[BandsChoice]:
    """What each number of bands would leave; nothing where the plan excludes bands, or no lot would fit a block.

    Args:
        plan: of the run.
        units: records or users in the text.
        momentum: of SGD.
    """
    if plan.sampler != "poisson" or plan.adaptive_quantile is not None or plan.pooled is not None:
        return []
    fitting = [count for count in BANDS if count * plan.lot_size <= units and count <= plan.rounds]
    found: list[BandsChoice] = []
    for count in fitting if len(fitting) > 1 else []:
        bands = NoiseBands.of(count, plan.rounds, momentum)
        other = replace(plan, bands=bands, noise_multiplier=None)
        try:
            sigma = other.mechanism(other.lots(units)).noise_multiplier
        except BudgetError:  # out of reach with so large a part of the records in each lot
            break
        course = run_noise((1.0,) if bands is None else bands.coefficients, plan.rounds, momentum)
        left = (
            sigma * course / (found[0].noise_multiplier * run_noise((1.0,), plan.rounds, momentum)) if found else 1.0
        )
        step = sigma * (1.0 if bands is None else bands.step_noise(plan.rounds))
        found.append(BandsChoice(count, sigma, step, left))
    return found


def advice(choices: Sequence[BandsChoice]) -> str:
    """Which number of bands to take, in a sentence."""
    best = min(choices, key=lambda each: each.weights_noise)
    if best.weights_noise > _WORTH_IT:
        return "noise in bands would not leave less noise in the weights: keep `noise_bands: 1`"
    return (
        f"with `optim.kind: sgd`, `noise_bands: {best.bands}` leaves {best.weights_noise:.2f} times the noise of "
        "independent rounds in the weights"
    )


_WORTH_IT = 0.97
