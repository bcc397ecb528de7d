"""The bytes in which a party's sums go up: part by part, in the numbers that were agreed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from coterie.federation.experts.parts import Part
from coterie.federation.wire.values import check_own
from coterie.training.experts.held_sums import SumValues


class SumEncoder:
    """Encodes sums of parts.

    Args:
        parts: every part of the model.
        dtype: of what crosses, float32 or bfloat16.
    """

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype) -> None:
        self._trained, self._count = tuple(part for part in parts if part.trained), len(parts)
        self._dtype = dtype

    def encode(self, part: Part, values: SumValues, release: str) -> Tensor:
        """The bytes of one part, uint8; the same whenever they are asked for.

        Args:
            part: one that is trained.
            values: the sums.
            release: hexadecimal name of these sums, another one in every round.
        """
        return self._rounded(part, values.of(part), release)

    def check(self, values: SumValues, release: str, limit: Callable[[str], float], where: str) -> None:
        """What a host would refuse does not leave: this party says itself that it diverged.

        Args:
            values: the sums.
            release: as for `encode`.
            limit: largest size of a value in the sum of the tensor of that name.
            where: for the error's text.
        """
        for part in self._trained:
            for name, encoded in part.decode(self.encode(part, values, release), self._dtype).items():
                check_own(f"this party's sums of {name}", [encoded], limit(name), where=where)

    def _rounded(self, part: Part, tensors: Mapping[str, Tensor], release: str) -> Tensor:
        """The part's bytes; in bfloat16 by coins that follow from the release, so that resending repeats them.

        The same coins in another round would add up to a bias.
        """
        if self._dtype == torch.float32:
            return part.encode(tensors, torch.float32)
        coins = torch.Generator().manual_seed(int(release[:12], 16) * self._count + part.number)
        return part.encode(
            {name: stochastic_bfloat16(tensors[name], coins) for name, _ in part.shapes}, torch.bfloat16
        )


def stochastic_bfloat16(values: Tensor, coins: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down with the odds that keep the mean; post-processing of what was noised.

    Guarantee: a finite value stays finite (magnitudes above bfloat16's largest become that).
    """
    largest = torch.finfo(torch.bfloat16).max
    bits = values.clamp(-largest, largest).contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, generator=coins, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
