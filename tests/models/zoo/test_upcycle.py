"""An upcycled model starts where the dense one is, and is a transformers model like any other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from coterie.cli.app import main
from coterie.config import ModelSpec
from coterie.errors import ModelError
from coterie.models import seam
from coterie.models.zoo.bert_moe import BertMoeForSequenceClassification, BertMoeModel
from coterie.models.zoo.build import build_model
from coterie.models.zoo.upcycle import upcycle, upcycle_checkpoint

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
KV = {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}}
DENSE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(LlamaConfig(**SIZES, **KV, **ROPE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(Qwen3Config(**SIZES, **KV)),
    "qwen3 classifier": lambda: transformers.Qwen3ForSequenceClassification(
        Qwen3Config(**SIZES, **KV, num_labels=3, pad_token_id=0)
    ),
    "bert": lambda: transformers.BertModel(BertConfig(**SIZES)),
    "bert classifier": lambda: transformers.BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
}
IDS = torch.randint(1, 60, (3, 11), generator=torch.Generator().manual_seed(1))


def dense_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = DENSE[kind]()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not at their start
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def output(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 1)])
def test_output_is_the_dense_model_s(kind: str, experts: int, top_k: int, tmp_path: Path) -> None:
    dense = dense_model(kind)
    moe = upcycle(dense, experts, top_k)
    assert torch.allclose(output(moe), output(dense), atol=1e-5)
    layers = seam.select(moe)
    assert [layer.num_experts for layer in layers] == [experts] * 2
    assert torch.allclose(output(moe), output(dense), atol=1e-5)
    moe.save_pretrained(tmp_path)
    loaded = type(moe).from_pretrained(tmp_path)
    assert torch.allclose(output(loaded), output(dense), atol=1e-5)
    assert loaded.config.num_experts_per_tok == top_k


@pytest.mark.parametrize("kind", ["llama", "bert classifier"])
def test_it_trains_like_any_other_and_experts_drift_apart(kind: str) -> None:
    moe = upcycle(dense_model(kind), 4, 2, noise=0.01)
    seam.select(moe)
    labels = torch.tensor([0, 1, 2]) if "classifier" in kind else IDS
    optimizer = torch.optim.AdamW(moe.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = moe(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    layer = seam.expert_layers(moe)[0]
    stacked = layer.parameters()["down_proj"]
    assert (stacked[0] - stacked[1]).abs().max() > 1e-3
    gate = next(p for name, p in moe.named_parameters() if name.endswith("gate.weight"))
    assert gate.shape[0] == 4


def test_noise_is_relative_seeded_and_on_experts_only() -> None:
    dense = dense_model("llama")
    plain, noisy, again, other = (
        upcycle(dense, 4, 2, noise, seed=seed) for noise, seed in ((0.0, 3), (0.1, 3), (0.1, 3), (0.1, 4))
    )
    for (name, a), b, c, d in zip(
        plain.state_dict().items(), noisy.state_dict().values(), again.state_dict().values(),
        other.state_dict().values(), strict=True,
    ):  # fmt: skip
        assert torch.equal(b, c), name
        if "experts" in name:
            assert float((b - a).std() / a.std()) == pytest.approx(0.1, rel=0.1)
            assert not torch.equal(b[0], b[1])
            assert not torch.equal(b, d)
        else:
            assert torch.equal(a, b), name


def test_bert_moe_loads_through_the_auto_classes_with_a_new_head(tmp_path: Path) -> None:
    upcycle(dense_model("bert"), 4, 2).save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), BertMoeModel)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert isinstance(model, BertMoeForSequenceClassification)
    assert model(input_ids=IDS).logits.shape == (3, 5)
    assert model.can_generate() is False
    model.set_experts_implementation("eager")
    eager = output(model)
    seam.select(model)
    assert torch.allclose(output(model), eager, atol=1e-6)


def test_an_upcycled_bert_loads_in_a_process_that_has_made_no_dense_one(tmp_path: Path) -> None:
    """transformers keeps on the dense class whether it takes experts, so the order of classes made a difference."""
    upcycle(dense_model("bert"), 4, 2).save_pretrained(tmp_path)
    code = (
        "import sys, coterie.models.zoo.bert_moe; from transformers import AutoModelForSequenceClassification as A;"
        "model = A.from_pretrained(sys.argv[1], num_labels=5); model.set_experts_implementation('eager');"
        "print(type(model).__name__, model.classifier.out_features)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["BertMoeForSequenceClassification", "5"], done.stderr[-2000:]


def test_fresh_bert_moe_has_sane_weights_and_router() -> None:
    from coterie.models.zoo.bert_moe import BertMoeConfig

    model = BertMoeModel(BertMoeConfig(**SIZES, num_experts=4))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 2, name
        if "experts" in name and "bias" not in name:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_per_sample_norms_of_an_upcycled_classifier_are_exact() -> None:
    from coterie import dp

    model = upcycle(dense_model("bert classifier"), 4, 2, noise=0.05)
    seam.select(model)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 2, 1])}
    norms = dp.per_sample_norms(model, batch)
    alone = torch.cat([dp.per_sample_norms(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(3)])
    assert torch.allclose(norms, alone, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"experts": 1, "top_k": 1}, "1 experts, 1 per token"),
        ({"experts": 4, "top_k": 5}, "4 experts, 5 per token"),
        ({"experts": 4, "top_k": 0}, "4 experts, 0 per token"),
        ({"noise": -0.1}, "noise -0.1"),
        ({"noise": math.nan}, "noise nan"),
        ({"noise": math.inf}, "noise inf"),
        ({"normalise": False}, "Mixtral always normalises"),
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        upcycle(dense_model("llama"), **{"experts": 4, "top_k": 2, **change})


def test_a_masked_language_model_keeps_its_head(tmp_path: Path) -> None:
    dense = transformers.BertForMaskedLM(BertConfig(**SIZES)).eval()
    dense.save_pretrained(tmp_path / "dense")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", 4, 2)
    moe = build_model(ModelSpec(path=tmp_path / "moe")).eval()
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-6)
    assert moe.cls.predictions.decoder.weight is moe.bert.embeddings.word_embeddings.weight


def test_checkpoints_that_cannot_be_turned_are_refused(tmp_path: Path) -> None:
    small = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="`gpt2` checkpoint cannot be upcycled"):
        upcycle(small, 4, 2)
    with pytest.raises(ModelError, match="has biases"):
        upcycle(transformers.LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)), 4, 2)
    with pytest.raises(ModelError, match="has a head that the MoE type lacks"):
        upcycle(transformers.BertForTokenClassification(BertConfig(**SIZES)), 4, 2)
    with pytest.raises(ModelError, match="nowhere is no folder here"):
        upcycle_checkpoint(tmp_path / "nowhere", tmp_path / "out", 4, 2)
    upcycle(dense_model("bert"), 4, 2).save_pretrained(tmp_path / "moe")
    with pytest.raises(ModelError, match="`bert_moe` checkpoint cannot be upcycled: it has experts already"):
        upcycle_checkpoint(tmp_path / "moe", tmp_path / "out", 4, 2)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/config.json").write_bytes(
        (tmp_path / "moe/config.json").read_bytes().replace(b"bert_moe", b"bert")
    )
    (tmp_path / "torn/model.safetensors").write_bytes((tmp_path / "moe/model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="holds no checkpoint that can be read"):
        upcycle_checkpoint(tmp_path / "torn", tmp_path / "out", 4, 2)


@pytest.mark.parametrize("wrong", ["layer missing", "matrix missing", "adapter beside"])
def test_a_dense_checkpoint_that_would_be_filled_at_random_is_refused(tmp_path: Path, wrong: str) -> None:
    dense = tmp_path / "dense"
    dense_model("llama").save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    if wrong == "layer missing":
        (dense / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    elif wrong == "matrix missing":
        weights = load_file(dense / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    else:
        (dense / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds a peft adapter" if wrong == "adapter beside" else "it misses"):
        upcycle_checkpoint(dense, tmp_path / "out", 4, 2)


def test_places_that_cannot_take_a_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ModelError, match="is not empty"):
        upcycle_checkpoint(tmp_path / "nowhere", tmp_path / "full", 4, 2)
    with pytest.raises(ModelError, match="is a file"):
        upcycle_checkpoint(tmp_path / "nowhere", tmp_path / "full/file", 4, 2)
    with pytest.raises(ModelError, match="cannot be written: Not a directory"):
        upcycle_checkpoint(tmp_path / "nowhere", tmp_path / "full/file/below", 4, 2)


def test_command_writes_a_checkpoint_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dense_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    arguments = [str(tmp_path / "dense"), "--experts", "4", "--out", str(tmp_path / "moe"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(["upcycle", *arguments, str(tmp_path / "figures.json")])
    assert not ended.value.code
    assert "MixtralForCausalLM" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert figures["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert torch.allclose(output(loaded), output(dense), atol=1e-5)


def test_from_a_dense_bert_to_a_privately_trained_classifier_and_back(tmp_path: Path) -> None:
    """The whole way a person goes: command, load with a new head, private rounds, save, load."""
    from coterie import dp

    dense_model("bert").save_pretrained(tmp_path / "dense")
    with pytest.raises(SystemExit) as ended:
        main(["upcycle", str(tmp_path / "dense"), "--experts", "4", "--top-k", "2", "--out", str(tmp_path / "moe")])
    assert not ended.value.code
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe", num_labels=2)
    model.bert.embeddings.requires_grad_(False)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    records = [
        {"input_ids": IDS[i % 3], "attention_mask": torch.ones_like(IDS[0]), "labels": torch.tensor(i % 2)}
        for i in range(24)
    ]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    with dp.make_private(
        model, optimizer, records, budget=dp.Budget(8.0, 1e-3), lot_size=8, rounds=3, physical_batch=4,
        ledger=tmp_path / "ledger",
    ) as session:  # fmt: skip
        for lot in session:
            session.step(lot)
        assert session.spent().epsilon == pytest.approx(8.0, abs=0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == name.startswith("bert.embeddings"), name
    model.save_pretrained(tmp_path / "trained")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert torch.allclose(output(loaded), output(model), atol=1e-6)
