"""A model spec gives the model it names, through the seam, or one clear sentence why not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coterie.config import ModelSpec
from coterie.errors import ModelError
from coterie.models import seam
from coterie.models.zoo.build import build_model, load_config, load_tokenizer
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import tiny_config, tiny_model

SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_experts": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    tiny_model("qwen3_moe").save_pretrained(folder)
    return folder


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_folder_gives_its_weights_through_the_seam(checkpoint):
    original = tiny_model("qwen3_moe")
    model = build_model(ModelSpec(path=checkpoint))
    seam.check_selected(model)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert build_model(ModelSpec(path=checkpoint, dtype="bfloat16")).dtype == torch.bfloat16


@pytest.mark.parametrize("family", list(causal_lm_types()))
def test_every_familys_checkpoint_loads_with_every_weight(family, tmp_path):
    original = tiny_model(family)
    original.save_pretrained(tmp_path)
    model = build_model(ModelSpec(path=tmp_path))
    seam.check_selected(model)
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_family_gives_random_weights_the_same_for_the_same_seed():
    spec = ModelSpec(family="qwen3_moe", config=SMALL)
    first, second, other = build_model(spec, seed=1), build_model(spec, seed=1), build_model(spec, seed=2)
    seam.check_selected(first)
    assert first.config.num_experts == 4
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_without_a_seed_the_weights_come_from_torchs_own_generator():
    spec = ModelSpec(family="qwen3_moe", config=SMALL)
    torch.manual_seed(4)
    first = build_model(spec)
    torch.manual_seed(4)
    assert torch.equal(first.lm_head.weight, build_model(spec).lm_head.weight)


def test_a_model_on_meta_holds_no_weights(checkpoint):
    for spec in (ModelSpec(path=checkpoint), ModelSpec(family="qwen3_moe")):
        model = build_model(spec, meta=True)
        assert all(parameter.is_meta for parameter in model.parameters())
        seam.check_selected(model)


def test_settings_of_a_text_part_reach_it_through_the_whole_familys_config():
    config = load_config(ModelSpec(family="qwen3_5_moe", config={"num_experts": 6, "tie_word_embeddings": True}))
    assert config.text_config.num_experts == 6


def test_settings_change_a_folders_config_and_old_names_are_understood(checkpoint):
    assert load_config(ModelSpec(path=checkpoint, config={"rms_norm_eps": 0.5})).rms_norm_eps == 0.5
    assert load_config(ModelSpec(path=checkpoint, config={"num_local_experts": 8})).num_experts == 8
    assert (
        load_config(ModelSpec(family="qwen3_next", config={"full_attention_interval": 2})).layer_types[1]
        == "full_attention"
    )


def refusal(code: str, spec: ModelSpec) -> ModelError:
    with pytest.raises(ModelError) as error:
        build_model(spec)
    assert error.value.code == code
    assert "\n" not in error.value.message
    return error.value


def test_an_unknown_family_is_refused_with_a_guess():
    assert "qwen3_moe" in (refusal("model-unknown-family", ModelSpec(family="qwen3moe")).fix or "")


def test_a_dense_family_and_a_dense_folder_are_refused(tmp_path):
    refusal("model-dense", ModelSpec(family="llama"))
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "llama" in refusal("model-dense", ModelSpec(path=tmp_path)).message
    gemma = tiny_config("gemma4_text", enable_moe_block=False)
    tiny = {key: value for key, value in gemma.to_dict().items() if key in ("hidden_size", "num_hidden_layers")}
    refusal(
        "model-no-experts",
        ModelSpec(
            family="gemma4_text",
            config={**tiny, "enable_moe_block": False, "vocab_size": 8, "vocab_size_per_layer_input": 8},
        ),
    )


@pytest.mark.parametrize(
    ("family", "words"),
    [("switch_transformers", "capacity"), ("dbrx", "one [E * F, D] matrix"), ("llama4_text", "every token")],
)
def test_a_family_whose_experts_cannot_be_exchanged_is_refused_with_the_reason(family, words):
    assert words in refusal("model-excluded-family", ModelSpec(family=family)).message


def test_an_unknown_setting_is_refused_with_a_guess():
    error = refusal("model-unknown-setting", ModelSpec(family="qwen3_moe", config={"num_expert": 4}))
    assert "num_experts" in (error.fix or "")


def test_a_value_that_the_config_refuses_is_reported():
    error = refusal("model-bad-setting", ModelSpec(family="qwen3_moe", config={"hidden_size": "wide"}))
    assert "hidden_size" in error.message or "int" in error.message


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "none") in refusal("model-no-folder", ModelSpec(path=tmp_path / "none")).message


def test_a_folder_without_config_or_weights_is_refused(tmp_path, checkpoint):
    refusal("model-bad-checkpoint", ModelSpec(path=tmp_path / "model" / ".."))
    (checkpoint / "model.safetensors").unlink()
    refusal("model-bad-checkpoint", ModelSpec(path=checkpoint))


def test_an_architecture_that_transformers_does_not_know_is_called_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "foo", "architectures": ["FooForCausalLM"]}')
    error = refusal("model-bad-checkpoint", ModelSpec(path=tmp_path))
    assert "is a `foo`" in error.message
    assert "coterie models" in (error.fix or "")
    assert "\n" not in error.message


def test_a_torn_weight_file_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    refusal("model-bad-checkpoint", ModelSpec(path=checkpoint))


def test_missing_weights_are_an_error_instead_of_random(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.pop("model.norm.weight"))
    assert "misses `model.norm.weight`" in refusal("model-bad-checkpoint", ModelSpec(path=checkpoint)).message


def test_a_missing_expert_is_an_error_instead_of_renumbered(checkpoint):
    def drop(weights):
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights.pop(f"model.layers.1.mlp.experts.3.{part}.weight")

    edit_weights(checkpoint, drop)
    assert (
        "in another shape `model.layers.1.mlp.experts"
        in refusal("model-bad-checkpoint", ModelSpec(path=checkpoint)).message
    )


def test_weights_the_model_does_not_know_and_other_shapes_are_errors(checkpoint):
    def change(weights):
        weights["model.extra.weight"] = torch.zeros(2)
        weights["lm_head.weight"] = torch.zeros(3, 3)

    edit_weights(checkpoint, change)
    message = refusal("model-bad-checkpoint", ModelSpec(path=checkpoint)).message
    assert "`model.extra.weight`" in message
    assert "in another shape `lm_head.weight`" in message


def test_no_network_is_one_sentence():
    script = (
        "from coterie.config import ModelSpec\n"
        "from coterie.errors import ModelError\n"
        "from coterie.models.zoo.build import build_model, load_tokenizer\n"
        "for make in (build_model, load_tokenizer):\n"
        "    try:\n        make(ModelSpec(hub='nobody/none'))\n"
        "    except ModelError as error:\n        print(error.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.stdout.split() == ["model-no-network", "model-no-network"], done.stderr


def test_a_hub_that_does_not_answer_is_asked_once():
    with socket.create_server(("127.0.0.1", 0)) as hub:
        asked = []

        def hang_up():
            while True:
                try:
                    connection, _ = hub.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(10)
                    asked.append(connection.recv(4096).split(b"\r\n")[0])

        threading.Thread(target=hang_up, daemon=True).start()
        script = (
            "from coterie.config import ModelSpec\n"
            "from coterie.errors import ModelError\n"
            "from coterie.models.zoo.build import build_model\n"
            "try:\n    build_model(ModelSpec(hub='nobody/none'))\n"
            "except ModelError as error:\n    print(error.code)\n"
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "NO_PROXY": "*"}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=240)
        assert done.stdout.split() == ["model-no-network"], done.stderr
        assert [line for line in asked if line.startswith(b"HEAD ")] == [b"HEAD / HTTP/1.1"]
        assert not any(b"nobody" in line for line in asked), "for no file is it asked again and again"


def test_the_tokenizer_comes_from_the_folder(checkpoint):
    spec = ModelSpec(path=checkpoint)
    with pytest.raises(ModelError) as error:
        load_tokenizer(spec)
    assert error.value.code == "model-bad-checkpoint"
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(checkpoint)
    assert load_tokenizer(spec)("b")["input_ids"] == [1]
    with pytest.raises(ModelError) as error:
        load_tokenizer(ModelSpec(family="qwen3_moe"))
    assert error.value.code == "model-no-tokenizer"


def test_a_config_file_that_is_not_json_is_refused(checkpoint):
    (checkpoint / "config.json").write_text("{")
    refusal("model-bad-checkpoint", ModelSpec(path=checkpoint))
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    assert "no_such_type" in refusal("model-bad-checkpoint", ModelSpec(path=checkpoint)).message


@pytest.mark.parametrize("meta", [True, False])
def test_two_sets_of_weights_and_an_adapter_beside_them_are_refused(checkpoint, meta):
    """A split would read the one, a run the other; an adapter would be in the one and not in the other."""
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds a peft adapter beside a model's weights"):
        build_model(ModelSpec(path=checkpoint), meta=meta)
    (checkpoint / "adapter_config.json").unlink()
    tiny_model("qwen3_moe").save_pretrained(checkpoint.parent / "shards", max_shard_size="20KB")
    for path in (checkpoint.parent / "shards").glob("model*"):
        path.rename(checkpoint / path.name)
    with pytest.raises(ModelError, match="holds two sets of weights"):
        build_model(ModelSpec(path=checkpoint), meta=meta)
    (checkpoint / "model.safetensors").unlink()
    build_model(ModelSpec(path=checkpoint), meta=meta)


@pytest.mark.parametrize("content", ["null", "[]", "7"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_of_another_kind_is_refused(checkpoint, name, content):
    if "index" in name:
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_text(content)
    refusal("model-bad-checkpoint", ModelSpec(path=checkpoint))
