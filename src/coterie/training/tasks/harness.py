"""Ask a model the questions of some tasks through lm-eval, and say whether it answers better than guessing.

lm-eval is an extra; it is imported where a task is asked. Nothing is downloaded and nothing is sent: questions come
from files, the model is in this process.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.errors import ConfigError, DataError
from coterie.training.tasks.questions import SETS, Question, read_questions

_WIDTH = 1.96
"""Standard deviations to either side that hold 95 % of what guessing gives."""


@dataclass(frozen=True)
class Answers:
    """How a model did in one task.

    Attributes:
        questions: how many were asked.
        accuracy: share of questions whose right choice got the largest log-likelihood.
        normalised: the same by log-likelihood for each byte of a choice; None where choices are single words.
        guessing: what the better of two guessers gets who never read a question: one at random, one that always takes
            the position that is right most often.
    """

    task: str
    questions: int
    accuracy: float
    normalised: float | None
    guessing: float

    @property
    def luck(self) -> float:
        """How far from `guessing` a guesser may come with so many questions, 95 % of the time."""
        return _WIDTH * math.sqrt(self.guessing * (1 - self.guessing) / self.questions)

    @property
    def better(self) -> bool:
        """Whether the better of the two shares is more than luck."""
        return max(self.accuracy, self.normalised or 0.0) > self.guessing + self.luck

    @property
    def verdict(self) -> str:
        """The same in words."""
        return f"{'better' if self.better else 'no better'} than guessing ({self.guessing:.3f} ± {self.luck:.3f})"

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "luck": self.luck, "better_than_guessing": self.better}


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[Answers]:
    """Ask the questions of some tasks.

    Args:
        model: in eval mode, on its device.
        tokenizer: its own.
        tasks: out of `coterie.training.tasks.questions.SETS`.
        folder: holds the sets' files.
        limit: the first so many questions of each task; None: all.
        batch_size: choices scored at once.

    Raises:
        ConfigError: lm-eval is not installed, or a task is not known.
        DataError: a file is missing or damaged, or a choice is longer than what the model reads.
    """
    check_tasks(tasks)
    asked = {task: read_questions(folder, task)[:limit] for task in tasks}
    for task, questions in asked.items():
        check_choices_fit(model, tokenizer, task, questions)
    results = evaluated(model, tokenizer, tasks, folder, limit, batch_size)
    return [_answers(task, results[task], questions) for task, questions in asked.items()]


def dataset(task: str, folder: str, **_: Any) -> dict[str, Any]:
    """What lm-eval loads in place of a data set of a hub; the YAML files name this function.

    Args:
        task: whose questions.
        folder: holds the sets' files.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list([question.as_doc() for question in read_questions(Path(folder), task)])}


def evaluated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: Path,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """lm-eval's own figures by task; arguments as of `ask`."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(
        include_path=str(Path(__file__).parent), include_defaults=False, metadata={"folder": str(folder)}
    )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
    loaded = manager.load(list(tasks))
    found: dict[str, dict[str, Any]] = evaluate(wrapped, loaded, limit=limit, bootstrap_iters=0, log_samples=False)[
        "results"
    ]
    return found


def _answers(task: str, result: dict[str, Any], questions: Sequence[Question]) -> Answers:
    """What lm-eval found in the questions that were asked, beside what guessing gets in these same questions."""
    normalised = result.get("acc_norm,none")
    return Answers(
        task=task,
        questions=len(questions),
        accuracy=float(result["acc,none"]),
        normalised=float(normalised) if normalised is not None else None,
        guessing=guessing(questions),
    )


def guessing(questions: Sequence[Question]) -> float:
    """What the better of two guessers gets; see `Answers`."""
    at_random = sum(1 / len(question.choices) for question in questions) / len(questions)
    most = Counter(question.gold for question in questions).most_common(1)[0][1]
    return max(at_random, most / len(questions))


def check_choices_fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, questions: Sequence[Question]
) -> None:
    """Make sure that the model can read every choice whole; a question before it may be cut off at its beginning.

    Raises:
        DataError: it cannot; the question is numbered, not quoted.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None:
        return
    for number, question in enumerate(questions, 1):
        doc = question.as_doc()
        scored = [doc["ending"]] if doc["contexts"] else question.choices
        length = max(len(tokenizer.encode(f" {each}", add_special_tokens=False)) for each in scored)
        if length > most:
            raise DataError(
                f"What is scored in question {number} of {task} is {length} tokens long, and the model reads {most}.",
                code="eval-choice-too-long",
                why="a choice that is cut off is another choice",
                fix="leave this task out, or ask a model with a longer context",
            )


def check_tasks(tasks: Sequence[str]) -> None:
    """Make sure that all tasks are known and that lm-eval is there.

    Raises:
        ConfigError: they are not, or it is not.
    """
    unknown = [task for task in tasks if task not in SETS]
    if unknown or not tasks:
        raise ConfigError(
            f"There is no task {', '.join(unknown) or 'named'}.",
            code="eval-unknown-task",
            fix=f"choose from: {', '.join(SETS)}",
        )
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "Tasks need the package lm-eval, which is not installed.",
            code="eval-no-lm-eval",
            why="EleutherAI's harness asks the questions, so that figures mean what they mean elsewhere",
            fix="install it with: pip install 'coterie[eval]'",
        )
