"""`coterie tune`: try a few settings on private text, within one budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import EXIT_STOPPED, say, table, write_json


def command(
    settings: Annotated[Path, typer.Argument(help="train.yaml with a `privacy` block: the budget of everything.")],
    tried: Annotated[
        list[str],
        typer.Option("--try", metavar="NAME=VALUE,...", help="Settings of one trial; twice or more."),
    ],
    public: Annotated[
        list[Path],
        typer.Option("--public", metavar="FILE", help="Public text to choose by, in the form of data.test."),
    ],
    trial_rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of a trial; default: a quarter of train.rounds.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it costs, and end.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Try a few settings, choose the best by public text, and train with it: all within the budget of train.yaml.

    Trials are private runs, and the ledger counts each. They and the last run share one noise multiplier, at which
    all their rounds together cost the budget. Trials may differ in `optim` and in `privacy.clip_norm` and `clipping`.
    Trying settings by hand, with `coterie train`, costs the same for each try, and nobody shares the budget out.

    Example:
        coterie tune train.yaml --try optim.lr=1e-3 --try optim.lr=3e-3 --public public.jsonl --dry-run
        coterie tune train.yaml --try optim.lr=1e-3 --try optim.lr=3e-3,privacy.clip_norm=0.5 --public public.jsonl
    """
    from coterie.cli.training_progress import report, watched
    from coterie.config import TrainConfig, load_yaml
    from coterie.training.single.prepared import MARKER
    from coterie.training.single.run import RunResult, resume, start
    from coterie.training.single.tune import plan_tuning, tune

    config = load_yaml(settings, TrainConfig)
    plan = plan_tuning(config, tried, trial_rounds or max(1, config.train.rounds // 4), public)
    for line in plan.lines():
        say(line)
    if dry_run:
        say("nothing was trained or spent")
        return

    def shown(own: TrainConfig) -> RunResult:
        say(f"{own.run_dir}: {own.train.rounds} rounds")
        with watched(own) as (stop, watch):
            if (own.run_dir / MARKER).exists():
                return resume(own.run_dir, stop=stop, watch=watch)
            return start(own, stop=stop, watch=watch)

    tuned = tune(config, plan, public, shown)
    table(
        ("settings", "loss on public text"),
        [(trial.settings, trial.loss if math.isfinite(trial.loss) else "diverged") for trial in tuned.trials],
    )
    if json_file is not None:
        write_json(json_file, tuned.as_json())
    if tuned.result is None:
        say("stopped; the same command goes on")
        raise typer.Exit(EXIT_STOPPED)
    say(f"chosen: {tuned.chosen}")
    report(tuned.result, None)
