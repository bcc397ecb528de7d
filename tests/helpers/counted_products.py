"""Work in place of seconds: the multiplications and additions of matrix products, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountedProducts(TorchDispatchMode):
    """Inside, `clock` grows with every matrix product by its multiplications and additions, forward and backward.

    Attributes:
        products: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0.0
        self._ticks = count()

    def clock(self) -> float:
        """Products, and a thousandth for every look at it: what is no product takes time as well."""
        return self.products + next(self._ticks) / 1000

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        counted = flop_registry.get(func.overloadpacket)
        if counted is not None:
            self.products += counted(*args, **(kwargs or {}), out_val=found)
        return found
