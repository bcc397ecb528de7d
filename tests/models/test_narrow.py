"""Frozen matrices that lie in bfloat16 and are computed with in float32, beside the same ones widened beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coterie.config import LoraSpec, ModelSpec
from coterie.dp.checks.batches_of_one import coarsest, tolerance
from coterie.dp.clipping import Flat
from coterie.dp.isolation.exact_engine import ExactEngine
from coterie.dp.losses import default_loss
from coterie.dp.per_sample.engine import Engine
from coterie.models import seam
from coterie.models.lora import attach_adapters, expert_adapters, factors_stay_apart
from coterie.models.narrow import Narrow
from coterie.models.split.partial import build_partial
from coterie.models.split.placement import Placement
from coterie.models.split.shards import expert_key, load_tensors, shard_file
from coterie.models.split.splitter import split
from coterie.models.streaming.cache import MemoryStore, WeightCache
from coterie.models.streaming.streamer import HostGradients, LayerStreamer, StreamedExperts
from coterie.models.tensors import raw_bytes
from coterie.models.zoo.build import quiet_loading
from coterie.models.zoo.tiny import VOCAB, tiny_model

pytest.importorskip("peft")

ADAPTED = {"olmoe": ("q_proj", "gate"), "gpt_oss": ("o_proj", "router")}
"""By family: what gets adapters beside the experts, routers too."""


class Parts:
    """A bfloat16 checkpoint, split; the model is to be computed with in float32."""

    def __init__(self, family: str, folder: Path) -> None:
        whole = tiny_model(family, dtype=torch.bfloat16)
        with quiet_loading():
            whole.save_pretrained(folder / "whole")
        self.spec = ModelSpec(path=folder / "whole", dtype="float32")
        split(self.spec, Placement.of_spec("round_robin", ["alder", "birch"], whole), folder / "parts")
        self.trunk = folder / "parts" / "trunk.safetensors"
        stored = [load_tensors(folder / "parts" / shard_file(party)) for party in ("alder", "birch")]
        self._experts = stored[0] | stored[1]
        self._modules = ADAPTED[family]

    def model(self, *, frozen: bool, modules: tuple[str, ...] | None = None) -> nn.Module:
        """With adapters that change what it computes."""
        lora = LoraSpec(rank=2, alpha=4.0, modules=self._modules if modules is None else modules)
        adapted = attach_adapters(build_partial(self.spec, self.trunk, frozen=frozen), lora, seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, param in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(param, std=0.1, generator=generator)
        return adapted

    @contextmanager
    def lent(self, model: nn.Module) -> Iterator[LayerStreamer]:
        """Lends the frozen experts."""
        layers = seam.expert_layers(model)
        cache = WeightCache(MemoryStore(), len(layers))
        for layer in layers:
            cache.put(layer.index, {
                name: torch.stack([self._experts[expert_key(layer.index, e, name)] for e in range(param.shape[0])])
                for name, param in layer.parameters().items()
            })  # fmt: skip
        with closing(LayerStreamer(cache, torch.device("cpu"), torch.float32)) as streamer:
            yield streamer


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts("olmoe", tmp_path)


def batch(records: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (records, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def frozen_matrices(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if not p.requires_grad and not p.is_meta and p.ndim > 1]


def plain(parts: Parts, *, frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = parts.model(frozen=frozen)
    with parts.lent(model) as streamer, factors_stay_apart(model):
        experts = StreamedExperts(streamer, HostGradients(), expert_adapters(model))
        with seam.computed_by(model, experts):
            losses = default_loss(model, batch())
            losses.sum().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def clipped(parts: Parts, *, frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = parts.model(frozen=frozen)
    with parts.lent(model) as streamer:
        engine = Engine(model, None, Flat(1.0), "book_keeping", streamer, {}, torch.device("cpu"))
        norms = engine.accumulate(batch()).norms
        return norms, engine.take()


def exact(parts: Parts, *, frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = parts.model(frozen=frozen)
    with parts.lent(model) as streamer:
        engine = ExactEngine(model, None, Flat(1.0), expert_weights=streamer, expert_shapes={})
        engine.prepare(batch())
        norms = engine.accumulate(batch(1)).norms
        return norms, engine.take()


@pytest.mark.parametrize(("family", "way"), [("gpt_oss", plain), ("olmoe", clipped), ("olmoe", exact)])
def test_every_number_is_that_of_widened_weights(
    family: str, way: Callable[..., tuple[Tensor, dict[str, Tensor]]], tmp_path: Path
) -> None:
    """Bit by bit: losses or norms, and the gradient of every adapter, those of routers too."""
    parts = Parts(family, tmp_path)
    numbers, gradients = way(parts, frozen=True)
    expected_numbers, expected = way(parts, frozen=False)
    assert torch.equal(numbers, expected_numbers)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 4


def test_frozen_matrices_take_as_many_bytes_as_in_their_file_but_the_output_layers(parts: Parts) -> None:
    stored = [build_partial(parts.spec, parts.trunk, frozen=True), build_partial(parts.spec, parts.trunk)]
    frozen, wide = ({n: p for n, p in m.named_parameters() if not p.is_meta and p.ndim > 1} for m in stored)
    assert frozen.keys() == wide.keys()
    assert {name for name, param in frozen.items() if not isinstance(param, Narrow)} == {"lm_head.weight"}
    del frozen["lm_head.weight"]
    for name, param in frozen.items():
        assert param.stored.untyped_storage().nbytes() == 2 * param.numel() == wide[name].nbytes // 2


def test_the_backward_keeps_nothing_that_was_widened(parts: Parts) -> None:
    model = parts.model(frozen=True, modules=())
    stored = [tuple(p.shape) for p in frozen_matrices(model) if isinstance(p, Narrow)]
    shapes = {*stored, *(shape[::-1] for shape in stored)}
    own = {p.data_ptr() for p in model.parameters() if type(p) is nn.Parameter}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with parts.lent(model) as streamer, factors_stay_apart(model):
        experts = StreamedExperts(streamer, HostGradients(), expert_adapters(model))
        with seam.computed_by(model, experts), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            default_loss(model, batch(records=3))
    assert len([each for each in kept if isinstance(each, Narrow)]) > 4
    assert not [t for t in kept if type(t) is Tensor and tuple(t.shape) in shapes and t.data_ptr() not in own]


def test_the_comparison_before_the_first_lot_allows_no_more_than_with_widened_weights(parts: Parts) -> None:
    assert tolerance(coarsest(parts.model(frozen=True))) == tolerance(torch.float32)


def test_what_is_frozen_is_copied_and_digested_as_if_wide_and_cannot_be_written_to(parts: Parts) -> None:
    (weight, *_), (wide, *_) = (frozen_matrices(parts.model(frozen=frozen)) for frozen in (True, False))
    assert isinstance(weight, Narrow)
    assert raw_bytes(weight) == raw_bytes(wide)
    copied = copy.deepcopy(weight)
    assert isinstance(copied, Narrow)
    assert isinstance(copied, nn.Parameter)
    assert torch.equal(copied, wide)
    assert copied.stored.data_ptr() != weight.stored.data_ptr()
    for write in (lambda: weight.add_(1), lambda: weight.data.zero_(), lambda: weight.copy_(wide)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="frozen weights that are kept as"):
            write()
    assert torch.equal(weight, wide)
