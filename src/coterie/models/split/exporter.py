"""Join a trunk and shards of experts into a Hugging Face checkpoint, a decoder layer at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from coterie.config import ModelSpec
from coterie.errors import ModelError
from coterie.models.preconditioner import Converter, in_file, is_factor
from coterie.models.seam import ExpertLayer, expert_layers
from coterie.models.split.adapted import AdaptedModel
from coterie.models.split.card import write_card
from coterie.models.split.origins import Origin, check_content, origin_of, tensor_line
from coterie.models.split.read_checkpoint import layer_group, stored_formats, stream_checkpoint
from coterie.models.split.shards import (
    MANIFEST_FILE,
    MODEL_FOLDER,
    TRUNK_FILE,
    check_digests,
    expert_key,
    parse_expert_key,
    read_manifest,
    stored_shapes,
)
from coterie.models.split.splitter import (
    check_vacant,
    copy_beside_weights,
    shard_shapes,
    trunk_shapes,
    write_config,
)
from coterie.models.split.trainings import Training, joined, read_trainings, write_trainings
from coterie.models.zoo.build import build_model, check_keys, structure_of
from coterie.storage import file_digest, json_object, new_folder


def export(
    folder: Path,
    out: Path,
    *,
    trunk: Path | None = None,
    shards: Sequence[Path] | None = None,
    adapter: bool = False,
) -> Path:
    """Write ``out``, a folder that ``from_pretrained`` loads, equal to the model that was split (or trained since).

    Beside the weights lie a card and a privacy statement for programs; see `card.write_card`.

    Adapters that were trained are merged into the weights they change, which are those of ``folder``.

    Args:
        folder: as `splitter.split` wrote it; its ``model`` subfolder says what the model is.
        out: a folder that does not exist yet, or is empty. It appears whole or not at all.
        trunk: default ``folder``'s own.
        shards: of all parties, in any order; default ``folder``'s own.
        adapter: write the trained adapters alone, for peft, instead of the whole model; needs no shards.

    Raises:
        ModelError: a tensor is missing, there twice, unknown or of another shape; a file was changed after it was
            written, or the files are not all of one run and round; or what was written does not read back.
    """
    check_vacant(out)
    trunk = trunk or folder / TRUNK_FILE
    shards = sorted(folder.glob("experts-*.safetensors")) if shards is None else list(shards)
    model = build_model(split_spec(folder), meta=True)
    origin, trainings = _one_origin(folder, [trunk] if adapter else [trunk, *shards])
    if adapter and origin.lora is None:
        raise ModelError(
            f"{trunk} holds no adapters: the weights themselves were trained.",
            code="model-no-adapters",
            fix="leave out --adapter to export the whole model",
        )
    with new_folder(out) as aside:
        # peft changes the model that it is given, so the adapters get one of their own.
        base = build_model(split_spec(folder), meta=True)
        adapted = None if origin.lora is None else AdaptedModel(base, origin.lora, trunk)
        if adapter and adapted is not None:
            adapted.save_adapter(aside)
        else:
            base_trunk, base_shards = (trunk, shards) if adapted is None else _bases(folder, trunk, shards)
            model = structure_of(model.config, _dtype_in(base_trunk, model))
            _write_whole(aside, folder, _Sources.of(model, base_trunk, base_shards, trunk, adapted))
        write_trainings(aside, joined(read_trainings(folder / MODEL_FOLDER), trainings))
        write_card(aside)
    return out


def _one_origin(folder: Path, files: Sequence[Path]) -> tuple[Origin, tuple[Training, ...]]:
    """Where all files come from, every byte of them checked, and the trainings behind any of them.

    Raises:
        ModelError: they are not of one run and round, one is of another split than ``folder``, or a file of
            ``folder`` changed since the split.
    """
    origins = {path: check_content(path) for path in files}
    first, *others = origins.items()
    for path, origin in others:
        if (origin.run, origin.round) != (first[1].run, first[1].round):
            raise ModelError(
                f"{first[0]} is of {first[1].words()}, and {path} of {origin.words()}.",
                code="model-parts-mixed",
                why="each is whole, but together they are a model that nobody trained",
                fix="give the trunk and every party's shard of one round: run/private/checkpoints/round-.../ of each "
                "party",
            )
    if first[1].run and not (folder / MANIFEST_FILE).exists():
        return first[1], joined(*(origin.trainings for origin in origins.values()))
    manifest = check_digests(folder)  # the config too: another number of experts per token is another model
    if not first[1].run:
        listed = {str(entry["sha256"]) for entry in manifest["files"].values()}
        strange = [path for path in files if file_digest(path) not in listed]
        if strange:
            raise ModelError(
                f"{strange[0]} is of another split than {folder}.",
                code="model-parts-mixed",
                why="it may belong to another model of the same shape",
                fix="give the folder that `coterie split` wrote it to",
            )
    return first[1], joined(*(origin.trainings for origin in origins.values()))


def _bases(folder: Path, trunk: Path, shards: Sequence[Path]) -> tuple[Path, list[Path]]:
    """The files of ``folder`` with the frozen weights that files of adapters leave out, every byte checked.

    Raises:
        ModelError: one of them is not there, or they are not of one origin.
    """
    held: dict[str, Path] = {}
    for path in (folder / TRUNK_FILE, *sorted(folder.glob("experts-*.safetensors"))):
        if path.exists():
            held[check_content(path).content] = path
    found = []
    for path in (trunk, *shards):
        base = origin_of(path).base
        if base not in held:
            raise ModelError(
                f"{folder} does not hold the frozen weights that {path} goes with."
                if base
                else f"{path} holds frozen weights beside the adapters, as an earlier version wrote them.",
                code="model-no-base",
                why="adapters alone are no model: they are added to the weights that they were trained on",
                fix="give the folder that `coterie split` wrote for this run, with the trunk and all shards in it, "
                "or write the adapters alone with --adapter",
            )
        found.append(held[base])
    return found[0], found[1:]


def _dtype_in(trunk: Path, model: PreTrainedModel) -> torch.dtype:
    """The number format in which a trunk file holds most of what the model has in its own; training may widen it."""
    formats, own = stored_formats(trunk), model.dtype
    found = Counter(formats.get(name) for name, (dtype, _) in trunk_shapes(model).items() if dtype == own)
    return torch.bfloat16 if found["BF16"] > found["F32"] else torch.float32


def _write_whole(out: Path, folder: Path, sources: _Sources) -> None:
    for path in sorted((folder / MODEL_FOLDER).iterdir()):
        shutil.copyfile(path, out / path.name)
    _write_checked(out, sources.model, sources.groups())


def write_from_layers(
    out: Path, model: PreTrainedModel, trunk: Path, layer: Callable[[int], Mapping[str, Tensor]]
) -> None:
    """Write a whole checkpoint from a trunk file and stacked experts, a decoder layer in memory at a time.

    Args:
        out: a folder that exists.
        model: on meta, without adapters; says in which dtype it is written.
        trunk: file of the trunk, without adapters.
        layer: the experts of an MoE layer, {name: [E, ...]}, in any float dtype.

    Raises:
        ModelError: the trunk is not this model's, or what was written does not read back.
    """
    names = _trunk_names(model, trunk)

    def stacked(of: ExpertLayer) -> dict[str, Tensor]:
        return {f"{of.name}.{name}": value.to(model.dtype) for name, value in layer(of.index).items()}

    places = {name: (trunk, kept) for name, kept in names.items()}
    sources = _Sources(model, places, stacked, {}, _converter(model, trunk))
    _write_checked(out, model, sources.groups())


def write_from_checkpoint(out: Path, folder: Path) -> None:
    """Write a checkpoint again, with all that lies beside its weights, a decoder layer in memory at a time.

    Args:
        out: a folder that exists.
        folder: as `saved.save_model` wrote it.

    Raises:
        ModelError: a file of ``folder`` is torn, or what was written does not read back.
    """
    copy_beside_weights(folder, out)
    model = build_model(_as_stored(folder), meta=True)
    _write_checked(out, model, stream_checkpoint(folder, structure_of(model.config, model.dtype)))


def write_from_memory(out: Path, model: PreTrainedModel) -> None:
    """Write a whole model, one file a decoder layer.

    Args:
        out: a folder that exists.
        model: on any device, without adapters.

    Raises:
        ModelError: what was written does not read back.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: dot_natural_key(item[0])):
        groups.setdefault(layer_group(name), {})[name] = tensor.detach()
    if model.can_generate():
        model.generation_config.save_pretrained(out)
    whole = structure_of(model.config, model.dtype)
    _write_checked(out, whole, ({name: value.cpu() for name, value in group.items()} for group in groups.values()))


