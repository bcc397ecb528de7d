"""`benchmarks/sst2.py`: what it reads, the schedule of its rates, and the shape of its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizer

from coterie.dp.label_words import LabelWords
from coterie.models.zoo.upcycle import upcycle

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def sst2(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import sst2

    threads = torch.get_num_threads()
    yield sst2
    torch.set_num_threads(threads)


def write_rows(folder: Path, count: int) -> None:
    """Two words decide the class; lengths differ."""
    folder.mkdir(parents=True)
    public = folder.parent / "wikitext2_eval/valid.txt"
    public.parent.mkdir()
    public.write_text("= Film =\n\nA good film , a bad one . The film was good . It was a film .\n", encoding="utf-8")
    for name, start in (("train", 0), ("test", 7)):
        lines = [
            " ".join([("good", "bad")[i % 2]] + ["film"] * (1 + i % 4)) + f"\t{1 - i % 2}"
            for i in range(start, count + start)
        ]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_rows_are_read_with_and_without_a_header(sst2: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\na fine day \t1\n, dull\t0\n", encoding="utf-8")
    rows = sst2.read_rows(tmp_path / "a.tsv")
    assert (rows.texts, rows.labels, len(rows)) == (["a fine day", ", dull"], [1, 0], 2)
    (tmp_path / "b.tsv").write_text("one\t0\n", encoding="utf-8")
    assert sst2.read_rows(tmp_path / "b.tsv").labels == [0]


@pytest.mark.parametrize("line", ["no tab", "sentence\t2", "sentence\t"])
def test_a_malformed_row_is_named(sst2: ModuleType, tmp_path: Path, line: str) -> None:
    (tmp_path / "a.tsv").write_text(f"fine\t1\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.tsv, line 2: expected a sentence, a tab and 0 or 1"):
        sst2.read_rows(tmp_path / "a.tsv")


def test_what_is_missing_is_said(sst2: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="set COTERIE_TEST_DATA"):
        sst2.data_folder("phrases", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        sst2.encoder_of(str(tmp_path), 1)


def test_public_text_comes_in_pieces_of_sentences(sst2: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "public.txt"
    path.write_text("= A title =\n\nThe film , as they say , was good . It was !\nWell\n", encoding="utf-8")
    found = sst2.read_public(path)
    assert sorted(found.texts) == ["It was !", "The film ,", "as they say ,", "was good ."]
    assert len(sst2.read_public(path, 2)) == 2
    path.write_text("= A title =\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no sentence"):
        sst2.read_public(path)
    with pytest.raises(FileNotFoundError, match="--public-text"):
        sst2.read_public(tmp_path / "absent.txt")


def test_the_real_files_hold_what_the_report_says(sst2: ModuleType, real_text_dir: Path) -> None:
    sizes = {}
    for name in ("phrases", "sentences"):
        try:
            folder = sst2.data_folder(name, real_text_dir)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        for part, files in {"train": (f"{folder.name}/train.tsv",), **sst2.SPLITS[name]}.items():
            rows = sst2.joined([sst2.read_rows(folder.parent / file) for file in files])
            sizes[name, part] = len(rows)
            assert set(rows.labels) == {0, 1}
    assert sizes == {
        ("phrases", "train"): 60614, ("phrases", "glue_dev"): 872, ("phrases", "held_out_phrases"): 6735,
        ("phrases", "sentences"): 2693, ("sentences", "train"): 6920, ("sentences", "test"): 1821,
    }  # fmt: skip


def test_rates_rise_then_fall_and_never_reach_zero(sst2: ModuleType) -> None:
    shares = [sst2.warm_up_and_decay(done, 30) for done in range(30)]
    assert shares[0] == pytest.approx(1 / 3)
    assert max(shares) == pytest.approx(shares[2]) == 1.0
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert shares[-1] == pytest.approx(1 / 28)
    assert sst2.warm_up_and_decay(0, 1) > 0


def test_gaps_pair_the_arms_of_a_seed_and_leave_out_lone_ones(sst2: ModuleType) -> None:
    right = {
        ("private", 0): "1" * 800 + "0" * 200, ("plain", 0): "1" * 850 + "0" * 150,
        ("private", 1): "1" * 840 + "0" * 160, ("plain", 1): "1" * 860 + "0" * 140, ("private", 2): "0" * 1000,
    }  # fmt: skip
    results = [
        {"settings": {}, "arm": arm, "seed": seed, "right": {"test": own}} for (arm, seed), own in right.items()
    ]
    others = [{"settings": {"lot": 1}, "arm": "plain", "seed": 2, "right": {"test": "1" * 1000}}]
    found = sst2.gaps({"results": results + others}, {})["test"]
    assert found["seeds"] == pytest.approx({0: 5.0, 1: 2.0})
    assert found["mean"] == pytest.approx(3.5)
    # The normal law's interval of the mean over records.
    lost = [(800 <= i < 850) / 2 + (840 <= i < 860) / 2 for i in range(1000)]
    spread = 100 * (sum((x - 0.035) ** 2 for x in lost) / 1000 / 1000) ** 0.5
    assert found["low"] == pytest.approx(3.5 - 1.96 * spread, abs=0.05)
    assert found["high"] == pytest.approx(3.5 + 1.96 * spread, abs=0.05)
    assert sst2.gaps({"results": results[4:]}, {}) == {}


def small_encoder(folder: Path) -> None:
    """A checkpoint of two tiny layers with a vocabulary of the words that `write_rows` writes."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize("train", ["all", "biases", "head"])
