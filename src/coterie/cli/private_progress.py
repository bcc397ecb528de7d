"""What `coterie train` and `coterie resume` show of a private run. Only command bodies import it: it loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from coterie.cli.output import progress, say, table, write_json
from coterie.cli.stopping import stop_signals
from coterie.config import TrainConfig
from coterie.dp.budget import Spent
from coterie.dp.lot_sums import RoundFigures
from coterie.training.evaluate import Evaluation
from coterie.training.loop import StopFlag
from coterie.training.private import PrivateRunResult, PrivateWatch


@contextmanager
def watched_private(config: TrainConfig) -> Iterator[tuple[StopFlag, PrivateWatch]]:
    """Show rounds and epsilon as it is spent, and turn Ctrl-C into a stop after the round."""
    disable_progress_bar()
    privacy = config.privacy
    assert privacy is not None
    if privacy.seeded:
        say("NOT PRIVATE: `seeded` draws lots and noise from the seed; nothing this run makes may be released")
    say(f"budget: epsilon {privacy.epsilon:g} at delta {privacy.delta:g}; losses shown below are not private")
    stop = StopFlag()
    shown, note_spent = 0, ""
    with stop_signals(stop.set, bounded=False), progress("round", config.train.rounds) as advance:

        def watch(done: int, figures: RoundFigures, spent: Spent | None, evaluation: Evaluation | None) -> None:
            nonlocal shown, note_spent
            if spent is not None:
                note_spent = f"epsilon {spent.epsilon:.3f}"
            note = f"{note_spent}  {figures.nothing_learnt or f'loss {figures.loss:.3f}'}"
            if evaluation is not None:
                note += f"  held-out {evaluation.loss:.3f}"
            if stop.asked:
                note += "  stopping: writing a checkpoint"
            advance(note, steps=done - shown)
            shown = done

        yield stop, watch


def report_private(result: PrivateRunResult, json_file: Path | None) -> None:
    """Print how the run ended and its privacy statement."""
    if json_file is not None:
        write_json(json_file, result.as_json())
    if result.finished:
        columns = ("rounds", "epsilon", "delta", "held-out loss", "perplexity")
        epsilon, delta = result.privacy["epsilon"], result.privacy["delta"]
        table(columns, [(result.rounds, epsilon, delta, result.loss, result.perplexity)])
        public = Path(result.run_dir, "public")
        if public.is_dir():
            say(f"model, card and statement, which may be given away: {public}")
        else:
            say(f"model: {result.run_dir}/private/model, which may not be given away: see the statement")
    else:
        say(f"stopped after round {result.rounds}; go on with: coterie resume {result.run_dir}")
    say()
    say(result.statement)
