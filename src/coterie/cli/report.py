"""`coterie report`: a run's training as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say, table, write_json


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of `coterie train` or of a party of `coterie up`.")],
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Where the page goes; absent: RUN/private/report.html."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Write a run's page: losses, budget, load, time, memory and bytes over its rounds. Also while it runs.

    The page is for the owner: it shows losses and lot sizes, which no budget covers.

    Example:
        coterie report runs/first
    """
    from coterie.audit.report.training_page import TrainingRecord, training_page
    from coterie.storage import write_whole
    from coterie.training.folders import private_folder

    run = TrainingRecord.read(run_dir)
    path = report or private_folder(run_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.resolve(), training_page(run).encode())
    figures = run.as_json()
    spent = figures["epsilon"][-1][1] if figures["epsilon"] else None
    table(("rounds", "finished", "epsilon"), [(figures["rounds"], "yes" if figures["finished"] else "no", spent)])
    say(f"Report   {path}")
    if json_file is not None:
        write_json(json_file, figures)
