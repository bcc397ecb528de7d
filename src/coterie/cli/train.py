"""`coterie train`: one party trains by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say
from coterie.cli.ranks import has_terminal, joined, start_if_asked, started_again


def command(
    settings: Annotated[Path, typer.Argument(help="train.yaml; every setting is in docs/reference/config.md.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check, say what a private run costs, and end.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Train one party's model on its own text, without a federation.

    With a `privacy:` block training is differentially private. Before anything is spent it says how many records
    there are, how noisy a round will be, and the epsilon of a record and of a whole document. Epsilon is shown as it
    is spent, and a statement of what is promised, and what is not, comes at the end.

    With `devices: N` (and `privacy`) N processes share every round. `torchrun -m coterie train train.yaml` does the
    same with processes that torchrun starts; started again by it, they go on.

    Ctrl-C finishes the round, writes a checkpoint and ends; `coterie resume` goes on from there.

    Example:
        coterie train train.yaml --json result.json
        coterie train train.yaml --dry-run
    """
    from coterie.config import TrainConfig, load_yaml

    config = load_yaml(settings, TrainConfig)
    from coterie.cli.training_progress import announce, settled_lot, shared, show_plan, shown

    again = started_again(config) and not dry_run
    if not again:  # else its folder has the numbers; where several ranks were started, all of them say no
        config = settled_lot(config)
    if dry_run:
        if has_terminal():
            show_plan(config, json_file)
        return
    start_if_asked(config, "train", settings, json_file)
    say(f"training {config.model.family or config.model.path or config.model.hub} for {config.train.rounds} rounds")

    from coterie.training.single.prepared import read_config
    from coterie.training.single.run import follow, resume, start

    with joined(config) as ranks:
        if ranks is not None and ranks.rank > 0:
            shared(lambda: follow(config, ranks, resumed=again))
        elif again:
            shown(
                read_config(config.run_dir),
                lambda stop, watch: resume(config.run_dir, stop=stop, watch=watch, ranks=ranks),
                json_file,
            )
        else:
            shown(
                config,
                lambda stop, watch: start(config, stop=stop, watch=watch, ranks=ranks, announce=announce),
                json_file,
            )