def _write_checked(out: Path, model: PreTrainedModel, groups: Iterable[Mapping[str, Tensor]]) -> None:
    written = _write_weights(out, model, groups)
    write_config(model, out)
    for group in stream_checkpoint(out, structure_of(model.config, model.dtype)):
        for name, tensor in group.items():
            if written.get(name, "") != tensor_line(name, tensor):
                raise ModelError(
                    f"`{name}` in {out} is not what was written.",
                    code="model-saved-differs",
                    fix="write it again to another disk",
                )


def split_spec(folder: Path) -> ModelSpec:
    """The spec of a split model: its ``model`` subfolder, in the dtype it was split in.

    Raises:
        ModelError: ``folder`` is not what `splitter.split` writes, or its manifest is of another format.
    """
    path = folder / MODEL_FOLDER / "config.json"
    if (folder / MANIFEST_FILE).exists():
        read_manifest(folder)
    try:
        return _as_stored(path.parent)
    except (OSError, ValueError, KeyError) as error:
        what = f"is not a split model: {path.name} in `{MODEL_FOLDER}` is missing or unreadable"
        raise ModelError(
            f"{folder} {what}." if os.path.lexists(folder) else f"There is no folder {folder}.",
            code="model-no-manifest",
            fix="give the folder that `coterie split` wrote, or to `coterie export` the run_dir of `coterie train`",
        ) from error


