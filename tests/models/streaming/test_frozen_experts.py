"""Frozen experts in bfloat16 under float32 activations: nobody ever holds a layer of them in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoeConfig, OlmoeForCausalLM

from coterie.config import LoraSpec
from coterie.dp.clipping import Flat
from coterie.dp.isolation.exact_engine import ExactEngine
from coterie.dp.losses import default_loss
from coterie.dp.per_sample.engine import Engine
from coterie.models import seam
from coterie.models.grouped import grouped_mm, no_wider
from coterie.models.lora import attach_adapters, expert_adapters, factors_stay_apart
from coterie.models.streaming.cache import MemoryStore, WeightCache
from coterie.models.streaming.streamer import HostGradients, LayerStreamer, StreamedExperts, as_stored

pytest.importorskip("peft")
EXPERTS = 16


class LargestMade(TorchDispatchMode):
    """The most bytes of one float32 tensor that an operation makes, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not func.is_view:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return made


def adapted_model() -> tuple[nn.Module, WeightCache]:
    """A model with adapters whose experts lie in bfloat16 in a cache."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_experts=EXPERTS,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip
    adapted = attach_adapters(model, LoraSpec(rank=2, alpha=4.0, modules=("q_proj",)), seed=0)
    layers = seam.expert_layers(adapted)
    cache = WeightCache(MemoryStore(), len(layers))
    for layer in layers:
        cache.put(layer.index, {n: p.detach().to(torch.bfloat16) for n, p in layer.parameters().items()})
        for name, param in layer.parameters().items():
            setattr(layer.module, name, nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False))
    return adapted, cache


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def without_clipping(model: nn.Module, streamer: LayerStreamer) -> Callable[[], object]:
    def computed() -> None:
        with ExitStack() as stack:
            stack.enter_context(factors_stay_apart(model))
            experts = StreamedExperts(streamer, HostGradients(), expert_adapters(model))
            stack.enter_context(seam.computed_by(model, experts))
            default_loss(model, batch()).sum().backward()
            with torch.no_grad():
                default_loss(model, batch())

    return computed


def clipped(method: str) -> Callable[[nn.Module, LayerStreamer], Callable[[], object]]:
    def of(model: nn.Module, streamer: LayerStreamer) -> Callable[[], object]:
        engine = Engine(model, None, Flat(1.0), method, streamer, {}, torch.device("cpu"))  # type: ignore[arg-type]
        engine.prepare(batch())
        return lambda: engine.accumulate(batch())

    return of


def exact(model: nn.Module, streamer: LayerStreamer) -> Callable[[], object]:
    engine = ExactEngine(model, None, Flat(1.0), expert_weights=streamer, expert_shapes={})
    engine.use_grid(lambda name: 2.0**-30)
    engine.prepare(batch())
    alone = {name: value[:1] for name, value in batch().items()}
    return lambda: engine.accumulate(alone)


WAYS = {
    "plain": without_clipping,
    "book-keeping": clipped("book_keeping"),
    "ghost": clipped("ghost"),
    "exact": exact,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_frozen_experts_are_widened_one_at_a_time(way: Callable[..., Callable[[], object]]) -> None:
    model, cache = adapted_model()
    one_layer = min(cache.get(0)[name].numel() for name in ("gate_up_proj", "down_proj"))
    with closing(LayerStreamer(cache, torch.device("cpu"), torch.float32)) as streamer:
        compute = way(model, streamer)
        with LargestMade() as largest:
            compute()
    assert one_layer // EXPERTS * 4 <= largest.nbytes < one_layer * 4 // 2


def test_a_layer_is_lent_without_a_copy_to_who_multiplies() -> None:
    _, cache = adapted_model()
    with closing(LayerStreamer(cache, torch.device("cpu"), torch.float32)) as streamer, streamer.layer(0) as lent:
        assert as_stored(lent, "down_proj").data_ptr() == cache.get(0)["down_proj"].data_ptr()
        assert lent["down_proj"].data_ptr() != cache.get(0)["down_proj"].data_ptr()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_products_are_those_with_weights_that_were_converted_before(
    stored: torch.dtype, computed: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, ends = torch.randn(3, 8, 4).to(stored), torch.tensor([2, 2, 7])
    rows = torch.randn(7, 8).to(computed)
    for some in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2)):
        expected = grouped_mm(rows, some.to(computed), ends)
        assert torch.equal(grouped_mm(rows, no_wider(some, computed), ends), expected)
        assert no_wider(some, computed).dtype.itemsize <= computed.itemsize
