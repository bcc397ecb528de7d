"""Expert weights kept off the device, a layer at a time, each layer known by its digest.

An owner in the `experts` exchange holds here what the hosts sent. The cache lives in host memory (pinned where a
GPU will read it) or in one memory-mapped safetensors file a layer.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.errors import CheckpointError, RoundError
from coterie.models.tensors import raw_bytes
from coterie.storage import clear_leftovers, replacing

LayerWeights = Mapping[str, Tensor]


class LayerStore(Protocol):
    """Where layers lie between uses."""

    def put(self, layer: int, weights: LayerWeights) -> None: ...

    def get(self, layer: int) -> LayerWeights: ...


class MemoryStore:
    """Layers in host memory.

    Args:
        pinned: page-lock them, so that a copy to a GPU runs beside its compute. Needs CUDA.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._layers: dict[int, LayerWeights] = {}

    def put(self, layer: int, weights: LayerWeights) -> None:
        self._layers[layer] = {
            name: tensor.pin_memory() if self._pinned else tensor for name, tensor in weights.items()
        }

    def get(self, layer: int) -> LayerWeights:
        return self._layers[layer]


class FileStore:
    """One safetensors file a layer, read through a memory map: host memory holds only what is in use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)

    def put(self, layer: int, weights: LayerWeights) -> None:
        path = _layer_path(self._folder, layer)
        try:
            with replacing(path, synced=False) as aside:
                save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside)
        except Exception as error:
            raise _cannot_write(path, error) from error

    def get(self, layer: int) -> LayerWeights:
        return load_file(_layer_path(self._folder, layer))


def _layer_path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:04d}.safetensors"


class PinnedFiles:
    """The layers that another process of this machine keeps in a `FileStore`, as it has pinned them; read only.

    Args:
        folder: of the store.
        num_layers: how many there are.
    """

    def __init__(self, folder: Path, num_layers: int) -> None:
        self._folder = folder
        self.num_layers = num_layers
        self._digests: dict[int, str] = {}
        self._seen: set[int] = set()

    def pin(self, digests: Mapping[int, str]) -> None:
        """From now on layers have these digests."""
        self._digests, self._seen = dict(digests), set()

    def digests(self) -> dict[int, str]:
        """Digest of every layer."""
        return dict(self._digests)

    def get(self, layer: int) -> LayerWeights:
        """The stored tensors, off the device; compared with the pinned digest the first time.

        Raises:
            RoundError: they are not what was pinned.
        """
        weights = load_file(_layer_path(self._folder, layer))
        if layer not in self._seen:
            if digest_layer(weights) != self._digests.get(layer):
                raise RoundError(
                    f"layer {layer} is not in the cache as it was fetched for this round.",
                    code="weights-changed",
                    where=str(self._folder),
                    why="every pass over a record must see the same weights",
                    fix="let nothing else write there; the round is tried again",
                )
            self._seen.add(layer)
        return weights


def _cannot_write(path: Path, error: Exception) -> CheckpointError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    return CheckpointError(
        f"the expert cache cannot write {path.name}: {'the disk is full' if full else error}.",
        code="cache-full" if full else "cache-write",
        where=str(path.parent),
        why="the round needs every layer; nothing was sent and the earlier file is untouched",
        fix="free space, or set `cache: memory` in party.yaml; the round is tried again",
    )


def digest_layer(weights: LayerWeights) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of one layer's tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


class WeightCache:
    """The layers of one model, each pinned to a digest for the length of a round.

    Guarantee: between `begin_round` calls a layer's bytes never change: a second `put` with other bytes raises.
    """

    def __init__(self, store: LayerStore, num_layers: int) -> None:
        self._store = store
        self.num_layers = num_layers
        self._digests: dict[int, str] = {}
        self._pinned: set[int] = set()

    def begin_round(self) -> None:
        """Let every layer be replaced once."""
        self._pinned.clear()

    def put(self, layer: int, weights: LayerWeights) -> str:
        """Store a layer and pin it until the next round; returns its digest.

        Raises:
            RoundError: the layer is pinned in this round to other bytes.
            CheckpointError: the store cannot be written.
        """
        digest = digest_layer(weights)
        if layer in self._pinned and digest != self._digests[layer]:
            raise RoundError(
                f"layer {layer} came twice in one round with different bytes "
                f"({self._digests[layer][:8]}.. and {digest[:8]}..).",
                code="weights-changed",
                why="the two passes of clipping must see the same weights, or the clipped norm is not bounded",
                fix="the round is aborted; ask the host of this layer why it served two versions",
            )
        if self._digests.get(layer) != digest:
            self._store.put(layer, weights)
        self._digests[layer] = digest
        self._pinned.add(layer)
        return digest

    def get(self, layer: int) -> LayerWeights:
        """The stored tensors, off the device. Raises CheckpointError for a layer that never came."""
        if layer not in self._digests:
            raise CheckpointError(
                f"the weights of MoE layer {layer} are not in the cache.",
                code="cache-missing-layer",
                fix="fetch every layer before the lot is processed",
            )
        return self._store.get(layer)

    def digests(self) -> dict[int, str]:
        """Digest of every cached layer."""
        return dict(self._digests)