def _as_stored(folder: Path) -> ModelSpec:
    return ModelSpec(path=folder, dtype=json_object((folder / "config.json").read_bytes())["dtype"])


@dataclass(frozen=True)
class _Sources:
    """Which file holds which tensor: trunk tensors by name, experts by key.

    Attributes:
        model: on meta, without adapters.
        trunk: the file of each trunk tensor, and its name there.
        experts: the stacked parameters of a layer, by their names in the model.
        changes: what adapters add, by the name of the weight.
        converter: back from the coordinates in which the files are.
    """

    model: PreTrainedModel
    trunk: Mapping[str, tuple[Path, str]]
    experts: Callable[[ExpertLayer], dict[str, Tensor]]
    changes: Mapping[str, Callable[[], Tensor]]
    converter: Converter

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        trunk: Path,
        shards: Sequence[Path],
        trained: Path,
        adapted: AdaptedModel | None,
    ) -> _Sources:
        """Read the headers and make sure that together they are exactly this model.

        Args:
            model: on meta, without adapters.
            trunk: of the model.
            shards: of the model's experts.
            trained: of adapters; what it holds beside them takes the place of what ``trunk`` holds.
            adapted: the model with these adapters; None where the weights themselves were trained.
        """
        trunk_of = {name: (trunk, kept) for name, kept in _trunk_names(model, trunk).items()}
        if adapted is not None:
            newer = stored_shapes(trained)
            trunk_of |= {name: (trained, kept) for name, kept in adapted.stored.items() if kept in newer}
        changes = adapted.changes if adapted is not None else {}
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
        return cls(model, trunk_of, partial(_stack_experts, where=experts), changes, _converter(model, trunk))

    def groups(self) -> Iterator[dict[str, Tensor]]:
        """The model's tensors by name, adapters merged, a decoder layer (or the rest) at a time."""
        names: dict[str, list[str]] = {}
        layers = {f"{layer.name}.": layer for layer in expert_layers(self.model)}
        for name in sorted([*self.trunk, *layers], key=dot_natural_key):
            names.setdefault(layer_group(name), []).append(name)
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                for path in {path for path, _ in self.trunk.values()}
            }
            for group in names.values():
                tensors: dict[str, Tensor] = {}
                for name in group:
                    if name in layers:
                        tensors |= self.experts(layers[name])
                    else:
                        path, kept = self.trunk[name]
                        tensors[name] = files[path].get_tensor(kept)
                tensors = {name: self.converter.plain(name, tensor) for name, tensor in tensors.items()}
                for name in tensors.keys() & self.changes.keys():
                    tensors[name] = (tensors[name].float() + self.changes[name]()).to(tensors[name].dtype)
                yield tensors


