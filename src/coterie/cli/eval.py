"""`coterie eval`: held-out loss of a trained run, or its answers to the questions of known tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.output import say, table, write_json
from coterie.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def command(
    run_dir: Annotated[
        Path,
        typer.Argument(help="The run_dir of a trained run or of a party; with --tasks also an exported checkpoint."),
    ],
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Files to measure on; absent: the run's data.test.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAMES", help="Ask these tasks instead, e.g. boolq,piqa; or `all`."),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task-data", metavar="DIR", help="Folder with the tasks' files; see docs.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Ask the first so many questions of each task.")
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live", help="With --tasks: through this party's finished federation, with its hosts' experts."
        ),
    ] = False,
    listen: Annotated[
        str | None, typer.Option(help="With --live: address to listen on, where it differs from the agreed endpoint.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure the held-out loss of a run's newest checkpoint.

    With --tasks: ask questions with choices through EleutherAI's lm-eval (pip install 'coterie[eval]'), from files;
    and say whether the answers are better than guessing. Nothing is downloaded.

    With --live experts stay with their hosts: the coordinator runs with --questions, the other parties with `coterie
    resume`. In `experts` no text leaves; in `tokens` the hosts can read the questions.

    Example:
        coterie eval runs/first --data other.jsonl
        coterie eval exported --tasks boolq,arc_easy --task-data commonsense_qa
        coterie eval run --live --tasks boolq --task-data commonsense_qa --limit 200
    """
    if tasks is not None:
        if data:
            raise typer.BadParameter("--data is for the held-out loss: leave it out beside --tasks")
        _ask(run_dir, tasks, task_data, limit, json_file, listen, live=live)
        return
    if live:
        raise typer.BadParameter("--live asks --tasks: held-out text is measured by the federation itself")
    from coterie.training.single.trained import evaluate_run, load_trained

    trained = load_trained(run_dir)
    evaluation = evaluate_run(trained, data)
    figures = {
        "rounds": trained.rounds,
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
        "sequences": len(evaluation.loss_S),
        **({} if evaluation.accuracy is None else {"accuracy": evaluation.accuracy}),
    }
    table(tuple(figures), [tuple(figures.values())])
    if json_file is not None:
        write_json(json_file, figures)


def _ask(
    place: Path,
    names: str,
    folder: Path | None,
    limit: int | None,
    json_file: Path | None,
    listen: str | None,
    *,
    live: bool,
) -> None:
    from coterie.training.single.trained import model_of, tokenizer_of
    from coterie.training.tasks.harness import Answers, ask, check_tasks
    from coterie.training.tasks.questions import SETS, read_questions

    tasks = list(SETS) if names == "all" else [name.strip() for name in names.split(",")]
    check_tasks(tasks)
    if folder is None:
        raise ConfigError(
            "--tasks needs --task-data.",
            code="eval-no-task-data",
            why="questions come from files; nothing is downloaded",
            fix="name the folder that holds, for example, ARC-Easy/test.json",
        )
    tokenizer = tokenizer_of(place)
    found: list[Answers] = []

    def put(model: PreTrainedModel) -> None:
        found[:] = ask(model, tokenizer, tasks, folder, limit=limit)

    if not live:
        put(model_of(place))
    else:
        from coterie.cli.live import through_federation

        asked = [question for task in tasks for question in read_questions(folder, task)[:limit]]
        texts = tuple(text for question in asked for text in (question.asked, *question.choices))
        through_federation(place, texts, put, listen)
    rows = [
        (a.task, a.questions, f"{a.accuracy:.3f}", "" if a.normalised is None else f"{a.normalised:.3f}", a.verdict)
        for a in found
    ]
    table(("task", "questions", "accuracy", "normalised", "which is"), rows)
    if not any(answers.better for answers in found):
        say("In none of these tasks is this model better than guessing: accuracy says nothing about what it learnt.")
    if json_file is not None:
        write_json(json_file, {answers.task: answers.as_json() for answers in found})
