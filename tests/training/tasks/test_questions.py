"""Questions with choices, from the files of the commonsense sets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coterie.errors import ConfigError, DataError
from coterie.training.tasks import harness
from coterie.training.tasks.harness import Answers, check_choices_fit, check_tasks, guessing
from coterie.training.tasks.questions import SETS, Question, read_questions

ROWS: dict[str, dict[str, Any]] = {
    "boolq": {
        "instruction": "Please answer the following question with true or false, question: is rain wet?\n\nAnswer "
        "format: true/false",
        "answer": "true",
    },
    "piqa": {
        "instruction": "Please choose the correct solution to the question: open a door\n\nSolution1: push: then "
        "wait\n\nSolution2: sing \n\nAnswer format: solution1/solution2",
        "answer": "solution1",
    },
    "openbookqa": {
        "instruction": "Please choose the correct answer to the question: Why is it so: because\n\nAnswer1: a "
        "Answer2: b c Answer3: d Answer4: e\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer": "answer3",
    },
    "winogrande": {
        "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: Ann "
        "met Sue, so _ was glad.\n\nOption1: Ann Option2: Sue Answer format: option1/option2",
        "answer": "option2",
    },
}


def write(folder: Path, task: str, rows: Any) -> Path:
    path = folder / SETS[task] / "test.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("boolq", Question("is rain wet?", ("true", "false"), 0)),
        ("piqa", Question("open a door", ("push: then wait", "sing"), 0)),
        ("openbookqa", Question("Why is it so: because", ("a", "b c", "d", "e"), 2)),
        ("winogrande", Question("Ann met Sue, so _ was glad.", ("Ann", "Sue"), 1)),
    ],
)
def test_question_and_choices_are_told_apart(task: str, expected: Question, tmp_path: Path) -> None:
    assert read_questions(write(tmp_path, task, [ROWS[task]]), task) == [expected]


def test_of_a_sentence_with_a_blank_the_rest_is_scored_after_each_choice(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path, "winogrande", [ROWS["winogrande"]]), "winogrande")
    doc = question.as_doc()
    assert doc["contexts"] == ["Ann met Sue, so Ann", "Ann met Sue, so Sue"]
    assert doc["ending"] == "was glad."


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "answer9"},
        {"answer": 3},
        {"instruction": "secret words without a format"},
        {"instruction": "Please choose to the question: x\n\nAnswer1: secret\n\nAnswer format: answer1/answer2"},
    ],
)
def test_a_row_of_another_form_is_named_by_its_number_and_not_quoted(change: dict[str, Any], tmp_path: Path) -> None:
    good = ROWS["openbookqa"]
    with pytest.raises(DataError, match="row 2") as caught:
        read_questions(write(tmp_path, "openbookqa", [good, good | change]), "openbookqa")
    assert caught.value.code == "eval-questions"
    assert "secret" not in str(caught.value)


def test_a_sentence_without_a_blank_is_no_question_of_a_task_that_fills_blanks(tmp_path: Path) -> None:
    good = ROWS["winogrande"]
    whole = good | {"instruction": good["instruction"].replace(" _ ", " secret ")}
    with pytest.raises(DataError, match="row 3") as caught:
        read_questions(write(tmp_path, "winogrande", [good, good, whole]), "winogrande")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "[1]", "[" * 200_000])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.json") as caught:
        read_questions(write(tmp_path, "boolq", content), "boolq")
    assert caught.value.code == "eval-questions"


def test_a_missing_file_says_where_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ARC-Easy") as caught:
        read_questions(tmp_path, "arc_easy")
    assert caught.value.code == "eval-no-questions"


def test_a_file_in_the_place_of_the_folder_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(DataError, match="is a file, not a folder") as caught:
        read_questions(tmp_path / "test.json", "boolq")
    assert caught.value.code == "eval-no-questions"
    assert "boolq/test.json" in str(caught.value.fix)


def test_guessing_is_measured_in_the_questions_that_were_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, false = ROWS["boolq"], ROWS["boolq"] | {"answer": "false"}
    folder = write(tmp_path, "boolq", [true, true, true, false, false, false, false, false, false])
    monkeypatch.setattr(harness, "check_tasks", lambda tasks: None)
    monkeypatch.setattr(harness, "check_choices_fit", lambda *_: None)
    monkeypatch.setattr(harness, "evaluated", lambda *_: {"boolq": {"acc,none": 1.0}})
    (found,) = harness.ask(None, None, ["boolq"], folder, limit=4)  # type: ignore[arg-type]  # nobody is asked
    assert (found.questions, found.guessing) == (4, 0.75)


@pytest.mark.parametrize(
    ("reads", "asked", "choices"),
    [(3, "How many?", ("a", "one two three four")), (4, "He saw that _ was old, red and round.", ("a", "b"))],
)
def test_what_is_scored_has_to_fit_what_the_model_reads(reads: int, asked: str, choices: tuple[str, ...]) -> None:
    tokenizer: Any = SimpleNamespace(encode=lambda text, add_special_tokens: text.split())
    questions = [Question(asked, ("a", "b"), 0)] if "_" not in asked else []
    questions.append(Question(asked, choices, 0))
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=reads))
    with pytest.raises(DataError, match=rf"question {len(questions)} of boolq is \d+ tokens long") as caught:
        check_choices_fit(model, tokenizer, "boolq", questions)
    assert caught.value.code == "eval-choice-too-long"
    model.config.max_position_embeddings = 5
    check_choices_fit(model, tokenizer, "boolq", questions)


@pytest.mark.parametrize("tasks", [["boolq", "mmlu"], []])
def test_an_unknown_task_lists_the_known_ones(tasks: list[str]) -> None:
    with pytest.raises(ConfigError, match="arc_challenge") as caught:
        check_tasks(tasks)
    assert caught.value.code == "eval-unknown-task"


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coterie.training.tasks.harness.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"coterie\[eval\]") as caught:
        check_tasks(["boolq"])
    assert caught.value.code == "eval-no-lm-eval"


def test_guessing_is_the_better_of_two_guessers() -> None:
    half = [Question("?", ("a", "b"), 0), Question("?", ("a", "b"), 1)]
    assert guessing(half) == 0.5
    assert guessing([*half, Question("?", ("a", "b"), 0)]) == pytest.approx(2 / 3)
    # at random: a third and a half, whichever position is right
    assert guessing([Question("?", ("a", "b", "c"), 2), Question("?", ("a", "b"), 1)]) == 0.5


def test_a_share_within_luck_is_called_no_better_than_guessing() -> None:
    # 1.96 * sqrt(0.25 / 100) = 0.098 to either side of 0.5
    assert "no better than guessing (0.500 ± 0.098)" in Answers("boolq", 100, 0.59, None, 0.5).verdict
    assert Answers("boolq", 100, 0.60, None, 0.5).verdict == "better than guessing (0.500 ± 0.098)"
    assert Answers("piqa", 100, 0.40, 0.61, 0.5).better


def test_the_sets_of_the_shared_folder_are_read_whole() -> None:
    import os

    named = os.environ.get("COTERIE_TEST_DATA")
    folder = (Path(named) if named else Path(__file__).resolve().parents[4] / "shared" / "data") / "commonsense_qa"
    if not folder.is_dir():
        pytest.skip("the commonsense sets are not here")
    sizes = {task: len(read_questions(folder, task)) for task in SETS}
    # what the sets' own pages say of their test or validation files
    assert sizes == {
        "boolq": 3270,
        "piqa": 1838,
        "social_i_qa": 1954,
        "winogrande": 1267,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "openbookqa": 500,
    }
