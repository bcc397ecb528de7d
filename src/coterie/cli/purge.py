"""`coterie purge`: remove what a finished run left of its text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of a run that is finished.")],
    give_up: Annotated[
        bool, typer.Option("--give-up", help="Also where the run is not finished; it cannot go on then.")
    ] = False,
) -> None:
    """Remove caches, spool and recorded transcripts of a run, and say what cannot be undone.

    For text that was withdrawn. Ledger entries are never removed.

    Example:
        coterie purge run
    """
    from coterie.training.purging import purge

    done = purge(run_dir, give_up=give_up)
    for path in done.removed:
        say(f"removed {path}")
    if not done.removed:
        say("nothing to remove: no cache, spool or transcript is left")
    say("what cannot be undone")
    for line in done.remains:
        say(f"  - {line}")
