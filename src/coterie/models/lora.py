"""LoRA on stacked expert parameters: the low-rank factors of each expert, read instead of the merged weight.

peft's ``target_parameters`` makes the experts module compute with ``W + scaling * B @ A``, a tensor as large as all
experts. Here A and B are read per expert, so that rows meet them one after the other and ``W + B A`` never exists.

Shape letters: E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coterie.errors import ModelError


@dataclass(frozen=True)
class ExpertAdapter:
    """One low-rank update of one stacked expert parameter: expert e adds ``scaling * up[e] @ down[e]``.

    Attributes:
        wrapper: the peft module that holds the factors.
        name: name of the adapter inside it.
    """

    wrapper: Any
    name: str

    @property
    def scaling(self) -> float:
        return float(self.wrapper.scaling[self.name])

    @property
    def down_ErI(self) -> Tensor:
        """A, a view of the stored ``[E * r, I]``."""
        weight: Tensor = self.wrapper.lora_A[self.name].weight
        return weight.reshape(self.wrapper.num_experts, -1, weight.shape[-1])

    @property
    def up_EOr(self) -> Tensor:
        """B, a view of the stored ``[O, r * E]``."""
        weight: Tensor = self.wrapper.lora_B[self.name].weight
        return weight.reshape(weight.shape[0], -1, self.wrapper.num_experts).permute(2, 0, 1)


def expert_wrappers(model: nn.Module) -> list[Any]:
    """peft's wrappers of stacked parameters anywhere in the model. Empty without peft or without adapters."""
    return [module for module in model.modules() if _is_wrapper(module)]


def _is_wrapper(module: nn.Module) -> bool:
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A") and hasattr(module, "num_experts")


def expert_adapters(model: nn.Module) -> dict[tuple[nn.Module, str], list[ExpertAdapter]]:
    """Active adapters of each (experts module, parameter name).

    Raises:
        ModelError: an adapter is merged into the weights, so its factors no longer say what the model computes.
    """
    found: dict[tuple[nn.Module, str], list[ExpertAdapter]] = {}
    for wrapper in expert_wrappers(model):
        if wrapper.merged:
            raise ModelError(
                f"The LoRA adapters of `{wrapper.parameter_name}` are merged into the expert weights.",
                code="model-lora-merged",
                why="training would change factors that the model no longer uses",
                fix="call unmerge_adapter() before training",
            )
        if wrapper.disable_adapters:
            continue
        active = [ExpertAdapter(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A]
        found.setdefault((wrapper.get_base_layer(), wrapper.parameter_name), []).extend(active)
    return found


@contextmanager
def factors_stay_apart(model: nn.Module) -> Iterator[None]:
    """Inside, peft leaves the expert weights alone; whoever computes the experts adds `expert_adapters` to them."""
    changed = [wrapper for wrapper in expert_wrappers(model) if not wrapper.disable_adapters]
    for wrapper in changed:
        wrapper._disable_adapters = True
    try:
        yield
    finally:
        for wrapper in changed:
            wrapper._disable_adapters = False
