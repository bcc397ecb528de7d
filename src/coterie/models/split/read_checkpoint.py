"""A Hugging Face checkpoint read a decoder layer at a time, in the names and layout of the model in memory.

Checkpoints on disk may hold other names than the model (one tensor per expert, renamed modules). transformers knows
how to convert them; it is asked to do so for one group of keys after the other, on a model whose parameters are on
the meta device before and after.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from coterie.errors import ModelError
from coterie.models.zoo.build import check_keys, quiet_loading
from coterie.storage import json_object

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def tensor_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype in which transformers loads each parameter and persistent buffer of a model on meta.

    Most have the model's; a few families keep some in float32 (correction biases of routers).
    """
    plan = model._get_dtype_plan(model.dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if plan:
        pattern, globs, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            match = pattern.search(name)
            if match is not None and match.lastgroup is not None:
                dtypes[name] = plan[globs[match.lastgroup]]
    return dtypes


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    Raises:
        ModelError: there are none, or the index names one that is not there.
    """
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted(set(json_object(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{index} is not a weight index.",
                code="model-bad-checkpoint",
                fix="take the file again from where the checkpoint came from",
            ) from error
    else:
        names = [_SINGLE]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ModelError(
            f"{folder} has no {', '.join(absent)}.",
            code="model-bad-checkpoint",
            why="only safetensors files are read: a pickled checkpoint can run code of whoever made it",
            fix="give a folder with safetensors weights, or convert it with transformers' save_pretrained",
        )
    return [folder / name for name in names]


def without_loss(folder: Path, model: PreTrainedModel) -> torch.dtype:
    """The narrowest number format, up to the model's, that holds a checkpoint without loss.

    Args:
        folder: holds the safetensors files.
        model: of the checkpoint's config, on meta.

    Raises:
        ModelError: a file is torn, or there is none.
    """
    own: torch.dtype = model.dtype
    wide = list(model._get_dtype_plan(torch.bfloat16) or ())
    float32_too = build_glob_alternation(wide)[0] if wide else None
    for path in checkpoint_files(folder):
        for key, stored in stored_formats(path).items():
            kept_wide = float32_too is not None and float32_too.search(key) is not None
            if stored != "BF16" and stored.startswith("F") and not kept_wide:
                return own
    return torch.bfloat16


def stored_formats(path: Path) -> dict[str, str]:
    """The number format of every tensor in a file (``F32``, ``BF16``, ...), by name.

    Raises:
        ModelError: the file is torn.
    """
    with _whole(path), safe_open(path, framework="pt") as file:
        return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - no mapping


def stream_checkpoint(folder: Path, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint by their names in the model, one decoder layer (or the rest) at a time.

    Use each group before asking for the next: its tensors may be views of files that are then closed.

    Args:
        folder: holds the safetensors files.
        model: of the checkpoint's config, on the meta device, in the dtype to read; it is on meta again afterwards.

    Raises:
        ModelError: a file is torn; keys are missing, unknown to the model, or of another shape. Missing keys can only
            be known at the end, so nothing may be published before the iterator is exhausted.
    """
    files = checkpoint_files(folder)
    expected = set(model.state_dict())
    seen: set[str] = set()
    unexpected: set[str] = set()
    mapping = get_model_conversion_mapping(model)
    plan = model._get_dtype_plan(model.dtype)
    for keys in _groups(_where_keys_are(files)):
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(keys.values())}
            stored = {key: opened[path].get_tensor(key) for key, path in keys.items()}
            config = LoadStateDictConfig(dtype=model.dtype, dtype_plan=plan, weight_mapping=mapping)
            with quiet_loading():
                info, _ = convert_and_load_state_dict_in_model(model, stored, config)
            unexpected |= set(info.unexpected_keys)
            if info.mismatched_keys:
                check_keys(str(folder), set(), set(), info.mismatched_keys)
            group = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
            seen |= set(group)
            _back_to_meta(model, expected)
            yield group
            group.clear()  # whoever still holds the dict holds no tensor while the next group is read
            del stored, info
        _give_back_freed_memory()
    left = LoadStateDictInfo(
        missing_keys=expected - seen,
        unexpected_keys=unexpected,
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(left)  # the family's own list of keys that may be left over
    tied = model.all_tied_weights_keys
    sources = {tied.get(name, name) for name in seen}
    missing = {name for name in expected - seen if tied.get(name, name) not in sources}
    check_keys(str(folder), missing, set(left.unexpected_keys), set())


def _where_keys_are(files: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        with _whole(path), safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file: {error}.",
            code="model-torn-file",
            why="a part of the weights would be missing",
            fix="download or copy the checkpoint again",
        ) from error


def layer_group(name: str) -> str:
    """The part of a tensor's name up to its first number: a decoder layer, or empty for the rest of the model."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else ""


def _groups(where: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Keys of one decoder layer together, in the order in which transformers itself would read them."""
    groups: dict[str, dict[str, Path]] = {}
    for key in sorted(where, key=dot_natural_key):
        groups.setdefault(layer_group(key), {})[key] = where[key]
    yield from groups.values()


def _give_back_freed_memory() -> None:
    """Return freed pages to the system, where the C library can (glibc).

    Layers fragment its heap: without this a split of 40 layers was seen to grow to a third of the checkpoint, while
    never more than one layer was in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _back_to_meta(model: nn.Module, names: set[str]) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in names or tensor.is_meta:
            continue
        path, _, leaf = name.rpartition(".")
        empty = torch.empty_like(tensor, device="meta")
        value = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        setattr(model.get_submodule(path), leaf, value)
