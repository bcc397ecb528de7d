"""The commonsense sets as files: questions with choices, from the instructions that LLM-Adapters made of them.

A folder holds ``NAME/test.json`` for each set, a list of rows with ``instruction`` and ``answer``. The instruction
carries question and choices in one text; here they are told apart, so that a model is asked which choice goes on
best, not which number it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import DataError

SETS: Mapping[str, str] = {
    "boolq": "boolq",
    "piqa": "piqa",
    "social_i_qa": "social_i_qa",
    "winogrande": "winogrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}
"""Task name to the folder of its file."""

_BLANKS = ("winogrande",)
"""Tasks whose questions are sentences with a blank."""
_ASKED = re.compile(r"^Please [^:]*?(?:, question| to the question| the given sentence): (.*)$", re.DOTALL)
_CHOICE = re.compile(r"\s*(?:Answer|Solution|Option)\d+: ")
_FORMAT = re.compile(r"\s*Answer format: ([\w/]+)\s*$")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        asked: the question, or a sentence with a blank (``_``).
        choices: what may be the answer, at least two.
        gold: position of the right one.
    """

    asked: str
    choices: tuple[str, ...]
    gold: int

    def as_doc(self) -> dict[str, Any]:
        """What the YAML files refer to. In a sentence with a blank, the choices come before what is scored."""
        before, blank, after = self.asked.partition("_")
        contexts = [before + choice for choice in self.choices] if blank else []
        doc = {"question": self.asked, "choices": list(self.choices), "gold": self.gold}
        return {**doc, "contexts": contexts, "ending": after.strip()}


def read_questions(folder: Path, task: str) -> list[Question]:
    """All questions of a task.

    Raises:
        DataError: there is no such file, or a row is of another form; the row is named, not quoted.
    """
    path = folder / SETS[task] / "test.json"
    try:
        rows = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} is a file, not a folder." if folder.is_file() else f"There is no {path}.",
            code="eval-no-questions",
            why=f"`{task}` asks the questions of that file; nothing is downloaded",
            fix=f"name the folder that holds {SETS[task]}/test.json with --task-data",
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}.",
            code="eval-no-questions",
            why=f"`{task}` asks the questions of that file; nothing is downloaded",
            fix="put the set's file there, readable to you",
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "is not JSON") from error
    if not isinstance(rows, list) or not rows:
        raise _damaged(path, "holds no list of rows")
    found = [_question(row, task) for row in rows]
    wrong = next((number for number, question in enumerate(found, 1) if question is None), None)
    if wrong is not None:
        raise _damaged(path, f"has another form in row {wrong}")
    return [question for question in found if question is not None]


def _question(row: Any, task: str) -> Question | None:
    """A row as a question; None where it is none, or lacks the blank that its task scores."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("instruction", "answer")):
        return None
    names = _FORMAT.search(row["instruction"])
    asked = _ASKED.match(row["instruction"][: names.start()] if names else "")
    if names is None or asked is None:
        return None
    if task in _BLANKS and "_" not in asked[1]:
        return None
    labels = names[1].split("/")
    question, *choices = _CHOICE.split(asked[1])
    found = choices or labels
    if len(found) < 2 or len(found) != len(labels) or row["answer"] not in labels:
        return None
    return Question(question.strip(), tuple(choice.strip() for choice in found), labels.index(row["answer"]))


def _damaged(path: Path, how: str) -> DataError:
    return DataError(
        f"{path} {how}.",
        code="eval-questions",
        why="questions are read as LLM-Adapters wrote them: a list of rows with `instruction` and `answer`",
        fix="take the file from that project's dataset folder again",
    )
