"""`task: label_words` from train.yaml to predictions: plain and private, causal and masked."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from coterie import dp
from coterie.cli.app import main
from coterie.config import DataSpec, TrainConfig
from coterie.errors import CoterieError
from coterie.models.zoo.tiny import tiny_model
from coterie.training.data.documents import read_documents
from coterie.training.data.tokenizer import tokenize
from coterie.training.single.predict import predict
from coterie.training.single.prepared import prepare
from coterie.training.single.run import start
from coterie.training.single.trained import evaluate_run, load_trained

PLAIN = ["the", "film", "was", "we", "saw", "it", "there"]
KINDS = {"0": ["dull", "slow", "weak"], "1": ["warm", "bright", "clever"]}
WORDS = {"0": "bad", "1": "good"}
TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip


BERT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


SHORT = {"rounds": 3, "batch_size": 32, "micro_batch": 32, "eval_every": 0, "checkpoint_every": 0}


def tokenizer(folder: Path, masked: bool) -> Path:
    words = [
        "[PAD]",
        "[UNK]",
        "[MASK]",
        "[CLS]",
        "[SEP]",
        *PLAIN,
        *KINDS["0"],
        *KINDS["1"],
        *WORDS.values(),
        "so",
        ".",
    ]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if masked:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
        )
        roles |= {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    found = []
    for number in range(count):
        kind = number % 2
        words = chance.choices(PLAIN, k=4)
        words.insert(chance.randrange(5), chance.choice(KINDS[str(kind)]))
        found.append({"text": " ".join(words), "label": kind})
    return found


def settings(folder: Path, *, masked: bool = False, **more: Any) -> TrainConfig:
    for name, count, seed in (("train", 96, 1), ("test", 40, 2)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(count, seed)))
    prompt = "so {word} . {text}" if masked else "{text} so {word}"
    return TrainConfig.model_validate(
        {
            "model": {"family": "bert_moe" if masked else "olmoe", "config": BERT if masked else TINY},
            "data": {
                "train": [folder / "train.jsonl"], "test": [folder / "test.jsonl"], "sequence_length": 16,
                "task": "label_words", "label_words": {"prompt": prompt, "words": {0: "bad", 1: "good"}},
                "tokenizer": {"path": tokenizer(folder / "tok", masked), "provenance": "public"},
            },
            "optim": {"lr": 1e-2, "schedule": "constant"},
            "train": {**SHORT, "rounds": 60 if masked else 30},
            "run_dir": folder / "run", "device": "cpu", **more,
        }
    )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_classes_are_learnt_measured_and_predicted(tmp_path: Path, masked: bool) -> None:
    start(settings(tmp_path, masked=masked))
    trained = load_trained(tmp_path / "run")
    found = evaluate_run(trained)
    assert found.accuracy is not None
    assert found.accuracy > 0.9
    new = tmp_path / "new.jsonl"
    texts = [row["text"] for row in rows(10, 3)]
    new.write_text("\n".join(json.dumps({"text": text}) for text in [texts[0], " ", *texts[1:]]))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["predict", str(tmp_path / "run"), "--data", str(new), "--json", str(tmp_path / "out.json")])
    shown = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert [(row["file"], row["row"]) for row in shown] == [
        (str(new), f"line {number}") for number in (1, *range(3, 12))
    ]
    predicted = predict(trained, [new])
    assert predicted.classes == ("0", "1")
    assert [row["class"] for row in predicted.rows()].count("0") == 5
    torch.testing.assert_close(predicted.chances.sum(1), torch.ones(10))


def test_classes_are_learnt_within_a_budget(tmp_path: Path) -> None:
    privacy = {"epsilon": 8.0, "delta": 1e-3, "lot_size": 48, "ledger": tmp_path / "ledger", "physical_batch": 96}
    result = start(settings(tmp_path, privacy=privacy, train=SHORT))
    assert result.finished
    assert "PRIVACY STATEMENT" in (result.statement or "")
    assert evaluate_run(load_trained(tmp_path / "run")).accuracy is not None


def test_classes_are_learnt_by_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tiny_model("olmoe", vocab_size=64).save_pretrained(tmp_path / "base")
    lora = {"rank": 4, "modules": ["q_proj", "v_proj"]}
    start(settings(tmp_path, model={"path": tmp_path / "base"}, lora=lora, optim={"lr": 3e-2}))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    trained = load_trained(tmp_path / "run")
    accuracy = evaluate_run(trained).accuracy
    assert accuracy is not None
    assert accuracy > 0.9
    assert predict(trained, [tmp_path / "test.jsonl"]).classes == ("0", "1")


def test_adapters_learn_classes_within_a_budget(tmp_path: Path) -> None:
    """Each record's gradient, of adapters of attention, experts and router, is its own; then a whole run."""
    pytest.importorskip("peft")
    tiny_model("olmoe", vocab_size=64).save_pretrained(tmp_path / "base")
    lora = {"rank": 2, "experts": ["gate_up_proj", "down_proj"], "modules": ["q_proj", "gate"]}
    privacy = {"epsilon": 8.0, "delta": 1e-3, "lot_size": 48, "ledger": tmp_path / "ledger", "physical_batch": 96}
    start_from = {"path": tmp_path / "base", "provenance": "public"}
    config = settings(tmp_path, model=start_from, lora=lora, privacy=privacy, train=SHORT)
    prepared, _ = prepare(config)
    model, words, clip = prepared.model, prepared.train.words, 0.02
    assert words is not None
    for value in model.parameters():  # adapters that change nothing hide each other's gradients
        value.data += 0.05 * torch.randn_like(value) if value.requires_grad else 0.0
    batch = prepared.train.batch([0, 1, 2, 3, 4])
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters() if value.requires_grad}
    for record in range(5):
        one = {name: value[record : record + 1] for name, value in batch.items()}
        length = int(one["attention_mask"].sum())
        (place,) = (one["labels"][0] != -100).nonzero()[0].tolist()
        logits = model(input_ids=one["input_ids"][:, :length]).logits[0, place - 1]
        loss = -logits[list(words.ids)].log_softmax(0)[words.ids.index(int(one["labels"][0, place]))]
        gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in expected])
        norm = torch.stack([each.norm() for each in gradients]).norm()
        assert norm > clip, "clipping bites"
        for total, each in zip(expected.values(), gradients, strict=True):
            total += each * (clip / norm)
    found = dp.clipped_sum(model, batch, clip, words.loss)
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total, rtol=1e-4, atol=1e-6)

    result = start(config)
    assert result.finished
    assert "adapters of rank 2 (LoRA) on gate_up_proj" in (result.statement or "")
    assert (tmp_path / "run" / "public" / "adapter" / "adapter_model.safetensors").is_file()
    assert predict(load_trained(tmp_path / "run"), [tmp_path / "test.jsonl"]).classes == ("0", "1")


