"""A model's answers through lm-eval against log-likelihoods by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coterie.cli.app import main
from coterie.errors import DataError
from coterie.models.zoo.tiny import tiny_model
from coterie.training.data.tokenizer import train_tokenizer
from coterie.training.tasks.harness import ask
from coterie.training.tasks.questions import SETS, read_questions

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

THINGS = ("a stone", "the rain", "old bread", "a long, long river", "sun", "paper boats")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up questions: choices of different lengths, the right one anywhere."""
    where = tmp_path_factory.mktemp("questions")
    easy = [
        {
            "instruction": f"Please choose the correct answer to the question: Which is number {i}?\n\n"
            + " ".join(f"Answer{k + 1}: {THINGS[(i * 5 + k) % 6]}" for k in range(4))
            + "\n\nAnswer format: answer1/answer2/answer3/answer4",
            "answer": f"answer{i * 7 % 4 + 1}",
        }
        for i in range(12)
    ]
    blanks = [
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: "
            f"Number {i} saw that _ was {THINGS[i % 6]}.\n\nOption1: {THINGS[i % 5]} Option2: {THINGS[(i + 2) % 6]} "
            "Answer format: option1/option2",
            "answer": f"option{i % 2 + 1}",
        }
        for i in range(9)
    ]
    for task, rows in (("arc_easy", easy), ("winogrande", blanks)):
        path = where / SETS[task] / "test.json"
        path.parent.mkdir()
        path.write_text(json.dumps(rows), encoding="utf-8")
    return where


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(THINGS), "Which is number it? Question: Answer: that saw was"] * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=256)


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, choice: str) -> float:
    """Log-likelihood of what follows a context, one row at a time, in float64."""
    ids = tokenizer(context + " " + choice)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(logits[at - 1, ids[at]] for at in range(start, len(ids))))


@pytest.mark.slow
def test_accuracies_are_those_of_ranking_by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    easy, blanks = ask(model, tokenizer, ["arc_easy", "winogrande"], folder, batch_size=3)
    plain, by_length = [], []
    for question in read_questions(folder, "arc_easy"):
        context = f"Question: {question.asked}\nAnswer:"
        scores = [score(model, tokenizer, context, choice) for choice in question.choices]
        lengths = [len(choice.encode()) for choice in question.choices]
        plain.append(scores.index(max(scores)) == question.gold)
        each = [value / length for value, length in zip(scores, lengths, strict=True)]
        by_length.append(each.index(max(each)) == question.gold)
    assert easy.accuracy == pytest.approx(sum(plain) / 12)
    assert easy.normalised == pytest.approx(sum(by_length) / 12)
    assert 0 < sum(plain) < 12
    right = []
    for question in read_questions(folder, "winogrande"):
        before, _, after = question.asked.partition("_")
        scores = [score(model, tokenizer, before + choice, after.strip()) for choice in question.choices]
        right.append(scores.index(max(scores)) == question.gold)
    assert blanks.accuracy == pytest.approx(sum(right) / 9)
    assert 0 < sum(right) < 9
    assert (easy.questions, blanks.questions, blanks.normalised) == (12, 9, None)


@pytest.mark.slow
def test_the_command_asks_an_export_and_says_that_it_guesses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save_pretrained(tmp_path / "export")
    tokenizer.save_pretrained(str(tmp_path / "export"))
    figures = tmp_path / "figures.json"
    given = ["--tasks", "arc_easy", "--task-data", str(folder), "--limit", "8", "--json", str(figures)]
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(tmp_path / "export"), *given])
    assert ended.value.code == 0
    found = json.loads(figures.read_text("utf-8"))["arc_easy"]
    assert found["questions"] == 8
    assert found["better_than_guessing"] is False
    assert "better than guessing: accuracy says nothing" in " ".join(capsys.readouterr().out.split())


def test_a_choice_that_the_model_cannot_read_whole_is_one_sentence(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    short = tiny_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=4)
    with pytest.raises(DataError, match=r"question 1 of arc_easy is \d+ tokens long, and the model reads 4"):
        ask(short, tokenizer, ["arc_easy"], folder)
