"""What a lot needs of an engine; `coterie.dp.per_sample.engine.Engine` is the one for models in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from coterie.dp.clipping import Clipping
from coterie.dp.per_sample.gradient_groups import Diagnostics


class OnGrid(Protocol):
    """Sums integers, in steps that the noise sets; `isolation: exact` needs it."""

    def use_grid(self, step_of: Callable[[str], float]) -> None: ...


class SumEngine(Protocol):
    """Adds up clipped gradients of batches, or of users whose records span several."""

    thresholds: Tensor

    @property
    def on_grid(self) -> OnGrid | None:
        """The engine itself where its sums are integers; None where they are float32."""
        ...

    @property
    def groups(self) -> list[str]: ...

    def group_of(self, name: str) -> str: ...

    @property
    def eta(self) -> float: ...

    @property
    def clipping(self) -> Clipping: ...

    @property
    def sensitivity(self) -> float: ...

    def accumulate(self, batch: Mapping[str, Any], counted: int | None = None) -> Diagnostics: ...

    def accumulate_user(self, batches: Iterable[Mapping[str, Any]]) -> Diagnostics: ...

    def begin(self, lot: str) -> None:
        """Forget what was added; what comes is of this lot."""
        ...

    def take(self) -> dict[str, Tensor]: ...


class ConstantShape(Protocol):
    """Makes every batch of a lot the same shape, so that the time it takes tells less."""

    def fill(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The batch with rows and places that count for nothing behind its own."""