def test_a_long_text_is_cut_and_its_prompt_stays_whole(tmp_path: Path) -> None:
    config = settings(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the film was slow " * 20, "label": "0"}))
    made = tokenizer(tmp_path / "tok", False)
    loaded = PreTrainedTokenizerFast.from_pretrained(str(made))
    found = tokenize(read_documents(config.data.train, config.data), config.data, loaded)
    assert loaded.decode(found[0]["input_ids"]).split()[-2:] == ["so", "bad"]
    assert len(found[0]["input_ids"]) == 16
    assert (found[0]["labels"] != -100).nonzero().flatten().tolist() == [15]


def test_a_masked_model_reads_the_mask_where_the_word_stands(tmp_path: Path) -> None:
    config = settings(tmp_path, masked=True)
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "tok"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "warm [MASK] film", "label": 1}))
    found = tokenize(read_documents(config.data.train, config.data), config.data, loaded)
    assert loaded.decode(found[0]["input_ids"]).split() == ["[CLS]", "so", "[MASK]", ".", "warm", "film", "[SEP]"]
    assert found[0]["labels"].tolist() == [-100, -100, loaded.convert_tokens_to_ids("good"), *[-100] * 4]


BLOCK = {"prompt": "{text} so {word}", "words": {"0": "bad", "1": "good"}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_words": None}, "belong together"),
        ({"label_words": {**BLOCK, "prompt": "{text} so"}}, "needs {word} once"),
        ({"label_words": {**BLOCK, "prompt": "{text} {text} {word}"}}, "needs {text} once"),
        ({"label_words": {**BLOCK, "words": {"0": "bad", "1": "bad"}}}, "same word"),
        ({"label_words": BLOCK, "packing": "chunks"}, "use `packing: records`"),
        ({"label_words": BLOCK, "form": "messages"}, "leave out `form`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        DataSpec.model_validate({"train": ["a.jsonl"], "task": "label_words", **changes})
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("block", "row", "code"),
    [
        ({"words": {"0": "bad good", "1": "good"}}, {"text": "a", "label": 0}, "config-label-words"),
        ({"words": {"0": "bad", "1": "unheard"}}, {"text": "a", "label": 0}, "config-label-words"),
        ({"prompt": "{text} {word} so"}, {"text": "a", "label": 0}, "config-label-words"),
        ({"prompt": f"{'so ' * 20}{{text}} {{word}}"}, {"text": "the", "label": 0}, "data-prompt-long"),
        ({}, {"text": "a", "label": "secret"}, "data-no-class"),
        ({}, {"text": "a"}, "data-no-column"),
    ],
)
def test_words_and_rows_that_do_not_fit_are_refused_in_one_sentence(
    tmp_path: Path, block: dict[str, Any], row: dict[str, Any], code: str
) -> None:
    config = settings(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    data = config.data.model_copy(update={"label_words": config.data.label_words.model_copy(update=block)})  # type: ignore[union-attr]
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "tok"))
    with pytest.raises(CoterieError) as refused:
        tokenize(read_documents(data.train, data), data, loaded)
    assert refused.value.code == code
    assert "secret" not in str(refused.value)
