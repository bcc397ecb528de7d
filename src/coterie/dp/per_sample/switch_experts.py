"""Families whose experts are outside the interface and process one expert's rows at a time.

Switch Transformers (transformers 5) calls each expert, an ordinary module, with the rows that chose it. Hooks tell
the capture whose those rows are; the rules for linear layers then work on rows sorted by record.

Shape letters: N tokens, E experts, R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from coterie.dp.per_sample.capture import Capture

_SWITCH_EXPERTS = "SwitchTransformersExperts"


@contextmanager
def rows_of_single_experts(model: nn.Module, capture: Capture) -> Iterator[None]:
    """Inside, every single expert of an adapted family computes with its rows' records known."""
    hooks = []
    for module in model.modules():
        if type(module).__name__ == _SWITCH_EXPERTS:
            hooks += _SwitchLayer(module, capture).hooks
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _SwitchLayer:
    """Hooks on one layer of Switch experts."""

    def __init__(self, experts: nn.Module, capture: Capture) -> None:
        self._capture = capture
        self._chosen_NE: Tensor | None = None
        self.hooks = [experts.register_forward_pre_hook(self._remember)]
        for name, expert in experts.named_children():
            number = int(name.rsplit("_", 1)[1])
            self.hooks.append(expert.register_forward_pre_hook(self._entering(number)))
            self.hooks.append(expert.register_forward_hook(self._leave, always_call=True))

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._chosen_NE = args[1][:, 0, :]

    def _entering(self, number: int) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert self._chosen_NE is not None
            tokens_R = self._chosen_NE[:, number].nonzero().flatten()
            each = self._chosen_NE.shape[0] // self._capture.batch
            self._capture.row_records = tokens_R // each

        return enter

    def _leave(self, *_: Any) -> None:
        self._capture.row_records = None