def test_cached_lower_layers_give_the_whole_model_s_output(sst2: ModuleType, tmp_path: Path, train: str) -> None:
    """The frozen part computed once and the trained part on top are the upcycled model, to half precision."""
    small_encoder(tmp_path / "encoder")
    write_rows(tmp_path / "sst2_sentences", 12)
    dense, tokenize, _ = sst2.encoder_of(str(tmp_path / "encoder"), 1)
    rows = sst2.read_rows(tmp_path / "sst2_sentences/train.tsv")
    features = sst2.Features(dense, tokenize, rows, 1)
    lengths = [len(features[i]["inputs_embeds"]) for i in range(len(features))]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 4
    args = sst2.arguments(["--experts", "4", "--train-layers", "1", "--train", train])
    model = sst2.model_of(dense, 0, args, features).eval()
    with torch.no_grad():
        model.classifier.linear.weight.normal_()
    batch = next(features.batches(range(len(features)), len(features)))
    with torch.no_grad():
        found = sst2.logits_of(model, batch, 1)
        for i, text in enumerate(sorted(rows.texts, key=lambda text: len(text.split()))):
            out = model.bert(input_ids=torch.tensor([tokenize(text)]), output_hidden_states=True)
            means = torch.cat(out.hidden_states[1:], -1).mean(1)
            assert torch.allclose(found[i], model.classifier(means)[0], atol=5e-3), i
        read = sst2.means(*sst2.last_layer(model, batch, 1))
        standard = (read - model.classifier.mean) * model.classifier.scale * 32**0.5
        assert torch.allclose(standard.mean(0), torch.zeros(32), atol=1e-4)
        assert torch.allclose(standard.std(0), torch.ones(32), atol=1e-3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {"classifier.linear.weight", "classifier.linear.bias"}
    assert heads <= trained
    layer = {name.removeprefix("bert.encoder.layer.1.") for name in trained - heads}
    experts = {"intermediate.experts.up_proj_bias", "intermediate.experts.down_proj_bias"}
    if train == "head":
        assert not layer
    elif train == "biases":
        assert experts <= layer
        assert not any(name.endswith(("dense.weight", "up_proj", "down_proj", "gate.weight")) for name in layer)
    else:
        assert experts | {"intermediate.experts.up_proj", "attention.self.query.weight"} <= layer
        assert all(name.startswith(("bert.encoder.layer.1.", "classifier.")) for name in trained)


def test_a_coordinate_that_never_moves_on_public_text_has_no_endless_gradient(sst2: ModuleType) -> None:
    public = torch.randn(50, 4)
    public[:, 2] = 0.5
    scale = sst2.Head(public).scale * 4**0.5
    assert float(scale[2]) == pytest.approx(10 / float(public.std(0).median()))
    assert torch.allclose(scale[[0, 1, 3]], 1 / public.std(0)[[0, 1, 3]])


@pytest.mark.parametrize("train", ["all", "biases", "head"])
def test_words_are_asked_as_the_library_asks_them(sst2: ModuleType, tmp_path: Path, train: str) -> None:
    """Scores of two words at the mask are those of `LabelWords` on the upcycled masked language model."""
    small_encoder(tmp_path / "encoder")
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(tmp_path / "encoder")
    language_model = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(language_model.cls.predictions.bias)
    language_model.save_pretrained(tmp_path / "encoder")
    write_rows(tmp_path / "sst2_sentences", 12)
    rows = sst2.read_rows(tmp_path / "sst2_sentences/train.tsv")
    dense, _, _ = sst2.encoder_of(str(tmp_path / "encoder"), 1)
    prompt = sst2.prompt_of(str(tmp_path / "encoder"), "film {word} {text}", ["bad", "good"])
    assert (prompt.words, prompt.place) == ([6, 5], 2)
    features = sst2.Features(dense, prompt.tokenize, rows, 1)
    args = sst2.arguments(["--experts", "4", "--train", train, "--reads", "words"])
    model = sst2.model_of(dense, 0, args, prompt).eval()
    found = sst2.logits_of(model, next(features.batches(range(12), 12)), 1)
    moe = upcycle(language_model, 4, 2, seed=0).eval()
    asked = LabelWords((6, 5))
    for i, text in enumerate(sorted(rows.texts, key=lambda text: len(text.split()))):
        ids = torch.tensor([prompt.tokenize(text)])
        labels = torch.where(ids == 4, 6, -100)
        scores = asked.scores(moe, {"input_ids": ids, "labels": labels})
        assert torch.allclose(found[i], scores[0], atol=5e-3), i
    trained = {name for name, parameter in model.classifier.named_parameters() if parameter.requires_grad}
    assert {"linear.weight", "linear.bias", "transform.dense.bias", "transform.LayerNorm.weight"} <= trained
    assert ("transform.dense.weight" in trained) == (train == "all")


def test_a_head_that_is_trained_on_public_text_can_be_asked(
    sst2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text in which a good film always follows a bad one: a masked word can be told from its neighbours."""
    import masked_language_model as mlm

    small_encoder(tmp_path / "encoder")
    (tmp_path / "public.txt").write_text("= A title =\n\n" + "good film bad film\n" * 1500, encoding="utf-8")
    monkeypatch.setattr(mlm, "LENGTH", 14)
    mlm.main([
        "--encoder", str(tmp_path / "encoder"), "--text", str(tmp_path / "public.txt"),
        "--out", str(tmp_path / "mlm"), "--json", str(tmp_path / "mlm.json"), "--epochs", "10", "--lr", "3e-2",
    ])  # fmt: skip
    epochs = json.loads((tmp_path / "mlm.json").read_text())["epochs"]
    how_often_alone = 1.04  # nats, of words that are one half, a quarter and a quarter of the text
    assert epochs[-1]["loss"] < 0.8 < how_often_alone < epochs[0]["loss"]
    assert epochs[-1]["right"] > 0.9 > 0.5 > epochs[0]["right"]
    prompt = sst2.prompt_of(str(tmp_path / "mlm"), "film {word} {text}", ["bad", "good"])
    assert prompt.words == [6, 5]
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "mlm")
    assert mlm.pieces(tokenizer, [tmp_path / "public.txt"])[0] == [2, *[5, 7, 6, 7] * 3, 3]


def test_words_that_cannot_be_asked_are_refused(sst2: ModuleType, tmp_path: Path) -> None:
    small_encoder(tmp_path / "encoder")
    name = str(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"has no head of a masked language model; masked_language_model\.py"):
        sst2.prompt_of(name, "{word} {text}", ["bad", "good"])
    BertForMaskedLM(BertConfig.from_pretrained(name)).save_pretrained(name)
    with pytest.raises(ValueError, match="'bad film' is 2 tokens"):
        sst2.prompt_of(name, "{word} {text}", ["bad film", "good"])
    with pytest.raises(ValueError, match="behind it"):
        sst2.prompt_of(name, "{text} {word}", ["bad", "good"])
    with pytest.raises(ValueError, match="know no words"):
        sst2.prompt_of(None, "{word} {text}", ["bad", "good"])


@pytest.mark.parametrize("train", ["biases", "head"])
@pytest.mark.filterwarnings("ignore:delta .* is not below 1/N")  # few records, and the delta of many
def test_report_holds_both_arms_and_a_second_run_adds_nothing(
    sst2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], train: str
) -> None:
    small_encoder(tmp_path / "encoder")
    write_rows(tmp_path / "sst2_sentences", 64)
    given = [
        "--encoder", str(tmp_path / "encoder"), "--data-root", str(tmp_path), "--epochs", "4", "--lot", "32",
        "--experts", "4", "--physical-batch", "16", "--train", train, "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip
    sst2.main(given)
    report = json.loads((tmp_path / "out.json").read_text())
    private, plain = report["results"]
    assert [private["arm"], plain["arm"]] == ["private", "plain"]
    for result in (private, plain):
        assert (result["N"], result["rounds"], result["q"], result["seed"]) == (64, 8, 0.5, 0)
        assert set(result["accuracy"]) == {"test"}
        assert 0 <= result["accuracy"]["test"] <= 1
        assert {"seconds", "cpu_seconds", "cut", "machine", "parameters"} <= set(result)
    assert private["epsilon"] == pytest.approx(8.0, abs=0.05)
    assert private["delta"] == 1 / 64
    assert private["noise_multiplier"] > 0.3
    assert plain["epsilon"] is None
    assert plain["noise_multiplier"] == 0.0
    points = 100 * (plain["accuracy"]["test"] - private["accuracy"]["test"])
    assert f"cost of privacy on test: {points:.1f} points" in capsys.readouterr().out
    sst2.main(given)
    assert "already" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == report
    other = tmp_path / "other.txt"
    other.write_text("A bad film . Good film .\n", encoding="utf-8")
    sst2.main([*given, "--arms", "plain", "--public-text", str(other)])
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 3
    with pytest.raises(SystemExit):
        sst2.arguments(["--train-layers", "0"])
    assert "--train head" in capsys.readouterr().err
