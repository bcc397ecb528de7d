"""`coterie eval`: held-out loss of a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import table, write_json


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of a trained run, or of a party of a federation.")],
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Files to measure on; absent: the run's data.test.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure the held-out loss of a run's newest checkpoint.

    Example:
        coterie eval runs/first --data other.jsonl
    """
    from coterie.training.single.trained import evaluate_run, load_trained

    trained = load_trained(run_dir)
    evaluation = evaluate_run(trained, data)
    figures = {
        "rounds": trained.rounds,
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
        "sequences": len(evaluation.loss_S),
    }
    table(tuple(figures), [tuple(figures.values())])
    if json_file is not None:
        write_json(json_file, figures)
