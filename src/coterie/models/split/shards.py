"""Tensor files of a split model: one trunk, one shard of experts per party, written without holding them in memory.

A shard's keys are ``layer.{layer}.expert.{expert}.{parameter}``, all numbers global to the model; a trunk's are the
parameter names of the transformers model. Both are plain safetensors files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from coterie.errors import ModelError
from coterie.models.split.origins import Origin, digest_of_lines, tensor_line, unreadable
from coterie.models.split.trainings import Training
from coterie.models.tensors import Shapes, raw_bytes, tensor_file_layout
from coterie.storage import check_keys, check_known, file_digest, json_object, replacing

TRUNK_FILE = "trunk.safetensors"
MANIFEST_FILE = "manifest.json"
SPLIT_FORMAT = "coterie-split-1"
MODEL_FOLDER = "model"
_FIELDS = (
    "format", "model_class", "model_type", "dtype", "layers", "placement", "placement_hash", "files",
)  # fmt: skip
_PLACEMENT = ("parties", "experts", "hosted")

EXPERT_KEY = re.compile(r"layer\.(0|[1-9]\d*)\.expert\.(0|[1-9]\d*)\.(\w+)")


def shard_file(party: str) -> str:
    """The name of a party's shard."""
    return f"experts-{party}.safetensors"


def expert_key(layer: int, expert: int, parameter: str) -> str:
    """The name of one expert's parameter in a shard."""
    return f"layer.{layer}.expert.{expert}.{parameter}"


def parse_expert_key(key: str) -> tuple[int, int, str]:
    """(layer, expert, parameter) of a key that `expert_key` made.

    Raises:
        ModelError: it is not such a key.
    """
    match = EXPERT_KEY.fullmatch(key)
    if match is None:
        raise ModelError(
            f"`{key}` is not the name of an expert's parameter.",
            code="model-bad-shard",
            fix="shards hold layer.{layer}.expert.{expert}.{parameter}; is this a trunk file?",
        )
    return int(match[1]), int(match[2]), match[3]


_UNKNOWN = "~" * 64
"""Stands where the digest of the content will, which is known when all tensors are written."""


class TensorFileWriter:
    """A safetensors file of a split model, filled a tensor at a time, in any order, with only that one in memory.

    Written aside and renamed by `close`; leaving the ``with`` block on an error removes it.

    Args:
        path: the finished file.
        shapes: every tensor it will hold.
        trainings: what is behind the weights.
    """

    def __init__(self, path: Path, shapes: Shapes, trainings: tuple[Training, ...] = ()) -> None:
        self.path = path
        self._shapes = shapes
        self._open: set[str] = set(shapes)
        self._lines: dict[str, str] = {}
        metadata = Origin("", 0, _UNKNOWN, None, trainings).metadata()
        header, self._offsets, size = tensor_file_layout(shapes, metadata)
        self._content = header.index(_UNKNOWN.encode())
        self._writing = ExitStack()
        aside = self._writing.enter_context(replacing(path))
        self._file: BinaryIO = self._writing.enter_context(aside.open("wb"))
        self._file.write(header)
        self._file.truncate(size)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._writing.__exit__(kind, error, trace)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place; its dtype and shape must be the announced ones."""
        assert (tensor.dtype, tuple(tensor.shape)) == self._shapes[name], name
        self._file.seek(self._offsets[name])
        self._file.write(raw_bytes(tensor))
        self._lines[name] = tensor_line(name, tensor)
        self._open.discard(name)

    def close(self) -> None:
        """Sync and rename. Every announced tensor must have been written."""
        with self._writing:
            assert not self._open, sorted(self._open)
            self._file.seek(self._content)
            self._file.write(digest_of_lines(self._lines.values()).encode())


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tensor file, without its tensors.

    Raises:
        ModelError: there is no such file, or it is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        ModelError: there is no such file, or it is not whole.
    """
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, each mapped when it is asked for: who slices one reads that part, and nothing stays.

    Args:
        path: must stay as it is as long as tensors are asked for; a file that was replaced or written to is refused.
        dtype: what floating-point tensors are cast to; None leaves each as it is.

    Raises:
        ModelError: there is no such file, or it is not whole; also later, when a tensor is asked for. Or it is not
            the file any more that it was.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self._path, self._dtype = path, dtype
        self._state = _state_of(path)
        self._names = frozenset(stored_shapes(path))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise unreadable(self._path, error) from error
        if _state_of(self._path) != self._state:
            raise ModelError(
                f"{self._path} was replaced or written to while it was in use.",
                code="model-changed-file",
                why="part of the weights that are read would be others than those that were checked",
                fix="put the file back as it was, and start this party again",
            )
        return tensor if self._dtype is None or not tensor.is_floating_point() else tensor.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _state_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced, cut off or written to.

    Raises:
        ModelError: there is no such file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `coterie split` wrote about a folder.

    Raises:
        ModelError: there is no manifest, it is of another format, or says what this version does not know.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = json_object(path.read_bytes())
        check_known(path, "format", manifest["format"], {SPLIT_FORMAT}, ModelError)
        check_keys(path, "field", manifest, _FIELDS, ModelError)
        check_keys(path, "field of `placement`", manifest.get("placement", {}).keys(), _PLACEMENT, ModelError)
        for layer in manifest.get("layers", ()):
            check_keys(path, "field of a layer", layer.keys(), ("name", "experts"), ModelError)
        for entry in manifest["files"].values():
            check_keys(path, "field of a file", entry.keys(), ("bytes", "sha256"), ModelError)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_manifest(path) from error
    return manifest


def check_digests(folder: Path) -> dict[str, Any]:
    """Read a split's manifest and compare every file that is present with its digest.

    Returns:
        The manifest.

    Raises:
        ModelError: as `read_manifest`; or a file differs from it. A party has only its own files; absent ones pass.
    """
    manifest = read_manifest(folder)
    try:
        files: dict[str, dict[str, Any]] = manifest["files"]
        differing = [
            name
            for name, entry in files.items()
            if (folder / name).exists() and file_digest(folder / name) != entry["sha256"]
        ]
    except (OSError, KeyError) as error:
        raise _no_manifest(folder / MANIFEST_FILE) from error
    if differing:
        raise ModelError(
            f"{', '.join(differing)} in {folder} changed since the split.",
            code="model-changed-file",
            why="parties would start from different weights",
            fix="copy the files again from where `coterie split` wrote them",
        )
    return manifest


def _no_manifest(path: Path) -> ModelError:
    return ModelError(
        f"{path} is not the manifest of a split model.", code="model-no-manifest", fix="run `coterie split`"
    )
