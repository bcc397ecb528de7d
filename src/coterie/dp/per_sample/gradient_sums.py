"""Where clipped gradients are added up: one float32 tensor for every trained parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from coterie.dp.per_sample import combine_uses
from coterie.dp.per_sample.weight_expressions import Root
from coterie.models.spread.whole_layers import WholeLayers

Sums = dict[str, Tensor]


class GradientSums:
    """Sums by parameter name, made when they are first needed.

    Args:
        shapes: of all trained parameters.
        device_of: where a parameter's sum lies.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], device_of: Callable[[str], torch.device]) -> None:
        self._shapes, self._device_of = shapes, device_of
        self._sums: Sums = {}

    def take(self) -> Sums:
        """The sums so far, one for every trained parameter, and start anew."""
        for name in self._shapes:
            self.of(name)
        sums, self._sums = self._sums, {}
        return sums

    def of(self, name: str) -> Tensor:
        """The sum of one parameter, to add to."""
        return self._place(name, self._sums, torch.zeros)

    def add(
        self,
        root: Root,
        uses: list[combine_uses.Use],
        factors_B: Tensor,
        into: Sums | None = None,
        layers: WholeLayers | None = None,
    ) -> None:
        """Add every record's gradient of one parameter times its factor.

        Args:
            root: the parameter.
            uses: its terms.
            factors_B: [B], where the terms are.
            into: takes them in place of these sums.
            layers: that were lent for this pass; sums of their parameters go to the ranks that hold them at once.
        """
        if layers is not None and root.name in layers.shapes:
            whole = torch.zeros(layers.shapes[root.name], device=factors_B.device)
            if uses:
                combine_uses.add_sum(root, uses, whole, factors_B, fresh=True)
            self.of(root.name).add_(layers.summed(root.name, whole))  # every rank takes part, whatever its rows
            return
        if not uses:
            return
        sums = self._sums if into is None else into
        fresh = root.name not in sums
        out = self._place(root.name, sums, torch.empty)
        if out.device == factors_B.device:
            combine_uses.add_sum(root, uses, out, factors_B, fresh)
        else:
            here = torch.empty(out.shape, device=factors_B.device)
            combine_uses.add_sum(root, uses, here, factors_B, fresh=True)
            out.copy_(here) if fresh else out.add_(here.to(out.device))

    def _place(self, name: str, sums: Sums, make: Callable[..., Tensor]) -> Tensor:
        if name not in sums:
            sums[name] = make(self._shapes[name], dtype=torch.float32, device=self._device_of(name))
        return sums[name]
