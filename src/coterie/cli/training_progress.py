"""What `coterie train` and `coterie resume` show. Imports torch, so only command bodies import it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

import typer
from transformers.utils.logging import disable_progress_bar

from coterie.cli.output import EXIT_STOPPED, big, progress, say, size, table, write_json
from coterie.cli.stopping import stop_signals
from coterie.config import PrivacySpec, TrainConfig
from coterie.dp.accounting.digits import epsilon_digits
from coterie.errors import as_argument
from coterie.pages.amounts import duration
from coterie.training.evaluate import Evaluation
from coterie.training.folders import result_folder
from coterie.training.loop import StopFlag
from coterie.training.planning.forecast import Forecast
from coterie.training.planning.full_or_lora import SUITS, of_noise
from coterie.training.planning.noise_bands import advice
from coterie.training.planning.ways import choose, memory_here
from coterie.training.single import auto_lot
from coterie.training.single.calibrated import Calibration
from coterie.training.single.previewed import AdaptersPreview, Preview, preview
from coterie.training.single.run import RunResult, Watch
from coterie.training.single.stepper import Step

MIB = 1024**2


def shown(config: TrainConfig, run: Callable[[StopFlag, Watch], RunResult], json_file: Path | None) -> None:
    """Do a run on the screen: its rounds, how it ended, and what to do next."""
    with watched(config) as (stop, watch):
        result = run(stop, watch)
    report(result, json_file)


def shared(follow: Callable[[], None]) -> None:
    """Do another rank's part of a run: nothing is shown, and a stop is asked of rank 0 alone."""
    disable_progress_bar()
    with stop_signals(lambda: True, bounded=False, quiet=True):
        follow()


def announce(figures: Forecast) -> None:
    """Say what a private run will cost."""
    for line in figures.lines():
        say(line)


def settled_lot(config: TrainConfig) -> TrainConfig:
    """The settings with numbers in place of `lot_size: auto`; says which and why."""
    if not auto_lot.asked(config):
        return config
    found, why = auto_lot.settled(config)
    columns = ("lot", "rounds", "noise multiplier", "noise of their average", "hours")
    table(columns, [astuple(each) for each in why.tried], title="within the time, and the budget:")
    for line in why.lines():
        say(line)
    return found


def show_plan(
    config: TrainConfig, json_file: Path | None, *, others: bool = False, device_bytes: int | None = None
) -> None:
    """What a run of these settings is and will cost; with other lots and budgets, where these are asked for.

    Args:
        config: the settings.
        json_file: for the figures.
        others: also say what other settings would mean.
        device_bytes: memory of a device; None: of this machine's.
    """
    found = preview(config, others=others)
    frozen = "" if config.lora is None else f", all frozen; {big(found.trained)} values of adapters are trained"
    say(
        f"model: {big(found.parameters)} parameters, {found.expert_share:.1%} in experts{frozen}; "
        f"weights, gradients and optimiser {size(found.state_bytes)} on the device, activations on top"
    )
    if found.remark is not None:
        say(f"note: {found.remark}")
    if config.ranks > 1:
        beside = ", and a layer's whole weights while it is computed" if config.layers_over > 1 else ""
        say(f"over {config.ranks} ranks: {size(found.rank_bytes)} on the device of each{beside}")
    say(
        f"text: {found.sequences} sequences of at most {config.data.sequence_length} tokens, {found.tokens} of them "
        f"predicted; {found.rounds} rounds"
    )
    if found.calibration is not None:
        here, rounds = found.calibration, found.rounds
        whole, (few, more, layers) = duration(here.round_seconds * rounds), here.layers
        say(
            f"on this machine: {here.round_seconds:.3g} s a round and {whole} for all {rounds}, evaluation aside, "
            f"and {size(here.peak_bytes)} at the peak, activations included"
        )
        models = f"{few} and {more} of {layers} layers" if few < layers else "random weights"
        say(f"(measured on synthetic records with {models})")
    if config.privacy is not None and config.lora is None and found.calibration is not None:
        activations = max(0, found.calibration.peak_bytes - found.state_bytes)
        chosen = choose(found.devices, found.experts_over, device_bytes or memory_here(), activations)
        say(f"of devices with {size(chosen.device_bytes)}: {chosen.words()} ({size(chosen.rank_bytes)} at each)")
    if config.privacy is not None and found.privacy is not None:
        _warn(config.privacy)
        announce(found.privacy)
    else:
        say("no privacy budget: what is trained may give its text away")
    if found.choices:
        say("other lots that use each record as often, and other budgets (noise in clip norms, over the lot):")
        columns = ("epsilon", "lot", "rounds", "noise multiplier", "noise of a round", "of their average")
        table(columns, [astuple(each) for each in found.choices])
    if found.bands:
        say("noise in bands (noise in clip norms; in the weights: over that of independent noise, on average):")
        table(
            ("noise_bands", "noise multiplier", "noise of a round", "in the weights"),
            [astuple(each) for each in found.bands],
        )
        say(advice(found.bands))
    if others and found.lora is not None:
        _show_adapters(found, found.lora)
    say("nothing was trained or spent")
    if json_file is not None:
        write_json(json_file, found.as_json())


def _show_adapters(found: Preview, lora: AdaptersPreview) -> None:
    """Full training beside adapters."""
    rows = [("all weights", found.parameters, found.devices[0], found.full)]
    rows.append((f"adapters, rank {lora.rank}", lora.adapters, lora.state_bytes, lora.calibration))
    say("full training or adapters (LoRA; `lora` trains them):")
    table(
        ("trained", "values", "state", "a round", "at the peak"),
        [
            (what, big(values), size(state), *(("-", "-") if here is None else _of_round(here)))
            for what, values, state, here in rows
        ],
    )
    if found.privacy is not None:
        say(of_noise(found.parameters, lora.adapters))
    say(SUITS)


def _of_round(here: Calibration) -> tuple[str, str]:
    return f"{here.round_seconds:.3g} s", size(here.peak_bytes)


@contextmanager
def watched(config: TrainConfig) -> Iterator[tuple[StopFlag, Watch]]:
    """Show the rounds, and epsilon as it is spent, and turn Ctrl-C into a stop after the round."""
    disable_progress_bar()  # transformers' own, for a file that takes a second
    if config.privacy is not None:
        _open(config.privacy)
    stop = StopFlag()
    reported, epsilon = 0, ""
    with stop_signals(stop.set, bounded=False), progress("round", config.train.rounds) as advance:

        def watch(done: int, step: Step, evaluation: Evaluation | None) -> None:
            nonlocal reported, epsilon
            if step.spent is not None:
                epsilon = f"epsilon {epsilon_digits(step.spent.epsilon)}"
            held_out = f"held-out {evaluation.loss:.3f}" if evaluation is not None else ""
            stopping = "stopping: writing a checkpoint" if stop.asked else ""
            notes = (epsilon, step.nothing_learnt or f"loss {step.loss:.3f}", held_out, stopping)
            advance("  ".join(filter(None, notes)), steps=done - reported)
            reported = done

        yield stop, watch


def _warn(privacy: PrivacySpec) -> None:
    if privacy.seeded:
        say("NOT PRIVATE: `seeded` draws lots and noise from the seed; nothing this run makes may be released")


def _open(privacy: PrivacySpec) -> None:
    _warn(privacy)
    say(f"budget: epsilon {privacy.epsilon:g} at delta {privacy.delta:g}; losses shown below are not private")


def report(result: RunResult, json_file: Path | None) -> None:
    """Print how the run ended and what to do next; of a private run its statement, too."""
    if json_file is not None:
        write_json(json_file, result.as_json())
    if result.finished:
        row, where = _plain_end(result) if result.privacy is None else _private_end(result, result.privacy)
        table(tuple(row), [tuple(row.values())])
        say(where)
    else:
        say(f"stopped after round {result.rounds}; go on with: coterie resume {as_argument(result.run_dir)}")
    if result.statement:
        say()
        say(result.statement)
    if not result.finished:
        raise typer.Exit(EXIT_STOPPED)


def _plain_end(result: RunResult) -> tuple[dict[str, object], str]:
    row: dict[str, object] = {
        "rounds": result.rounds,
        "loss before": result.loss_before,
        "held-out loss": result.loss,
        "perplexity": result.perplexity,
        "model state MiB": result.model_state_bytes / MIB,
        "peak memory MiB": result.peak_rss_bytes / MIB,
    }
    where = _ends_at(result)
    return row, f"{where.name}: {where}   figures: {result.run_dir}/private/metrics.jsonl"


def _private_end(result: RunResult, privacy: dict[str, object]) -> tuple[dict[str, object], str]:
    row: dict[str, object] = {
        "rounds": result.rounds,
        "epsilon": privacy["epsilon"],
        "delta": privacy["delta"],
        "loss before": result.loss_before,
        "held-out loss": result.loss,
        "perplexity": result.perplexity,
    }
    public, where = Path(result.run_dir, "public"), _ends_at(result)
    if public.is_dir():
        return row, f"{where.name}, card and statement, which may be given away: {public}"
    return row, f"{where.name}: {where}, which may not be given away: see the statement"


def _ends_at(result: RunResult) -> Path:
    found = result_folder(Path(result.run_dir))
    assert found is not None, "a finished run has written it"
    return found
