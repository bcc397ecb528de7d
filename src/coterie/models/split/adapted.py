"""A model whose trunk file holds adapters: what they add to its weights, and the same as a peft adapter.

The weights themselves stay on the meta device; only the adapters, which are small, are in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.config import LoraSpec
from coterie.errors import ModelError
from coterie.models.lora import ExpertAdapter, attach_adapters, parameter_wrappers
from coterie.models.zoo.build import check_keys


class AdaptedModel:
    """A model on the meta device with the trained adapters of a trunk file.

    Args:
        model: on meta, without adapters.
        lora: the adapters' settings, as the trunk's origin has them.
        trunk: written by a federation that trained adapters.

    Attributes:
        stored: name of each of the model's own tensors in the trunk file, by its name without adapters.
        changes: name of each adapted weight, and what its adapters add to it (float32).

    Raises:
        ModelError: the settings cannot be read, or the file lacks an adapter or has one that they do not name.
    """

    def __init__(self, model: PreTrainedModel, lora: Mapping[str, Any], trunk: Path) -> None:
        own = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
        self._peft: Any = attach_adapters(model, _settings(lora, trunk), seed=0)
        named: dict[str, Tensor] = self._peft.state_dict(keep_vars=True)
        self.stored = {own[id(tensor)]: name for name, tensor in named.items() if id(tensor) in own}
        adapters = {name: tensor for name, tensor in named.items() if id(tensor) not in own}
        with safe_open(trunk, framework="pt") as file:
            found = set(file.keys()) - set(self.stored.values())
            loaded = {name: file.get_tensor(name) for name in found & adapters.keys()}
        other = {name for name, tensor in loaded.items() if tensor.shape != adapters[name].shape}
        check_keys(str(trunk), adapters.keys() - found, found - adapters.keys(), other, code="model-bad-trunk")
        with torch.no_grad():
            for name, tensor in loaded.items():
                adapters[name].copy_(tensor)
        self.changes = self._changes(own)

    def save_adapter(self, folder: Path) -> None:
        """Write a folder that plain peft loads onto the starting model.

        Raises:
            ModelError: what was written does not read back as these adapters.
        """
        from peft import get_peft_model_state_dict

        for settings in self._peft.peft_config.values():  # a folder's name, not where it lies on this machine
            settings.base_model_name_or_path = _public_name(settings.base_model_name_or_path or "")

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft looks for embeddings it might have to save
            self._peft.save_pretrained(str(folder), save_embedding_layers=False)
            expected = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        again = load_file(folder / "adapter_model.safetensors")
        check_keys(str(folder), expected.keys() - again.keys(), again.keys() - expected.keys(), set())
        for name, tensor in expected.items():
            if not torch.equal(tensor, again[name]):
                raise ModelError(
                    f"`{name}` in {folder} is not what was written.",
                    code="model-saved-differs",
                    fix="write it again to another disk",
                )

    def _changes(self, own: Mapping[int, str]) -> dict[str, Callable[[], Tensor]]:
        found: dict[str, Callable[[], Tensor]] = {}
        for wrapper in parameter_wrappers(self._peft):
            weight = getattr(wrapper.get_base_layer(), wrapper.parameter_name)
            found[own[id(weight)]] = partial(_stacked_change, wrapper)
        for module in self._peft.modules():
            if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.Linear):
                found[own[id(module.base_layer.weight)]] = partial(_linear_change, module)
        return found


def _public_name(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() else source


def _settings(lora: Mapping[str, Any], trunk: Path) -> LoraSpec:
    try:
        return LoraSpec.model_validate(lora)
    except ValidationError as error:
        names = ", ".join(sorted({str(part) for problem in error.errors() for part in problem["loc"][:1]}))
        raise ModelError(
            f"{trunk} names settings of adapters that cannot be read" + (f": {names}." if names else "."),
            code="model-bad-trunk",
            why="without them, what the adapters add to the weights is unknown",
            fix="take the file again from the run folder that wrote it",
        ) from error


@torch.no_grad()
def _stacked_change(wrapper: Any) -> Tensor:
    adapters = [ExpertAdapter(wrapper, name) for name in wrapper.active_adapters]
    change = torch.stack([a.scaling * (a.up_EOr.float() @ a.down_ErI.float()) for a in adapters]).sum(0)
    if wrapper.get_param().dim() == 2:  # a router's one matrix, [O, I]
        return change[0]
    return change if wrapper._did_swap_in_out_features else change.mT


@torch.no_grad()
def _linear_change(module: Any) -> Tensor:
    changes: list[Tensor] = [module.get_delta_weight(name).float() for name in module.active_adapters]
    return torch.stack(changes).sum(0)
