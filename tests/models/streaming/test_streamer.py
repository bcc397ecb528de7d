"""Streamed experts against weights in the module, and the limits the stream promises."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from coterie.config import LoraSpec
from coterie.dp.clipping import Flat
from coterie.dp.losses import default_loss
from coterie.dp.per_sample.engine import Engine
from coterie.errors import CheckpointError, RoundError
from coterie.models import seam
from coterie.models.lora import attach_adapters, expert_adapters, factors_stay_apart
from coterie.models.streaming.cache import FileStore, MemoryStore, PinnedFiles, WeightCache
from coterie.models.streaming.streamer import HostGradients, LayerStreamer, StreamedExperts
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import tiny_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def small_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "olmoe":
        model: PreTrainedModel = OlmoeForCausalLM(OlmoeConfig(**SMALL, num_experts=8))
    else:
        model = GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def cache_of(model: PreTrainedModel, store: MemoryStore | FileStore) -> WeightCache:
    layers = seam.expert_layers(model)
    cache = WeightCache(store, len(layers))
    for layer in layers:
        cache.put(layer.index, {name: p.detach().clone() for name, p in layer.parameters().items()})
    return cache


def loss_and_gradients(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = (model(ids).logits ** 2).mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
def test_streamed_experts_equal_weights_in_the_module(family, checkpointing, on_disk, tmp_path):
    model = small_model(family)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seam.select(model)
    loss, expected = loss_and_gradients(model)

    cache = cache_of(model, FileStore(tmp_path) if on_disk else MemoryStore())
    layers = seam.expert_layers(model)
    for layer in layers:
        for name in layer.layout.parameter_names:
            stand_in = torch.full_like(getattr(layer.module, name), torch.nan)
            setattr(layer.module, name, torch.nn.Parameter(stand_in, requires_grad=False))
    streamer, sink = LayerStreamer(cache, torch.device("cpu"), torch.float32), HostGradients()
    seam.select(model, StreamedExperts(streamer, sink))
    streamed_loss, streamed = loss_and_gradients(model)
    streamer.close()

    torch.testing.assert_close(streamed_loss, loss, rtol=1e-6, atol=0)
    for layer in layers:
        for name in layer.layout.parameter_names:
            streamed[f"{layer.name}.{name}"] = sink.sums[layer.index][name]
    assert streamed.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (streamed[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert streamer.peak_layers == 2
    one_layer = sum(p.nbytes for p in layers[0].parameters().values())
    assert streamer.peak_bytes <= 2 * one_layer


def test_layers_lie_on_the_device_as_they_came_and_compute_as_if_they_had_been_converted():
    model = small_model("olmoe")
    seam.select(model)
    layers = seam.expert_layers(model)
    for layer in layers:
        for param in layer.parameters().values():
            param.data = param.data.to(torch.bfloat16).float()
    loss, expected = loss_and_gradients(model)

    cache = WeightCache(MemoryStore(), len(layers))
    for layer in layers:
        cache.put(layer.index, {n: p.detach().to(torch.bfloat16) for n, p in layer.parameters().items()})
    streamer, sink = LayerStreamer(cache, torch.device("cpu"), torch.float32), HostGradients()
    seam.select(model, StreamedExperts(streamer, sink))
    streamed_loss, _ = loss_and_gradients(model)
    streamer.close()

    torch.testing.assert_close(streamed_loss, loss, rtol=1e-6, atol=0)
    for layer in layers:
        for name in layer.layout.parameter_names:
            gradient = expected[f"{layer.name}.{name}"]
            assert (sink.sums[layer.index][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    values = sum(p.numel() for p in layers[0].parameters().values())
    assert streamer.peak_bytes == 2 * 2 * values


def test_a_layer_that_is_lent_twice_in_a_row_does_not_throw_away_the_next_one():
    read: list[int] = []

    class Counted(WeightCache):
        def get(self, layer: int):  # type: ignore[no-untyped-def]
            read.append(layer)
            return super().get(layer)

    cache = Counted(MemoryStore(), 4)
    for layer in range(4):
        cache.put(layer, {"down_proj": torch.full((2, 3), float(layer))})
    streamer = LayerStreamer(cache, torch.device("cpu"), torch.float32)
    for layer in (0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0):
        with streamer.layer(layer) as lent:
            assert float(lent["down_proj"][0, 0]) == layer
    streamer.close()
    assert read == [0, 1, 2, 3, 1, 0], "once forward; backward what is not there any more"
    assert streamer.peak_layers == 2


def test_what_is_wider_in_the_cache_is_narrowed_on_its_way():
    weight = torch.randn(2, 3, 4)
    cache = WeightCache(MemoryStore(), 1)
    cache.put(0, {"down_proj": weight})
    streamer = LayerStreamer(cache, torch.device("cpu"), torch.bfloat16)
    with streamer.layer(0) as lent:
        assert torch.equal(lent["down_proj"], weight.to(torch.bfloat16))
    streamer.close()
    assert streamer.peak_bytes == 2 * weight.numel()
    assert cache.get(0)["down_proj"].dtype == torch.float32


def test_experts_get_gradients_though_no_trunk_parameter_is_trained():
    model = small_model("olmoe")
    layers = seam.select(model)
    _, expected = loss_and_gradients(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    streamer = LayerStreamer(cache_of(model, MemoryStore()), torch.device("cpu"), torch.float32)
    sink = HostGradients()
    seam.select(model, StreamedExperts(streamer, sink))
    loss_and_gradients(model)
    streamer.close()
    for layer in layers:
        gradient = expected[f"{layer.name}.down_proj"]
        assert (sink.sums[layer.index]["down_proj"] - gradient).norm() <= 1e-5 * gradient.norm()


def test_a_host_that_serves_other_bytes_in_the_same_round_aborts_it():
    cache = WeightCache(MemoryStore(), 1)
    cache.begin_round()
    cache.put(0, {"down_proj": torch.zeros(2, 3, 4)})
    cache.put(0, {"down_proj": torch.zeros(2, 3, 4)})
    with pytest.raises(RoundError, match="layer 0 came twice in one round with different bytes"):
        cache.put(0, {"down_proj": torch.ones(2, 3, 4)})
    assert cache.get(0)["down_proj"].sum() == 0
    cache.begin_round()
    cache.put(0, {"down_proj": torch.ones(2, 3, 4)})
    assert cache.get(0)["down_proj"].sum() == 24


def test_a_layer_that_never_came_is_named():
    with pytest.raises(CheckpointError, match="MoE layer 3"):
        WeightCache(MemoryStore(), 5).get(3)


def test_a_file_that_is_not_what_was_pinned_is_refused_until_it_is(tmp_path):
    cache, read = WeightCache(FileStore(tmp_path), 1), PinnedFiles(tmp_path, 1)
    cache.put(0, {"down_proj": torch.zeros(4)})
    read.pin(cache.digests())
    assert read.get(0)["down_proj"].sum() == 0
    cache.begin_round()
    cache.put(0, {"down_proj": torch.ones(4)})
    read.pin({0: ("0" * 64,)})
    with pytest.raises(RoundError) as caught:
        read.get(0)
    assert caught.value.code == "weights-changed"
    read.pin(cache.digests())
    assert read.get(0)["down_proj"].sum() == 4


def test_ranks_that_share_experts_read_their_own_rows_alone_and_see_changes_in_these_alone(tmp_path):
    cache = WeightCache(FileStore(tmp_path), 1, shares=2)
    before = torch.arange(20.0).view(5, 4)
    digests = cache.put(0, {"down_proj": before})
    cache.begin_round()
    changed = before.clone()
    changed[4] = 0.0
    cache.put(0, {"down_proj": changed})
    first, second = (PinnedFiles(tmp_path, 1, share, 2) for share in range(2))
    for each in (first, second):
        each.pin({0: digests})
    assert torch.equal(first.get(0)["down_proj"], before[:2])
    with pytest.raises(RoundError):
        second.get(0)
    second.pin(cache.digests())
    assert torch.equal(second.get(0)["down_proj"], changed[2:])


def test_a_full_disk_keeps_the_earlier_file_and_says_so(tmp_path, monkeypatch):
    cache = WeightCache(FileStore(tmp_path), 1)
    cache.put(0, {"down_proj": torch.zeros(4)})
    cache.begin_round()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coterie.models.streaming.cache.save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        cache.put(0, {"down_proj": torch.ones(4)})
    assert cache.get(0)["down_proj"].sum() == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "layer-0000.safetensors"]


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    ids[1, 6:], mask[1, 6:], labels[1, 6:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _lend_out(model: PreTrainedModel, *, trainable: bool) -> LayerStreamer:
    """A streamer over the model's experts, whose own weights are gone."""
    streamer = LayerStreamer(cache_of(model, MemoryStore()), torch.device("cpu"), torch.float32)
    for layer in seam.expert_layers(model):
        for name in layer.layout.parameter_names:
            gone = torch.empty_like(getattr(layer.module, name), device="meta")
            setattr(layer.module, name, torch.nn.Parameter(gone, requires_grad=trainable))
    return streamer


