"""`coterie train`: one party trains by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say


def command(
    settings: Annotated[Path, typer.Argument(help="train.yaml; every setting is in docs/reference/config.md.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Train one party's model on its own text, without a federation.

    With a `privacy:` block training is differentially private: epsilon is shown as it is spent, and a statement of
    what is promised, and what is not, comes at the end.

    Ctrl-C finishes the round, writes a checkpoint and ends; `coterie resume` goes on from there.

    Example:
        coterie train train.yaml --json result.json
    """
    from coterie.config import TrainConfig, load_yaml

    config = load_yaml(settings, TrainConfig)
    say(f"training {config.model.family or config.model.path or config.model.hub} for {config.train.rounds} rounds")

    from coterie.cli.training_progress import shown
    from coterie.training.single.run import start

    shown(config, lambda stop, watch: start(config, stop=stop, watch=watch), json_file)
