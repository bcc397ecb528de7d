"""The model a party runs: its trunk in memory, the experts' parameters on the meta device, computed elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.config import ModelSpec
from coterie.errors import ModelError
from coterie.models.narrow import frozen_as_stored
from coterie.models.preconditioner import attach, in_file
from coterie.models.split.shards import load_tensors
from coterie.models.split.splitter import expert_parameters, trunk_shapes
from coterie.models.zoo.build import build_model, check_keys


def build_partial(
    spec: ModelSpec, trunk_file: Path, *, device: torch.device | str = "cpu", frozen: bool = False
) -> PreTrainedModel:
    """A model with the trunk of ``trunk_file`` and without any expert's weights, in the file's coordinates.

    Select an implementation that needs no local weights with `seam.select` before the first forward. Never move the
    model with ``.to(device)`` or put it through ``save_pretrained``: weights that are not there can be neither.

    Args:
        spec: names the config; a path without weights will do. The trunk is cast to its dtype.
        trunk_file: of the same model, as `splitter.split` writes it or training saves it.
        device: where the trunk goes.
        frozen: nobody trains the trunk: its matrices stay in the file's number format where that is narrower, all
            but the output layer's.

    Raises:
        ModelError: the trunk does not hold exactly the tensors of this model's trunk.
    """
    model = build_model(spec, meta=True)
    compute_buffers(model, device)
    trunk = load_tensors(trunk_file, device)
    factors = in_file(model, trunk.keys(), trunk.__getitem__)
    if factors.factors:
        attach(model, factors)
    shapes = trunk_shapes(model)
    tied = model.all_tied_weights_keys
    trunk = {name: tensor for name, tensor in trunk.items() if not (name in tied and tied[name] in trunk)}
    other = {name for name in shapes.keys() & trunk.keys() if shapes[name][1] != tuple(trunk[name].shape)}
    missing, unexpected = shapes.keys() - trunk.keys(), trunk.keys() - shapes.keys()
    check_keys(str(trunk_file), set(missing), set(unexpected), other, code="model-bad-trunk")
    narrow = _kept_narrow(model) if frozen else set()
    cast: dict[str, Tensor] = {
        name: (frozen_as_stored if name in narrow else Tensor.to)(tensor, shapes[name][0])
        for name, tensor in trunk.items()
    }
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    experts = expert_parameters(model)
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta and name not in experts]
    if absent:
        raise ModelError(
            f"{trunk_file} leaves `{absent[0]}` of {type(model).__name__} without a value.",
            code="model-bad-trunk",
            fix="split the checkpoint again with this version of transformers",
        )
    return model


def _kept_narrow(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that may stay narrow: not the output layer's, the largest matrix that is multiplied. It
    would be widened as a whole when a pass holds most, and more would be there then than if it were wide throughout.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    return {name for name, param in model.named_parameters() if param is not head}


@torch.no_grad()
def compute_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Give the buffers that no file holds (rotary frequencies and the like) their values, on ``device``.

    transformers builds every model on meta before it loads it, so each family can compute these buffers again in its
    weight initialisation. That runs here, while all parameters are still on meta and cannot be touched.
    """
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        module.__dict__.pop("_is_hf_initialized", None)  # set when the model was built; it would skip the module
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()
