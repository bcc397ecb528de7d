"""`coterie resume`: go on with a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.ranks import joined, option, start_if_asked, start_party_if_asked
from coterie.errors import ConfigError


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of the run that was stopped.")],
    listen: Annotated[
        str | None,
        typer.Option(help="In a federation: address to listen on, where it differs from the agreed endpoint."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Make a run of `coterie train` without a budget this many rounds long.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Go on with a run of `coterie train` or `coterie up` from its newest checkpoint.

    The parameters come out as if it had never been stopped. In a federation, start the coordinator again first; every
    party resumes.

    Example:
        coterie resume runs/first
        coterie resume runs/first --rounds 400
    """
    if (run_dir / "party.yaml").is_file():
        if rounds is not None:
            raise ConfigError(
                "a federation's number of rounds was agreed on and signed.",
                code="run-longer",
                fix="agree on another federation.yaml that starts from this one's model",
            )
        from coterie.cli.up import take_part
        from coterie.training.party.process import settings_of_run

        words = ["resume", str(run_dir), *option("--listen", listen), *option("--json", json_file)]
        start_party_if_asked(party := settings_of_run(run_dir), words)
        take_part(party, listen, json_file)
        return

    from coterie.cli.training_progress import shared, shown
    from coterie.training.single.prepared import read_config
    from coterie.training.single.run import follow, resume

    config = read_config(run_dir)
    if rounds is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"rounds": rounds})})
    start_if_asked(config, "resume", run_dir, json_file)
    with joined(config) as ranks:
        if ranks is not None and ranks.rank > 0:
            shared(lambda: follow(config, ranks, resumed=True))
        else:
            shown(
                config,
                lambda stop, watch: resume(run_dir, stop=stop, watch=watch, ranks=ranks, rounds=rounds),
                json_file,
            )
