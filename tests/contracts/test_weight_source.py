"""Whatever lends layers to the device keeps the rules of `WeightSource`, wherever the layers lie."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from coterie.models.streaming.cache import (
    FileStore,
    LayerWeights,
    MemoryStore,
    PinnedFiles,
    WeightCache,
    digest_layer,
)
from coterie.models.streaming.streamer import LayerReader, LayerStreamer

LAYERS = 4


def weights(layer: int) -> LayerWeights:
    generator = torch.Generator().manual_seed(layer)
    return {
        "up_proj": torch.randn(3, 8, 5, generator=generator),
        "down_proj": torch.randn(3, 5, 8, generator=generator),
    }


def filled(store: MemoryStore | FileStore) -> WeightCache:
    cache = WeightCache(store, LAYERS)
    for layer in range(LAYERS):
        cache.put(layer, weights(layer))
    return cache


class Arriving:
    """A reader whose layers come in while they are asked for, last ones last; the owner's mirror does the same."""

    num_layers = LAYERS

    def __init__(self) -> None:
        self._there = [threading.Event() for _ in range(LAYERS)]
        threading.Thread(target=self._fetch, daemon=True).start()

    def _fetch(self) -> None:
        for there in self._there:
            time.sleep(0.02)
            there.set()

    def get(self, layer: int) -> LayerWeights:
        assert self._there[layer].wait(60.0)
        return weights(layer)

    def digests(self) -> dict[int, str]:
        return {layer: (digest_layer(self.get(layer)),) for layer in range(LAYERS)}


def another_process(folder: Path) -> PinnedFiles:
    """What another rank of the party reads."""
    found = PinnedFiles(folder, LAYERS)
    found.pin(filled(FileStore(folder)).digests())
    return found


READERS: dict[str, Callable[[Path], LayerReader]] = {
    "memory": lambda folder: filled(MemoryStore()),
    "files": lambda folder: filled(FileStore(folder)),
    "files of another process": another_process,
    "still arriving": lambda folder: Arriving(),
}
FORWARD_AND_BACK = [*range(LAYERS), *reversed(range(LAYERS))]


@pytest.fixture(params=READERS.values(), ids=READERS.keys())
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LayerStreamer]:
    with closing(LayerStreamer(request.param(tmp_path), torch.device("cpu"), torch.float32)) as made:
        yield made


def test_digests_are_those_of_all_layers(source: LayerStreamer) -> None:
    assert source.digests() == {layer: (digest_layer(weights(layer)),) for layer in range(LAYERS)}


@pytest.mark.parametrize(
    "order", [FORWARD_AND_BACK, [0, 0, 1, 1, 0], [3, 0, 2, 1]], ids=["there and back", "repeated", "any"]
)
def test_a_lent_layer_is_the_one_asked_for_in_whatever_order(source: LayerStreamer, order: list[int]) -> None:
    for index in order:
        with source.layer(index) as lent:
            expected = weights(index)
            assert set(lent) == set(expected)
            assert all(torch.equal(lent[name], expected[name]) for name in expected)


def test_never_more_than_two_layers_are_on_the_device(source: LayerStreamer) -> None:
    for index in [*FORWARD_AND_BACK, 2, 0, 3]:
        with source.layer(index):
            pass
    assert source.peak_layers <= 2
    assert source.peak_bytes <= 2 * sum(tensor.nbytes for tensor in weights(0).values())


def test_what_is_lent_is_a_copy(source: LayerStreamer) -> None:
    with source.layer(0) as lent:
        lent["up_proj"].zero_()
    source.drop_all()
    with source.layer(0) as again:
        assert torch.equal(again["up_proj"], weights(0)["up_proj"])


def test_layers_are_lent_again_after_all_were_dropped(source: LayerStreamer) -> None:
    for _ in range(2):
        with source.layer(1) as lent:
            assert torch.equal(lent["down_proj"], weights(1)["down_proj"])
        source.drop_all()


def test_an_error_of_the_borrower_gives_the_layer_back(source: LayerStreamer) -> None:
    with pytest.raises(RuntimeError, match="borrower"), source.layer(0):
        raise RuntimeError("the borrower failed")
    with source.layer(0) as lent:
        assert torch.equal(lent["up_proj"], weights(0)["up_proj"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_is_lent_in_the_format_that_is_computed_in(tmp_path: Path, dtype: torch.dtype) -> None:
    with closing(LayerStreamer(filled(MemoryStore()), torch.device("cpu"), dtype)) as source:
        with source.layer(0) as lent:
            assert lent["up_proj"].dtype == dtype
            assert torch.equal(lent["up_proj"], weights(0)["up_proj"].to(dtype))
        assert source.peak_bytes <= 2 * sum(tensor.nbytes for tensor in weights(0).values())
