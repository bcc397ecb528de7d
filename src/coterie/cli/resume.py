"""`coterie resume`: go on with a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of the run that was stopped.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Go on with a run of `coterie train` from its newest checkpoint.

    The parameters come out as if it had never been stopped.

    Example:
        coterie resume runs/first
    """
    from coterie.cli.training_progress import report, watched
    from coterie.training.run import read_config, resume

    with watched(read_config(run_dir).train.rounds) as (stop, watch):
        result = resume(run_dir, stop=stop, watch=watch)
    report(result, json_file)
