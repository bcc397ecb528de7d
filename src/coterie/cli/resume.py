"""`coterie resume`: go on with a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.ranks import joined, start_if_asked


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of the run that was stopped.")],
    listen: Annotated[
        str | None,
        typer.Option(help="In a federation: address to listen on, where it differs from the agreed endpoint."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Go on with a run of `coterie train` or `coterie up` from its newest checkpoint.

    The parameters come out as if it had never been stopped. In a federation, start the coordinator again first; every
    party resumes.

    Example:
        coterie resume runs/first
    """
    if (run_dir / "party.yaml").is_file():
        from coterie.cli.up import take_part
        from coterie.training.party.process import settings_of_run

        take_part(settings_of_run(run_dir), listen, json_file)
        return

    from coterie.cli.training_progress import shared, shown
    from coterie.training.single.prepared import read_config
    from coterie.training.single.run import follow, resume

    config = read_config(run_dir)
    start_if_asked(config, "resume", run_dir, json_file)
    with joined(config) as ranks:
        if ranks is not None and ranks.rank > 0:
            shared(lambda: follow(config, ranks, resumed=True))
        else:
            shown(config, lambda stop, watch: resume(run_dir, stop=stop, watch=watch, ranks=ranks), json_file)
