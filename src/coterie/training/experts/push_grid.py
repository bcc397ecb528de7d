"""The grid that masked pushes lie on, from public numbers: the noise's own where there is noise, else the finest."""

from __future__ import annotations

import math

from coterie.config import FederationConfig, PrivacyRules
from coterie.dp.noise.discrete_gaussian import GRID_SIGMA, LARGEST_NOISE
from coterie.dp.noise.pooled import PooledNoise
from coterie.federation.experts.masking.grid import GridScale, MaskGrid

_BITS_WITHOUT_NOISE = 38
"""Of the forty of five bytes: what is left over shows a sum in which masks are left."""


def plain_grid(parties: int, push_limit: float) -> MaskGrid:
    """As fine as five bytes a value allow with two bits to spare, for sums up to ``push_limit`` in size."""
    largest = (2 ** (_BITS_WITHOUT_NOISE - 1) - 1) // parties
    return MaskGrid(parties, GridScale(push_limit / largest, largest))


def noised_scale(noise_step: float, bound: float, lot_size: int, max_lot: int | None) -> GridScale:
    """Half steps of the noise's grid; largest is a lot that pulls one way, twelve deviations above its mean, and the
    largest noise that is ever drawn.

    Args:
        noise_step: of the noise's grid.
        bound: of what one unit adds.
        lot_size: expected units in the largest lot of all parties.
        max_lot: most of them, where there is such a limit.
    """
    step = noise_step / 2
    units = max_lot or lot_size + 12 * (math.sqrt(lot_size) + 1)
    return GridScale(step, math.ceil(units * bound / step) + math.ceil(2 * LARGEST_NOISE))


def masked_width(federation: FederationConfig) -> int:
    """Bytes of one value of a masked push."""
    rules, sigma, parties = federation.privacy, federation.noise_multiplier, len(federation.parties)
    if not isinstance(rules, PrivacyRules) or sigma is None:
        return plain_grid(parties, federation.push_limit).width
    share = PooledNoise(parties, federation.colluding).share
    step = sigma * share * rules.clip_norm / GRID_SIGMA
    scale = noised_scale(step, rules.clip_norm, federation.largest_lot, rules.max_lot)
    return MaskGrid(parties, scale).width
