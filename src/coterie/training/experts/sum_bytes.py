"""The bytes in which a party's sums go up: part by part, in the numbers that were agreed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from coterie.federation.experts.parts import Part
from coterie.federation.wire.values import check_own


class SumEncoder:
    """Encodes sums for every part that is trained.

    Args:
        parts: every part of the model.
        dtype: of what crosses, float32 or bfloat16.
    """

    def __init__(self, parts: Sequence[Part], dtype: torch.dtype) -> None:
        self._parts, self._dtype = tuple(parts), dtype

    def encode(
        self, experts: Mapping[int, Mapping[str, Tensor]], trunk: Mapping[str, Tensor], release: str
    ) -> dict[int, Tensor]:
        """uint8 bytes by part number.

        Args:
            experts: layer to stacked sums by parameter name, [E, ...].
            trunk: sums by name.
            release: hexadecimal name of these sums, another one in every round.
        """
        blobs = {}
        for part in self._parts:
            if not part.trained:
                continue
            tensors = trunk
            if part.layer >= 0:
                tensors = {name: experts[part.layer][name][list(part.experts)] for name, _ in part.shapes}
            blobs[part.number] = self._rounded(part, tensors, release)
        return blobs

    def check(self, blobs: Mapping[int, Tensor], limit: Callable[[str], float], where: str) -> None:
        """What a host would refuse does not leave: this party says itself that it diverged.

        Args:
            blobs: what `encode` gave.
            where: for the error's text.
            limit: largest size of a value in the sum of the tensor of that name.
        """
        for part in self._parts:
            if part.trained:
                for name, values in part.decode(blobs[part.number], self._dtype).items():
                    check_own(f"this party's sums of {name}", [values], limit(name), where=where)

    def _rounded(self, part: Part, tensors: Mapping[str, Tensor], release: str) -> Tensor:
        """The part's bytes; in bfloat16 by coins that follow from the release, so that resending repeats them.

        The same coins in another round would add up to a bias.
        """
        if self._dtype == torch.float32:
            return part.encode(tensors, torch.float32)
        coins = torch.Generator().manual_seed(int(release[:12], 16) * len(self._parts) + part.number)
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
