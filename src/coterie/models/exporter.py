"""Join a trunk and shards of experts into a Hugging Face checkpoint, a decoder layer at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from coterie.config import ModelSpec
from coterie.errors import ModelError
from coterie.models.build import build_model, check_keys
from coterie.models.seam import ExpertLayer, expert_layers
from coterie.models.shards import MODEL_FOLDER, TRUNK_FILE, expert_key, parse_expert_key, stored_shapes
from coterie.models.splitter import check_vacant, shard_shapes, trunk_shapes, write_config
from coterie.models.stream import layer_group


def export(folder: Path, out: Path, *, trunk: Path | None = None, shards: Sequence[Path] | None = None) -> Path:
    """Write ``out``, a folder that ``from_pretrained`` loads, equal to the model that was split (or trained since).

    Args:
        folder: as `splitter.split` wrote it; its ``model`` subfolder says what the model is.
        out: a folder that does not exist yet, or is empty. It appears whole or not at all.
        trunk: default ``folder``'s own.
        shards: of all parties, in any order; default ``folder``'s own.

    Raises:
        ModelError: a tensor is missing, there twice, unknown or of another shape.
    """
    check_vacant(out)
    trunk = trunk or folder / TRUNK_FILE
    shards = sorted(folder.glob("experts-*.safetensors")) if shards is None else list(shards)
    model = build_model(split_spec(folder), meta=True)
    pieces = _Pieces.of(model, trunk, shards)
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_weights(aside, model, pieces)
        for path in sorted((folder / MODEL_FOLDER).iterdir()):
            shutil.copyfile(path, aside / path.name)
        write_config(model, aside)
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out


def split_spec(folder: Path) -> ModelSpec:
    """The spec of a split model: its ``model`` subfolder, in the dtype it was split in.

    Raises:
        ModelError: ``folder`` is not what `splitter.split` writes.
    """
    path = folder / MODEL_FOLDER / "config.json"
    try:
        dtype = json.loads(path.read_text(encoding="utf-8"))["dtype"]
        return ModelSpec(path=folder / MODEL_FOLDER, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} is not a split model: {path.name} in `{MODEL_FOLDER}` is missing or unreadable.",
            code="model-no-manifest",
            fix="give the folder that `coterie split` wrote",
        ) from error


@dataclass(frozen=True)
class _Pieces:
    """Which file holds which tensor: trunk tensors by name, experts by key."""

    trunk: Path
    trunk_names: tuple[str, ...]
    experts: dict[str, Path]

    @classmethod
    def of(cls, model: PreTrainedModel, trunk: Path, shards: Sequence[Path]) -> _Pieces:
        """Read the headers and make sure that together they are exactly this model."""
        found = stored_shapes(trunk)
        tied = model.all_tied_weights_keys
        found = {name: shape for name, shape in found.items() if not (name in tied and tied[name] in found)}
        _check_shapes(str(trunk), found, {name: shape for name, (_, shape) in trunk_shapes(model).items()})
        experts: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in shards:
            for key, shape in stored_shapes(path).items():
                if key in experts:
                    layer, expert, _ = parse_expert_key(key)
                    raise ModelError(
                        f"Layer {layer} expert {expert} is in {experts[key].name} and in {path.name}.",
                        code="model-shards-overlap",
                        why="two parties trained the same expert, and only one of the two could be kept",
                        fix="give one shard per party, all of one placement",
                    )
                experts[key], shapes[key] = path, shape
        everything = {layer.index: range(layer.num_experts) for layer in expert_layers(model)}
        expected = {key: shape for key, (_, shape) in shard_shapes(model, everything).items()}
        _check_shapes("the set of shards", shapes, expected)
        return cls(trunk, tuple(found), experts)


def _check_shapes(where: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    other = {key for key in expected.keys() & found.keys() if expected[key] != found[key]}
    check_keys(where, set(missing), set(unexpected), other, code="model-bad-shard")


def _write_weights(out: Path, model: PreTrainedModel, pieces: _Pieces) -> None:
    """One safetensors file a decoder layer, with an index: what `save_pretrained` calls a sharded checkpoint."""
    names: dict[str, list[str]] = {}
    layers = {layer.name: layer for layer in expert_layers(model)}
    for name in sorted([*pieces.trunk_names, *(f"{layer}." for layer in layers)], key=dot_natural_key):
        names.setdefault(layer_group(name), []).append(name)
    weight_map: dict[str, str] = {}
    total = 0
    with ExitStack() as stack:
        trunk = stack.enter_context(safe_open(pieces.trunk, framework="pt"))
        for number, group in enumerate(names.values(), start=1):
            tensors: dict[str, Tensor] = {}
            for name in group:
                if name.removesuffix(".") in layers and name.endswith("."):
                    tensors |= _stack_experts(layers[name.removesuffix(".")], pieces.experts)
                else:
                    tensors[name] = trunk.get_tensor(name)
            file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
            saved = {key: tensor.contiguous() for key, tensor in revert_weight_conversion(model, tensors).items()}
            save_file(saved, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(saved, file)
            total += sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stack_experts(layer: ExpertLayer, where: dict[str, Path]) -> dict[str, Tensor]:
    """The stacked parameters of a layer, from the files of the parties that host its experts."""
    stacked = {}
    with ExitStack() as stack:
        keys = [
            expert_key(layer.index, expert, name)
            for expert in range(layer.num_experts)
            for name in layer.parameters()
        ]
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in {where[key] for key in keys}}
        for name in layer.layout.parameter_names:
            experts = [expert_key(layer.index, expert, name) for expert in range(layer.num_experts)]
            stacked[f"{layer.name}.{name}"] = torch.stack([files[where[key]].get_tensor(key) for key in experts])
    return stacked