def _converter(model: PreTrainedModel, trunk: Path) -> Converter:
    """Out of a trunk file's coordinates into the model's own."""
    with safe_open(trunk, framework="pt", backend="pread") as file:
        return Converter(model, in_file(model, set(file.keys()), file.get_tensor))


def _trunk_names(model: PreTrainedModel, trunk: Path) -> dict[str, str]:
    """The file's name of each of the model's own trunk tensors."""
    stored = stored_shapes(trunk)
    names = {name: name for name in stored if not is_factor(name)}
    tied = model.all_tied_weights_keys
    names = {name: kept for name, kept in names.items() if not (name in tied and tied[name] in names)}
    found = {name: stored[kept] for name, kept in names.items()}
    _check_shapes(str(trunk), found, {name: shape for name, (_, shape) in trunk_shapes(model).items()})
    return names


def _check_shapes(where: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    other = {key for key in expected.keys() & found.keys() if expected[key] != found[key]}
    check_keys(where, set(missing), set(unexpected), other, code="model-bad-shard")


def _write_weights(out: Path, model: PreTrainedModel, groups: Iterable[Mapping[str, Tensor]]) -> dict[str, str]:
    """One safetensors file a group, with an index: what `save_pretrained` calls a sharded checkpoint.

    Args:
        out: a folder that exists.
        model: on meta, without adapters.
        groups: its tensors by name, a decoder layer (or the rest) at a time.

    Returns:
        `tensor_line` of every tensor, by its name in the model.
    """
    tied = model.all_tied_weights_keys
    files: list[list[str]] = []
    written: dict[str, str] = {}
    total = 0
    for group in groups:
        own = {name: tensor for name, tensor in group.items() if tied.get(name) not in group}
        written |= {name: tensor_line(name, tensor) for name, tensor in own.items()}
        reverted = revert_weight_conversion(model, own)
        saved = {key: tensor.contiguous() for key, tensor in reverted.items()}
        save_file(saved, out / _file_name(len(files) + 1, 0), metadata={"format": "pt"})
        files.append(list(saved))
        total += sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(files, start=1):
        name = _file_name(number, len(files))
        (out / _file_name(number, 0)).rename(out / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def _file_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _stack_experts(layer: ExpertLayer, where: dict[str, Path]) -> dict[str, Tensor]:
    """The stacked parameters of a layer, from the files of the parties that host its experts."""
    stacked = {}
    with ExitStack() as stack:
        keys = [
            expert_key(layer.index, expert, name)
            for expert in range(layer.num_experts)
            for name in layer.parameters()
        ]
        files = {
            path: stack.enter_context(safe_open(path, framework="pt", backend="pread"))
            for path in {where[key] for key in keys}
        }
        for name in layer.layout.parameter_names:
            experts = [expert_key(layer.index, expert, name) for expert in range(layer.num_experts)]
            stacked[f"{layer.name}.{name}"] = torch.stack([files[where[key]].get_tensor(key) for key in experts])
    return stacked
