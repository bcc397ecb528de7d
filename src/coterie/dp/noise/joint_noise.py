"""What one round releases: gradient sums and, with them, small statistics, as one Gaussian.

Every part k has a bound C_k on what one unit contributes and a noise standard deviation s_k, with
sum_k (C_k / s_k)^2 <= 1 / sigma^2 (invariant 9, docs/concepts/invariants.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from coterie.dp.accounting.accountant import check_joint, joint_noise
from coterie.dp.noise.discrete_gaussian import GRID_SIGMA, Slabs, calibrate
from coterie.models.spread.holdings import HeldPart

LOAD = "coterie.load"
WITHIN = "coterie.within"
"""Names under which the extra parts lie in a release, beside the parameters' names."""


@dataclass(frozen=True)
class ReleasePart:
    """One part of a release.

    Attributes:
        bound: C_k, rounding of the sum included.
        share: its part of 1 / sigma^2.
        values: how many numbers are rounded to the grid after they were added up.
    """

    bound: float
    share: float
    values: int


@dataclass(frozen=True)
class RoundNoise:
    """The noise of one round.

    Attributes:
        std: noise standard deviation by part.
        part_of: part of each released tensor.
    """

    std: Mapping[str, float]
    part_of: Callable[[str], str]

    @classmethod
    def of(
        cls, noise_multiplier: float, parts: Mapping[str, ReleasePart], part_of: Callable[[str], str]
    ) -> RoundNoise:
        """Calibrate every part and check that together they are the Gaussian that is accounted for.

        Args:
            noise_multiplier: as accounted.
            parts: shares are scaled to sum to one.
            part_of: part of a released tensor, by its name.
        """
        bounds, shares = ({name: getattr(part, what) for name, part in parts.items()} for what in ("bound", "share"))
        joint = joint_noise(noise_multiplier, bounds, shares)
        std = {name: calibrate(joint[name] / part.bound, part.bound, part.values) for name, part in parts.items()}
        check_joint(noise_multiplier, {name: (part.bound, std[name]) for name, part in parts.items()})
        return cls(std, part_of)

    def std_of(self, name: str) -> float:
        """The noise standard deviation of a released tensor."""
        return self.std[self.part_of(name)]

    def step(self, name: str) -> float:
        """The step of the grid that a released tensor lies on."""
        return self.std_of(name) / GRID_SIGMA

    def cut(self, sums: Mapping[str, Tensor], held: Mapping[str, HeldPart], *, as_integers: bool = False) -> Slabs:
        """The sums in slabs, to be noised by `Slabs.add_noise`, over ``sums`` where possible; or as integers."""
        std = {name: self.std[self.part_of(name)] for name in sums}
        return Slabs(sums, std, held, in_place=True, as_integers=as_integers)