@pytest.mark.parametrize("family", causal_lm_types())
def test_every_family_trains_streamed_as_with_weights_in_the_module(family):
    model = tiny_model(family).train()
    batch = _batch()
    seam.select(model)
    torch.manual_seed(0)  # phimoe's router jitters while it trains
    default_loss(model, batch).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    layers = seam.expert_layers(model)
    streamer, sink = _lend_out(model, trainable=False), HostGradients()
    with seam.computed_by(model, StreamedExperts(streamer, sink)):
        torch.manual_seed(0)
        default_loss(model, batch).sum().backward()
    streamer.close()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"{layer.name}.{name}": g for layer in layers for name, g in sink.sums.get(layer.index, {}).items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name
    assert streamer.peak_layers <= 2


@pytest.mark.parametrize("method", ["book_keeping", "ghost"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "qwen3_moe", "mixtral"])
def test_clipped_sums_with_streamed_weights_are_those_with_weights_in_the_module(family, method):
    model = tiny_model(family).train()
    batch = _batch()
    own = Engine(model, None, Flat(0.3), method)
    own.accumulate(batch)
    expected = own.take()
    shapes = {f"{x.name}.{n}": p.shape for x in seam.expert_layers(model) for n, p in x.parameters().items()}
    streamer = _lend_out(model, trainable=True)
    lent = Engine(model, None, Flat(0.3), method, streamer, shapes, torch.device("cpu"))
    lent.accumulate(batch)
    found = lent.take()
    streamer.close()
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        assert (found[name] - total).norm() <= 1e-5 * total.norm() + 1e-12, name
    assert streamer.peak_layers <= 2


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_adapters_of_streamed_experts_get_the_gradients_of_pefts_merged_weights(family: str) -> None:
    """Experts stored one way and transposed with biases; nothing of the lent weights outlives the forward."""
    pytest.importorskip("peft")
    model = attach_adapters(small_model(family), LoraSpec(rank=2, alpha=4.0, modules=("q_proj",)), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss, expected = loss_and_gradients(model)
    layers = seam.expert_layers(model)
    cache = cache_of(model, MemoryStore())
    for layer in layers:
        for name, param in layer.parameters().items():
            setattr(
                layer.module, name, torch.nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
            )
    streamer = LayerStreamer(cache, torch.device("cpu"), torch.float32)
    adapters = expert_adapters(model)
    with (
        factors_stay_apart(model),
        seam.computed_by(model, StreamedExperts(streamer, HostGradients(), adapters)),
    ):
        streamed_loss, streamed = loss_and_gradients(model)
    streamer.close()
    assert torch.allclose(streamed_loss, loss)
    assert streamed.keys() == expected.keys()
    assert any("experts" in name for name in streamed)
    for name, gradient in expected.items():
        assert (streamed[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
