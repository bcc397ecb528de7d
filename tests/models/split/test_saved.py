"""A saved model is read back before it is called saved; quantised checkpoints come out whole or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, PreTrainedModel

from coterie.config import ModelSpec
from coterie.errors import ModelError
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.split.saved import check_saved, save_model
from coterie.models.split.splitter import split
from coterie.models.zoo.build import build_model
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import tiny_config, tiny_model
from coterie.models.zoo.upcycle import upcycle


@pytest.mark.parametrize("family", list(causal_lm_types()))
def test_every_family_reads_back_as_it_was_saved(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_model(model, tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_heads_and_bfloat16_read_back_too(tmp_path: Path) -> None:
    dense = BertForSequenceClassification(
        BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    )
    save_model(upcycle(dense, 4, 2), tmp_path / "classifier")
    save_model(tiny_model("olmoe").to(torch.bfloat16), tmp_path / "half")


def drop(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.1.mlp.experts.2.up_proj.weight"]


def add(weights: dict[str, Tensor]) -> None:
    weights["model.layers.9.extra"] = torch.zeros(2)


def reshape(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(7)


def swap(weights: dict[str, Tensor]) -> None:
    one, two = (f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (0, 1))
    weights[one], weights[two] = weights[two], weights[one]


def round_off(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].bfloat16()


@pytest.mark.parametrize("change", [drop, add, reshape, swap, round_off])
def test_a_model_that_was_written_otherwise_is_never_called_saved(
    change: Callable[[dict[str, Tensor]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("olmoe")
    original = PreTrainedModel.save_pretrained

    def save(self: Any, folder: str, **more: Any) -> None:
        original(self, folder, **more)
        weights = load_file(Path(folder) / "model.safetensors")
        change(weights)
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    with pytest.raises(ModelError) as caught:
        save_model(model, tmp_path / "model")
    assert caught.value.code in ("model-saved-differs", "model-bad-checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_says_quantised_over_plain_weights_is_found(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="says that it is quantised"):
        check_saved(model, tmp_path)


def packed_gpt_oss(folder: Path) -> Path:
    """A checkpoint as published: experts as 4-bit blocks and their scales."""
    config = tiny_config("gpt_oss")
    config.hidden_size = config.intermediate_size = 64
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    weights: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = value.shape
            weights[f"{name}_blocks"] = torch.randint(
                0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8
            )
            weights[f"{name}_scales"] = torch.randint(
                120, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8
            )
        else:
            weights[name] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return mark(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]})


def mark(folder: Path, how: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_experts_are_unpacked_trained_and_saved_whole(tmp_path: Path, dtype: str) -> None:
    folder = packed_gpt_oss(tmp_path / "base")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = build_model(ModelSpec(path=folder, dtype=dtype))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.bfloat16(), expected[name]), name
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.down_proj").mul_(1.5)
    save_model(model, tmp_path / "trained")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.to(model.dtype), model.state_dict()[name]), name


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "hqq", "quanto", "something-new"])
def test_other_ways_to_quantise_are_refused_by_name(tmp_path: Path, method: str) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    mark(tmp_path, {"quant_method": method, "bits": 4, "load_in_4bit": True})
    with pytest.raises(ModelError, match=method) as caught:
        build_model(ModelSpec(path=tmp_path))
    assert caught.value.code == "model-quantized"


def test_a_split_of_packed_experts_is_refused(tmp_path: Path) -> None:
    folder = packed_gpt_oss(tmp_path / "base")
    counts = [layer.num_experts for layer in expert_layers(build_model(ModelSpec(path=folder), meta=True))]
    with pytest.raises(ModelError) as caught:
        split(ModelSpec(path=folder), Placement.round_robin(["a", "b"], counts), tmp_path / "out")
    assert caught.value.code == "model-quantized"
