"""Turn a checkpoint into a trunk and one shard of experts per party, and join them again.

Memory stays near one decoder layer, whatever the size of the model: layers are read, cut and written one by one.
Partial models never pass through transformers' save and load, which would renumber or randomly fill experts.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel

from coterie.config import ModelSpec
from coterie.errors import ModelError
from coterie.models.preconditioner import Converter, Preconditioner, attach, is_factor
from coterie.models.seam import ExpertLayer, expert_layers
from coterie.models.split.placement import Placement
from coterie.models.split.read_checkpoint import stream_checkpoint, tensor_dtypes, without_loss
from coterie.models.split.shards import (
    MANIFEST_FILE,
    MODEL_FOLDER,
    SPLIT_FORMAT,
    TRUNK_FILE,
    TensorFileWriter,
    expert_key,
    shard_file,
)
from coterie.models.split.trainings import Training, read_trainings, write_trainings
from coterie.models.tensors import Shapes, raw_bytes
from coterie.models.zoo.build import build_model, files_alone, quantized_error, structure_of
from coterie.storage import file_digest, is_vacant, new_folder, write_json

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")


def split(
    spec: ModelSpec,
    placement: Placement,
    out: Path,
    *,
    seed: int | None = None,
    preconditioner: Preconditioner | None = None,
) -> dict[str, Any]:
    """Write ``out``: trunk, shards, the model's config and tokenizer, and a manifest with digests.

    A bfloat16 checkpoint is written in bfloat16 whatever the spec's dtype: whoever reads it widens it, without loss.

    Args:
        spec: ``path`` or ``hub`` are read layer by layer; ``family`` (random weights) is built in memory first.
        placement: of the model's experts.
        out: a folder that does not exist yet, or is empty. It appears whole or not at all.
        seed: of a family's random weights.
        preconditioner: what is written is in its coordinates and in float32, and the trunk holds the factors.

    Returns:
        The manifest.

    Raises:
        PlacementError: the placement is for other layers or experts.
        ModelError: the checkpoint does not fit its config exactly, is quantised, or ``out`` is not empty; the
            preconditioner is of another model.
    """
    check_vacant(out)
    folder = _local_folder(spec)
    model = build_model(spec, meta=True)
    placement.check_model(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise quantized_error(str(spec.path or spec.hub), "its experts would be packed")
    if folder is not None:
        model = structure_of(model.config, without_loss(folder, model))
    groups = stream_checkpoint(folder, model) if folder is not None else _in_memory(spec, seed)
    if preconditioner is not None:
        model = structure_of(model.config, torch.float32)
        groups = _in_coordinates(groups, Converter(model, preconditioner))
        attach(model, preconditioner)
    with new_folder(out) as aside:
        trainings = read_trainings(folder)
        _write_tensors(aside, model, placement, groups, trainings)
        _write_model_folder(aside / MODEL_FOLDER, model, folder)
        write_trainings(aside / MODEL_FOLDER, trainings)
        return _write_manifest(aside, model, placement)


def trunk_shapes(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What a trunk file holds: every parameter and persistent buffer that is no expert's, tied ones once."""
    experts = set(expert_parameters(model))
    dtypes = tensor_dtypes(model)
    return {
        name: (dtypes[name], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in experts and name not in model.all_tied_weights_keys
    }


def shard_shapes(
    model: PreTrainedModel, hosted: Mapping[int, Sequence[int]]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What the shard of a party that hosts ``hosted`` (as `Placement.hosted` gives it) holds."""
    dtypes = tensor_dtypes(model)
    shapes = {}
    for layer in expert_layers(model):
        for expert in hosted.get(layer.index, ()):
            for name, stacked in layer.parameters().items():
                key = expert_key(layer.index, expert, name)
                shapes[key] = (dtypes[f"{layer.name}.{name}"], tuple(stacked.shape[1:]))
    return shapes


def expert_parameters(model: PreTrainedModel) -> dict[str, tuple[ExpertLayer, str]]:
    """Every stacked expert parameter of a model by its transformers name, with its layer and its name there."""
    return {
        f"{layer.name}.{name}": (layer, name)
        for layer in expert_layers(model)
        for name in layer.layout.parameter_names
    }


def _write_tensors(
    folder: Path,
    model: PreTrainedModel,
    placement: Placement,
    groups: Iterator[dict[str, Tensor]],
    trainings: tuple[Training, ...],
) -> None:
    experts = expert_parameters(model)
    with ExitStack() as stack:

        def writer(name: str, shapes: Shapes) -> TensorFileWriter:
            return stack.enter_context(TensorFileWriter(folder / name, shapes, trainings))

        trunk = _TrunkWriter(writer(TRUNK_FILE, trunk_shapes(model)), model.all_tied_weights_keys)
        shards = [
            writer(shard_file(party), shard_shapes(model, placement.hosted(party))) for party in placement.parties
        ]
        for group in groups:
            for name, tensor in group.items():
                if name not in experts:
                    trunk.write(name, tensor)
                    continue
                layer, parameter = experts[name]
                for expert, host in enumerate(placement.host_of(layer.index)):
                    shards[host].write(expert_key(layer.index, expert, parameter), tensor[expert])
        for name, tensor in model.state_dict().items():
            if is_factor(name):
                trunk.write(name, tensor)


def _in_coordinates(groups: Iterator[dict[str, Tensor]], converter: Converter) -> Iterator[dict[str, Tensor]]:
    for group in groups:
        wide = {name: t.float() if t.is_floating_point() else t for name, t in group.items()}
        yield {name: converter.stored(name, tensor) for name, tensor in wide.items()}


class _TrunkWriter:
    """Writes a tied tensor once, under the name it is tied to, and makes sure that its copies agree."""

    def __init__(self, writer: TensorFileWriter, tied: Mapping[str, str]) -> None:
        self._writer = writer
        self._tied = tied
        self._digests: dict[str, bytes] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        source = self._tied.get(name, name)
        if source in self._tied.values():
            digest = hashlib.sha256(raw_bytes(tensor)).digest()
            if self._digests.setdefault(source, digest) != digest:
                raise ModelError(
                    f"The checkpoint holds different tensors for `{name}` and `{source}`, which its config ties.",
                    code="model-tied-differ",
                    why="only one of the two could be trained",
                    fix="set tie_word_embeddings to false in the checkpoint's config.json",
                )
        self._writer.write(source, tensor)


def _in_memory(spec: ModelSpec, seed: int | None) -> Iterator[dict[str, Tensor]]:
    model = build_model(spec, seed=seed)
    yield dict(model.state_dict())


def _local_folder(spec: ModelSpec) -> Path | None:
    if spec.path is not None:
        return Path(spec.path)
    if spec.hub is None:
        return None
    build_model(spec, meta=True)  # reports an unknown name or a missing network in our words
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    alone = files_alone(spec)
    return Path(snapshot_download(spec.hub, revision=spec.revision, allow_patterns=patterns, local_files_only=alone))


def check_vacant(out: Path) -> None:
    if not is_vacant(out):
        raise ModelError(
            f"{out} exists and is not an empty folder.",
            code="model-out-exists",
            why="files of two models in one folder cannot be told apart",
            fix="choose another folder, or remove it",
        )


def _write_model_folder(folder: Path, model: PreTrainedModel, source: Path | None) -> None:
    """The config of the text model, and every small file beside the weights (tokenizer, generation settings)."""
    folder.mkdir()
    if source is not None:
        copy_beside_weights(source, folder)
    write_config(model, folder)


def copy_beside_weights(source: Path, folder: Path) -> None:
    """Copy every small file of a checkpoint (tokenizer, generation settings), but no weights and no config."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES) and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """config.json as ``save_pretrained`` would write it for this class and dtype."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)


def _write_manifest(folder: Path, model: PreTrainedModel, placement: Placement) -> dict[str, Any]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {
        "format": SPLIT_FORMAT,
        "model_class": type(model).__name__,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": [{"name": layer.name, "experts": layer.num_experts} for layer in expert_layers(model)],
        "placement": placement.to_json(),
        "placement_hash": placement.content_hash(),
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in files
        },
    }
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest
