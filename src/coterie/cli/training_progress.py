"""What `coterie train` and `coterie resume` show. Imports torch, so only command bodies import it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from coterie.cli.output import progress, say, table, write_json
from coterie.cli.stopping import stop_signals
from coterie.training.evaluate import Evaluation
from coterie.training.loop import RoundResult, StopFlag
from coterie.training.run import RunResult, Watch


@contextmanager
def watched(rounds: int) -> Iterator[tuple[StopFlag, Watch]]:
    """Show progress over ``rounds`` and turn Ctrl-C into a stop after the round."""
    disable_progress_bar()  # transformers' own, for a file that takes a second
    stop = StopFlag()
    shown = 0
    with stop_signals(stop.set, bounded=False), progress("round", rounds) as advance:

        def watch(done: int, result: RoundResult, evaluation: Evaluation | None) -> None:
            nonlocal shown
            note = f"loss {result.loss:.3f}"
            if evaluation is not None:
                note += f"  held-out {evaluation.loss:.3f}"
            if stop.asked:
                note += "  stopping: writing a checkpoint"
            advance(note, steps=done - shown)
            shown = done

        yield stop, watch


def report(result: RunResult, json_file: Path | None) -> None:
    """Print how the run ended and what to do next."""
    if json_file is not None:
        write_json(json_file, result.as_json())
    if not result.finished:
        say(f"stopped after round {result.rounds}; go on with: coterie resume {result.run_dir}")
        return
    mib = 1024**2
    table(
        ("rounds", "held-out loss", "perplexity", "model state MiB", "peak memory MiB"),
        [
            (
                result.rounds,
                result.loss,
                result.perplexity,
                result.model_state_bytes / mib,
                result.peak_rss_bytes / mib,
            )
        ],
    )
    say(f"model: {result.run_dir}/model   figures: {result.run_dir}/private/metrics.jsonl")
