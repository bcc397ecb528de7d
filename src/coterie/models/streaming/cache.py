"""Expert weights kept off the device, a layer at a time, each layer known by its digest.

An owner in the `experts` exchange holds here what the hosts sent. The cache lives in host memory (pinned where a
GPU will read it) or in one memory-mapped safetensors file a layer.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.errors import CheckpointError, RoundError
from coterie.models.shares import rows_of
from coterie.models.tensors import raw_bytes
from coterie.storage import clear_leftovers, replacing

LayerWeights = Mapping[str, Tensor]
Digests = tuple[str, ...]
"""Of a layer: one for the experts of each rank that shares them, or of all."""


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
        share, shares: which of so many ranks' experts are read; only their bytes are looked at.
    """

    def __init__(self, folder: Path, num_layers: int, share: int = 0, shares: int = 1) -> None:
        self._folder = folder
        self.num_layers = num_layers
        self._share, self._shares = share, shares
        self._digests: dict[int, Digests] = {}
        self._seen: set[int] = set()

    def pin(self, digests: Mapping[int, Sequence[str]]) -> None:
        """From now on the shares of layers have these digests."""
        self._digests, self._seen = {layer: tuple(each) for layer, each in digests.items()}, set()

    def digests(self) -> dict[int, Digests]:
        """Digests of every layer's shares."""
        return dict(self._digests)

    def get(self, layer: int) -> LayerWeights:
        """What is read of the stored tensors, off the device; compared with the pinned digest the first time.

        Raises:
            RoundError: they are not what was pinned.
        """
        weights = rows_of(load_file(_layer_path(self._folder, layer)), self._share, self._shares)
        if layer not in self._seen:
            if layer not in self._digests or digest_layer(weights) != self._digests[layer][self._share]:
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
    """The layers of one model, each pinned to its digests for the length of a round.

    Guarantee: between `begin_round` calls a layer's bytes never change: a second `put` with other bytes raises.

    Args:
        store: where they lie.
        num_layers: how many there are.
        shares: ranks that share the experts of each layer; every one's rows have a digest of their own.
    """

    def __init__(self, store: LayerStore, num_layers: int, shares: int = 1) -> None:
        self._store = store
        self.num_layers = num_layers
        self._shares = shares
        self._digests: dict[int, Digests] = {}
        self._pinned: set[int] = set()

    def begin_round(self) -> None:
        """Let every layer be replaced once."""
        self._pinned.clear()

    def put(self, layer: int, weights: LayerWeights) -> Digests:
        """Store a layer and pin it until the next round; returns the digests of its shares.

        Raises:
            RoundError: the layer is pinned in this round to other bytes.
            CheckpointError: the store cannot be written.
        """
        digests = tuple(digest_layer(rows_of(weights, share, self._shares)) for share in range(self._shares))
        if layer in self._pinned and digests != self._digests[layer]:
            before, now = next(pair for pair in zip(self._digests[layer], digests, strict=True) if len({*pair}) > 1)
            raise RoundError(
                f"layer {layer} came twice in one round with different bytes ({before[:8]}.. and {now[:8]}..).",
                code="weights-changed",
                why="the two passes of clipping must see the same weights, or the clipped norm is not bounded",
                fix="the round is aborted; ask the host of this layer why it served two versions",
            )
        if self._digests.get(layer) != digests:
            self._store.put(layer, weights)
        self._digests[layer] = digests
        self._pinned.add(layer)
        return digests

    def get(self, layer: int) -> LayerWeights:
        """The stored tensors, off the device. Raises CheckpointError for a layer that never came."""
        if layer not in self._digests:
            raise CheckpointError(
                f"the weights of MoE layer {layer} are not in the cache.",
                code="cache-missing-layer",
                fix="fetch every layer before the lot is processed",
            )
        return self._store.get(layer)

    def digests(self) -> dict[int, Digests]:
        """Digests of every cached layer's shares."""
        return dict(self._digests)
