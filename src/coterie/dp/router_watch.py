"""What the routers of a model decide, seen while it runs.

Shape letters: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coterie.errors import PrivacyError
from coterie.models.seam import ExpertLayer, expert_layers


@dataclass
class SeenRouting:
    """What one forward showed, by MoE layer."""

    ids: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    candidates: dict[int, Tensor] = field(default_factory=dict)


class RouterWatch:
    """Sees expert ids and router logits of a model's MoE layers while a forward runs, whatever the family.

    Expert ids are what the experts module is called with. Logits are the last floating output [..., E] that a module
    beside the experts (the router) gave before that, for as many tokens.

    Raises:
        PrivacyError: the model has no MoE layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = expert_layers(model)
        if not self.layers:
            raise PrivacyError(
                f"{type(model).__name__} has no experts to balance.",
                code="dp-balance-experts",
                why="balance compares how often a router chooses each expert",
                fix="set balance to off",
            )
        config = getattr(model, "config", None)
        text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
        self.sigmoid = "sigmoid" in str(getattr(text, "scoring_func", getattr(text, "score_func", "")))
        self._modules = dict(model.named_modules())

    def beside(self, layer: ExpertLayer) -> list[nn.Module]:
        """Modules of an MoE block that are not its experts: the router and what it is made of, outermost last."""
        parent = layer.name.rpartition(".")[0]
        experts = {id(module) for module in layer.module.modules()}
        inside = [module for name, module in self._modules.items() if name.startswith(f"{parent}.")]
        return [module for module in inside if id(module) not in experts]

    @contextmanager
    def watching(self) -> Iterator[SeenRouting]:
        """Inside, forwards of the model fill what is yielded. Recomputation in a later backward is not seen."""
        seen = SeenRouting()
        handles: list[RemovableHandle] = []
        try:
            for layer in self.layers:
                handles.append(
                    layer.module.register_forward_pre_hook(self._on_experts(layer, seen), with_kwargs=True)
                )
                for module in self.beside(layer):
                    handles.append(module.register_forward_hook(self._on_router(layer, seen)))
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., E] float32 that sum to one."""
        if self.sigmoid:
            scores = logits.float().sigmoid()
            return scores / scores.sum(-1, keepdim=True).clamp_min(1e-9)
        return logits.float().softmax(-1)

    def _on_experts(self, layer: ExpertLayer, seen: SeenRouting) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()]
            seen.ids[layer.index] = values[1].detach()
            found = seen.candidates.get(layer.index)
            if found is not None and found.numel() == values[1].shape[0] * layer.num_experts:
                seen.logits[layer.index] = found

        return hook

    def _on_router(self, layer: ExpertLayer, seen: SeenRouting) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple | list) else (output,):
                if (
                    isinstance(value, Tensor)
                    and value.is_floating_point()
                    and value.shape[-1:] == (layer.num_experts,)
                ):
                    seen.candidates[layer.index] = value
                    return

        return hook
